"""OLMo 2: Llama with norms after both halves of a layer instead of before, and of q and k."""

from __future__ import annotations

from collections.abc import Callable

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.llama import FUSED, LlamaAttention, LlamaConfig
from mlc_llm.nn import ops
from mlc_llm.nn.decoder import DecoderNames
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.norm import RMSNorm, norm_heads
from mlc_llm.nn.ops import Rows


class Olmo2Attention(LlamaAttention):
    """Llama's; all queries of a token are normalised together, and all its keys."""

    def __init__(self, config: LlamaConfig, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        width, eps = config.num_attention_heads * config.head_dim, config.rms_norm_eps
        self.q_norm = RMSNorm(width, eps, dtype)
        self.k_norm = RMSNorm(config.num_key_value_heads * config.head_dim, eps, dtype)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        qkv = norm_heads(self.qkv_proj(x), self.q_norm, self.k_norm, self.shape, is_whole=True)
        return self.o_proj(kv.attend(layer, qkv, self.shape, self.rope))


class Olmo2Layer(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        norm: Callable[[], nn.Module],
        names: DecoderNames,
    ) -> None:
        super().__init__()
        del names
        self.self_attn, self.mlp = attention, mlp
        self.post_attention_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        attended = self.post_attention_layernorm(self.self_attn(x, kv, layer))
        x = ops.add(x, ops.materialize(attended))
        return ops.add(x, ops.materialize(self.post_feedforward_layernorm(self.mlp(x))))


def build(config: LlamaConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, Olmo2Attention, layer=Olmo2Layer)


FAMILY = Family("olmo2", ("Olmo2ForCausalLM",), LlamaConfig, build, FUSED)
