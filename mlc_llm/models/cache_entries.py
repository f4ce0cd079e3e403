"""The entries of libraries for GPUs: a step over TVM's paged cache, and from logits to tokens.

They are what the npm package `@mlc-ai/web-llm` calls. Models do not know: their layers get
`CachedKV` where the entries of `base.py` hand them `PagedKV`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import spec

from mlc_llm.errors import UnsupportedModel
from mlc_llm.kernels.gpu import sampling
from mlc_llm.models.base import CausalLM, DecoderLM
from mlc_llm.nn import gpu_ops, gpu_sampling
from mlc_llm.nn.cache_kv import CachedKV, PagedKVCache, create_cache

# The entries that run a step, by what a step is: one sequence or several, a prompt or one token.
STEP_ENTRIES = ("prefill", "decode", "batch_prefill", "batch_decode")
_WEIGHTS = {"param_mode": "packed", "effect_mode": "none"}
_NO_WEIGHTS = {"param_mode": "none", "effect_mode": "none"}


class CacheEntries:
    """The entries of one model. Hidden states have the model's dtype, logits are float32."""

    steps = STEP_ENTRIES

    def __init__(self, model: CausalLM) -> None:
        if not isinstance(model, DecoderLM) or (
            type(model).hidden_states is not DecoderLM.hidden_states
        ):
            raise UnsupportedModel(
                "it is not the usual decoder of attention and feed-forward layers, and GPU "
                "libraries are made of those only yet"
            )
        config, layout = model.config, model.kv_layout()
        if (config.num_key_value_heads, config.head_dim) != (
            layout.num_key_value_heads,
            layout.head_dim,
        ):
            raise UnsupportedModel(
                "its attention is latent, which libraries for others do not hold"
            )
        if model.image_inputs is not None:
            raise UnsupportedModel("it takes images, and libraries for others take text only")
        if model.state_specs():
            raise UnsupportedModel("it has recurrent state, which libraries for others do not hold")
        self.model = model

    def embed(self, token_ids: nn.Tensor) -> nn.Tensor:
        """Return what the first layer gets, (n, hidden); token_ids (n) int32."""
        return self.model.embed(token_ids)

    def prefill(self, input_embed: nn.Tensor, paged_kv_cache: PagedKVCache) -> Any:
        """Run a prompt (1, n, hidden) of one sequence: logits (1, 1, vocab), the cache."""
        hidden = self._layers(input_embed, paged_kv_cache)
        return self._logits(gpu_ops.last_row(hidden), (1, 1)), paged_kv_cache

    def decode(self, input_embed: nn.Tensor, paged_kv_cache: PagedKVCache) -> Any:
        """Run one token (1, 1, hidden) of one sequence: logits (1, 1, vocab), the cache."""
        return self._logits(self._layers(input_embed, paged_kv_cache), (1, 1)), paged_kv_cache

    def batch_prefill(
        self, input_embeds: nn.Tensor, logit_positions: nn.Tensor, paged_kv_cache: PagedKVCache
    ) -> Any:
        """Run prompts side by side (1, n, hidden): logits (1, b, vocab) of some rows, the cache.

        logit_positions: (b) int32.
        """
        hidden = self._layers(input_embeds, paged_kv_cache)
        rows = gpu_ops.take_rows(hidden, logit_positions)
        return self._logits(rows, (1, logit_positions.shape[0])), paged_kv_cache

    def batch_decode(self, input_embeds: nn.Tensor, paged_kv_cache: PagedKVCache) -> Any:
        """Run a token of each of several sequences (b, 1, hidden): logits (b, 1, vocab), cache."""
        hidden = self._layers(input_embeds, paged_kv_cache)
        return self._logits(hidden, (input_embeds.shape[0], 1)), paged_kv_cache

    def create_tir_paged_kv_cache(
        self,
        max_batch_size: tvm.tirx.Var,
        max_total_seq_len: tvm.tirx.Var,
        prefill_chunk_size: tvm.tirx.Var,
        page_size: tvm.tirx.Var,
        support_sliding_window: tvm.tirx.Var,
    ) -> PagedKVCache:
        """Return an empty cache of these limits."""
        limits = [max_batch_size, max_total_seq_len, prefill_chunk_size, page_size]
        config = self.model.config
        return create_cache(
            [*limits, support_sliding_window],
            config.num_hidden_layers,
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim),
            self.model.dtype_name,
        )

    def apply_logit_bias_inplace(
        self, logits: nn.Tensor, rows: nn.Tensor, tokens: nn.Tensor, biases: nn.Tensor
    ) -> nn.Tensor:
        """Add biases (t) to logits, see the kernel."""
        return gpu_sampling.change_logits(sampling.apply_logit_bias, logits, rows, tokens, biases)

    def apply_penalty_inplace(
        self,
        logits: nn.Tensor,
        rows: nn.Tensor,
        sequence_of: nn.Tensor,
        tokens: nn.Tensor,
        counts: nn.Tensor,
        penalties: nn.Tensor,
    ) -> nn.Tensor:
        """Penalise tokens that were said, see the kernel."""
        said = (sequence_of, tokens, counts)
        return gpu_sampling.change_logits(sampling.apply_penalty, logits, rows, *said, penalties)

    def apply_bitmask_inplace(
        self, logits: nn.Tensor, rows: nn.Tensor, mask: nn.Tensor
    ) -> nn.Tensor:
        """Forbid tokens whose bit is 0, see the kernel."""
        return gpu_sampling.change_logits(sampling.apply_bitmask, logits, rows, mask)

    def softmax_with_temperature(self, logits: nn.Tensor, temperature: nn.Tensor) -> nn.Tensor:
        """Return probabilities of logits (b, 1, v); temperature (b)."""
        return gpu_sampling.softmax_with_temperature(logits, temperature)

    def argsort_probs(self, probs: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        """Return probabilities (b, v), the largest first, and their tokens."""
        return gpu_sampling.sort_falling(probs)

    def sample_with_top_p(
        self,
        sorted_probs: nn.Tensor,
        sorted_tokens: nn.Tensor,
        uniform: nn.Tensor,
        rows: nn.Tensor,
        top_p: nn.Tensor,
    ) -> nn.Tensor:
        """Return tokens (s) drawn from rows of sorted probabilities, see the kernel."""
        return gpu_sampling.sample_with_top_p(sorted_probs, sorted_tokens, uniform, rows, top_p)

    def export_spec(self) -> spec.ModuleSpec:
        """Return the signatures of the entries for the exporter, with symbolic sizes."""
        methods: list[tuple[Callable[..., Any], dict[str, Any]]] = [
            *self._step_specs(),
            *self._sampling_specs(),
        ]
        return spec.ModuleSpec(
            self.model,
            [method.__name__ for method, _ in methods],
            [spec.MethodSpec.from_raw(raw, method) for method, raw in methods],
        )

    def _step_specs(self) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
        hidden, dtype = self.model.config.hidden_size, self.model.dtype_name
        cache = {"paged_kv_cache": spec.Object(PagedKVCache)}

        def embeds(*shape: int | str) -> spec.Tensor:
            return spec.Tensor([*shape, hidden], dtype)

        one = {"input_embed": embeds(1, 1), **cache, "$": dict(_WEIGHTS)}
        rows = spec.Tensor(["b"], "int32")
        batch = {"input_embeds": embeds(1, "n"), "logit_positions": rows, **cache}
        limits = {
            "max_batch_size": int,
            "max_total_seq_len": int,
            "prefill_chunk_size": int,
            "page_size": int,
            "support_sliding_window": int,
        }
        return [
            (self.embed, {"token_ids": spec.Tensor(["n"], "int32"), "$": dict(_WEIGHTS)}),
            (self.prefill, {"input_embed": embeds(1, "n"), **cache, "$": dict(_WEIGHTS)}),
            (self.decode, one),
            (self.batch_prefill, {**batch, "$": dict(_WEIGHTS)}),
            (self.batch_decode, {"input_embeds": embeds("b", 1), **cache, "$": dict(_WEIGHTS)}),
            (self.create_tir_paged_kv_cache, {**limits, "$": dict(_NO_WEIGHTS)}),
        ]

    def _sampling_specs(self) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
        vocab = self.model.config.vocab_size

        def floats(*shape: int | str) -> spec.Tensor:
            return spec.Tensor(shape, "float32")

        def ints(*shape: int | str) -> spec.Tensor:
            return spec.Tensor(shape, "int32")

        logits = {"logits": floats("b", vocab)}
        said = {"sequence_of": ints("t"), "tokens": ints("t"), "counts": ints("t")}
        mask = ints("s", (vocab + 31) // 32)
        drawn = {"uniform": floats("s"), "rows": ints("s"), "top_p": floats("b")}
        specs: list[tuple[Callable[..., Any], dict[str, Any]]] = [
            (
                self.apply_logit_bias_inplace,
                {**logits, "rows": ints("t"), "tokens": ints("t"), "biases": floats("t")},
            ),
            (
                self.apply_penalty_inplace,
                {**logits, "rows": ints("s"), **said, "penalties": floats("s", 3)},
            ),
            (self.apply_bitmask_inplace, {**logits, "rows": ints("s"), "mask": mask}),
            (
                self.softmax_with_temperature,
                {"logits": floats("b", 1, vocab), "temperature": floats("b")},
            ),
            (self.argsort_probs, {"probs": floats("b", vocab)}),
            (
                self.sample_with_top_p,
                {"sorted_probs": floats("b", vocab), "sorted_tokens": ints("b", vocab), **drawn},
            ),
        ]
        return [(method, {**raw, "$": dict(_NO_WEIGHTS)}) for method, raw in specs]

    def _layers(self, embeds: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """Run all layers on rows of any two leading dimensions: (n, hidden)."""
        config, (first, second, hidden) = self.model.config, embeds.shape
        count = second if first == 1 else first * second
        positions = cache.get_query_positions(count)
        window = max(config.sliding_window_size, 0) or -1
        kv = CachedKV(cache, positions, config.ropes, window)
        rows = nn.op.reshape(embeds, (count, hidden))
        result: nn.Tensor = self.model.decoder(rows, kv)
        return result

    def _logits(self, rows: nn.Tensor, shape: tuple[Any, Any]) -> nn.Tensor:
        logits = self.model.logits(self.model.final_norm(rows))
        if logits.dtype != "float32":
            logits = nn.op.astype(logits, "float32")
        result: nn.Tensor = nn.op.reshape(logits, (*shape, self.model.config.vocab_size))
        return result
