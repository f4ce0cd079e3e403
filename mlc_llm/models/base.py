"""What every causal language model shares: the entries of its library and their export.

Only what every model needs. Rarer things live in their family's file or in `nn/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import spec

from mlc_llm.artifact import KVCacheLayout, TensorSpec
from mlc_llm.errors import UnsupportedModel
from mlc_llm.images.inputs import ImageInputs
from mlc_llm.models.checking import configuration_errors
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn import ops
from mlc_llm.nn.decoder import NAMES, Decoder, DecoderLayer, DecoderNames
from mlc_llm.nn.kv import PagedKV, RopeTable
from mlc_llm.nn.linear import Embedding, Linear
from mlc_llm.nn.mlp import GatedMLP
from mlc_llm.nn.norm import RMSNorm
from mlc_llm.nn.ops import Rows

PAGE_SIZE = 16
# What a library is for -> its entry that runs a step.
STEP_ENTRIES: Mapping[str, str] = {"chat": "forward", "embedding": "encode"}


class CausalLM(nn.Module):
    """A model of text with an output layer. One step: new tokens of several sequences -> logits.

    A library for embeddings has `encode` in place of `forward`: hidden states instead of logits.
    Subclasses say what happens to tokens: `hidden_states`, `final_norm` and `logits`.
    """

    def __init__(self, config: DecoderConfig, dtype: str) -> None:
        super().__init__()
        self.config, self.dtype_name = config, dtype

    def hidden_states(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Embed the tokens (n) of a step and run all layers: (n, hidden) float32."""
        raise NotImplementedError

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | Rows:
        """Normalise rows (r, hidden) for the output layer."""
        raise NotImplementedError

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        raise NotImplementedError

    def kv_layout(self) -> KVCacheLayout:
        """Return the shape of the KV pages that `forward` works on."""
        config = self.config
        return KVCacheLayout(
            num_layers=config.num_hidden_layers,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            page_size=PAGE_SIZE,
            dtype=config.kv_dtype(self.dtype_name),
        )

    def state_specs(self) -> list[TensorSpec]:
        """Return the tensors of one sequence's recurrent state; most models have none."""
        return []

    def forward(
        self,
        token_ids: nn.Tensor,
        positions: nn.Tensor,
        query_start: nn.Tensor,
        slots: nn.Tensor,
        page_table: nn.Tensor,
        context_len: nn.Tensor,
        logit_rows: nn.Tensor,
        kv_pages: list[nn.Tensor],
        state_slots: nn.Tensor | None = None,
        states: Sequence[nn.Tensor] = (),
    ) -> tuple[Any, ...]:
        """Run one step; return logits (r, vocab) float32, and pages and states written in place.

        All int32: token_ids, positions, slots (n); query_start (b + 1); page_table (b, p);
        context_len (b), this step's tokens included; logit_rows (r), rows of the step; state_slots
        (b). states: as `state_specs`, each with a first dimension of slots.
        """
        kv = self._paged_kv(positions, query_start, slots, page_table, context_len, kv_pages)
        kv.state_slots = state_slots
        names = [state.name for state in self.state_specs()]
        kv.states = dict(zip(names, states, strict=True))
        hidden = self.hidden_states(token_ids, kv)
        logits = self.logits(self.final_norm(ops.take_rows(hidden, logit_rows)))
        logits = as_float32(logits)
        return (logits, kv.pages, list(kv.states.values())) if kv.states else (logits, kv.pages)

    def encode(
        self,
        token_ids: nn.Tensor,
        positions: nn.Tensor,
        query_start: nn.Tensor,
        slots: nn.Tensor,
        page_table: nn.Tensor,
        context_len: nn.Tensor,
        logit_rows: nn.Tensor,
        kv_pages: list[nn.Tensor],
    ) -> tuple[nn.Tensor, list[nn.Tensor]]:
        """Run one step as `forward` does; return hidden states after the final norm instead.

        They are (r, hidden) float32, one for each of `logit_rows`.
        """
        kv = self._paged_kv(positions, query_start, slots, page_table, context_len, kv_pages)
        hidden = self.hidden_states(token_ids, kv)
        rows = ops.materialize(self.final_norm(ops.take_rows(hidden, logit_rows)))
        return as_float32(rows), kv.pages

    def _paged_kv(
        self,
        positions: nn.Tensor,
        query_start: nn.Tensor,
        slots: nn.Tensor,
        page_table: nn.Tensor,
        context_len: nn.Tensor,
        kv_pages: list[nn.Tensor],
    ) -> PagedKV:
        tables = [
            RopeTable(
                ops.rope_table(
                    positions, nn.Tensor.from_const(rope.inverse_frequencies()), rope.table_scale
                ),
                rope.is_interleaved,
            )
            for rope in self.config.ropes
        ]
        return PagedKV(
            positions=positions,
            query_start=query_start,
            slots=slots,
            page_table=page_table,
            context_len=context_len,
            pages=list(kv_pages),
            ropes=tables,
        )

    def sample(
        self,
        logits: nn.Tensor,
        temperature: nn.Tensor,
        top_p: nn.Tensor,
        min_p: nn.Tensor,
        top_k: nn.Tensor,
        uniform: nn.Tensor,
    ) -> nn.Tensor:
        """Choose a token for each row of logits (r, v): (r) int32, see `runner.SampleRows`."""
        return ops.sample(logits, temperature, top_p, min_p, top_k, uniform)

    @property
    def image_inputs(self) -> ImageInputs | None:
        """Return what images the model takes; most take none."""
        return None

    def export_spec(self, task: str = "chat") -> spec.ModuleSpec:
        """Return the signatures of the entries for the exporter, with symbolic sizes.

        task: one of `STEP_ENTRIES`. A library for chats also has `sample`.
        """
        return spec.ModuleSpec.from_raw(self.entry_specs(task), self)

    def entry_specs(self, task: str) -> dict[str, Any]:
        """Return the specification of each entry by its name."""
        layout = self.kv_layout()
        page_shape = ["num_pages", *layout.page_shape(0)[1:]]
        pages = [spec.Tensor(page_shape, layout.dtype) for _ in range(layout.num_layers)]
        entry: dict[str, Any] = {
            "token_ids": spec.Tensor(["n"], "int32"),
            "positions": spec.Tensor(["n"], "int32"),
            "query_start": spec.Tensor(["num_starts"], "int32"),
            "slots": spec.Tensor(["n"], "int32"),
            "page_table": spec.Tensor(["b", "p"], "int32"),
            "context_len": spec.Tensor(["b"], "int32"),
            "logit_rows": spec.Tensor(["r"], "int32"),
            "kv_pages": pages,
            "$": {"param_mode": "plain", "effect_mode": "none"},
        }
        if states := self.state_specs():
            entry["state_slots"] = spec.Tensor(["b"], "int32")
            entry["states"] = [
                spec.Tensor(["num_slots", *state.shape], state.dtype) for state in states
            ]
        if task != "chat" and states:
            raise UnsupportedModel("models with recurrent state make no embeddings; use another")
        if task != "chat":
            return {STEP_ENTRIES[task]: entry}
        row_settings = ("temperature", "top_p", "min_p")
        sample = {
            "logits": spec.Tensor(["r", "v"], "float32"),
            **{name: spec.Tensor(["r"], "float32") for name in row_settings},
            "top_k": spec.Tensor(["r"], "int32"),
            "uniform": spec.Tensor(["r"], "float64"),
            "$": {"param_mode": "none", "effect_mode": "none"},
        }
        return {STEP_ENTRIES[task]: entry, "sample": sample}


def as_float32(rows: nn.Tensor) -> nn.Tensor:
    """Return rows as entries do: on GPUs hidden states have the model's dtype."""
    return rows if rows.dtype == "float32" else nn.op.astype(rows, "float32")


class DecoderLM(CausalLM):
    """The usual decoder and its output layer, `model` and `lm_head` in most families."""

    def __init__(
        self, config: DecoderConfig, dtype: str, model: Decoder, names: DecoderNames = NAMES
    ) -> None:
        super().__init__(config, dtype)
        self.names = names
        setattr(self, names.model, model)
        if not config.tie_word_embeddings:
            setattr(self, names.lm_head, Linear(config.hidden_size, config.vocab_size, dtype))

    @property
    def decoder(self) -> Decoder:
        """Return the decoder, under whatever name."""
        model: Decoder = getattr(self, self.names.model)
        return model

    def embed(self, token_ids: nn.Tensor) -> nn.Tensor:
        """Return what the first layer gets, (n, hidden) float32."""
        return self.decoder.embedding(token_ids)

    def hidden_states(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Embed the tokens (n) of a step and run all layers: (n, hidden) float32."""
        return self.decoder(self.embed(token_ids), kv)

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | Rows:
        """Normalise rows (r, hidden) for the output layer."""
        return self.decoder.final_norm(hidden)

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        if self.config.tie_word_embeddings:
            return self.decoder.embedding.logits(rows)
        logits: nn.Tensor = getattr(self, self.names.lm_head)(rows)
        return logits


def gated_mlp(config: DecoderConfig, dtype: str, layer: int) -> nn.Module:
    """Make the feed-forward layer that most families share."""
    del layer
    hidden_size, width = config.hidden_size, config.intermediate_size
    return GatedMLP(hidden_size, width, dtype, activation=config.hidden_act)


def pre_norm_layer(
    attention: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module], names: DecoderNames
) -> nn.Module:
    """Make the layer that most families share; `norm` makes a norm."""
    return DecoderLayer(attention, mlp, norm(), norm(), names)


LayerPart = Callable[[Any, str, int], nn.Module]
# Makes a norm from (width, eps, dtype).
NormKind = Callable[[int, float, str], nn.Module]
# Makes a layer from (attention, mlp, what makes a norm, names).
LayerKind = Callable[[nn.Module, nn.Module, Callable[[], nn.Module], DecoderNames], nn.Module]


def build_decoder(
    config: DecoderConfig,
    dtype: str,
    attention: LayerPart,
    mlp: LayerPart = gated_mlp,
    *,
    norm: NormKind = RMSNorm,
    layer: LayerKind = pre_norm_layer,
    names: DecoderNames = NAMES,
    language_model: type[DecoderLM] = DecoderLM,
) -> CausalLM:
    """Build the common decoder; attention and mlp make a layer's halves."""

    def make_norm() -> nn.Module:
        return norm(config.hidden_size, config.rms_norm_eps, dtype)

    layers = [
        layer(attention(config, dtype, index), mlp(config, dtype, index), make_norm, names)
        for index in range(config.num_hidden_layers)
    ]
    table = Embedding(config.vocab_size, config.hidden_size, dtype)
    return language_model(config, dtype, Decoder(table, layers, make_norm(), names), names)


@dataclass(frozen=True)
class Family:
    """A model family: how its configuration is read, its module built, its weights found.

    fused maps a module path suffix to the Hugging Face modules joined in it along the output
    dimension; every other parameter has the name that Hugging Face gives it. special returns the
    rule of a parameter that is made in another way, None for all others. base_prefix is what
    those names begin with in some checkpoints and not in others; unused, what names of tensors
    begin with that the model has no use for; spellings, beginnings of names in some checkpoints and
    what they are in the others, see `weights.names`; unused_modules, ends of the paths of modules
    that MLC LLM's artifacts have and ours have not. embedding: for models that make vectors of
    texts and nothing else, how, in the words of an artifact's `embedding_metadata`.
    """

    name: str
    architectures: tuple[str, ...]
    config: type[DecoderConfig]
    build: Callable[[Any, str], CausalLM]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    special: Callable[[Any, str], ParamRule | None] | None = None
    base_prefix: str = ""
    spellings: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    unused_modules: tuple[str, ...] = ()
    embedding: Mapping[str, Any] | None = None

    @property
    def task(self) -> str:
        """Return what models of the family are for, a key of `STEP_ENTRIES`."""
        return "chat" if self.embedding is None else "embedding"

    def config_from_huggingface(self, config: Mapping[str, Any]) -> DecoderConfig:
        """Read the content of `config.json`. Raises CorruptFile or UnsupportedModel."""
        with configuration_errors():
            return self.config.from_huggingface(config)

    def config_from_json(self, model_config: Mapping[str, Any]) -> DecoderConfig:
        """Read an artifact's `model_config`. Raises CorruptFile or UnsupportedModel."""
        with configuration_errors():
            return self.config.from_json(model_config)

    def rule_for(self, parameter: str, config: DecoderConfig) -> ParamRule:
        """Return which checkpoint tensors make up a parameter of the unquantized model."""
        special = None if self.special is None else self.special(config, parameter)
        if special is not None:
            return special
        path, _, leaf = parameter.rpartition(".")
        for suffix, parts in self.fused.items():
            if path.endswith(suffix):
                prefix = path[: -len(suffix)]
                return ParamRule(tuple(f"{prefix}{part}.{leaf}" for part in parts))
        return ParamRule((parameter,))
