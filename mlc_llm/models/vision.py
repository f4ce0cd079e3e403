"""What models of text and images share: the entry `embed_image`, and a step with rows of images."""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import spec

from mlc_llm.errors import UnsupportedModel
from mlc_llm.images.inputs import ImageInputs
from mlc_llm.models.base import CausalLM, DecoderLM, as_float32
from mlc_llm.nn import image_ops, ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.ops import Rows

IMAGE_ENTRY = "embed_image"


class VisionLM(CausalLM):
    """A decoder, `text`, and rows of images in place of some of its tokens.

    Subclasses add what sees: `image_inputs` and `embed_image`.
    """

    language_model: DecoderLM

    @property
    def text(self) -> DecoderLM:
        """Return the decoder: `language_model`, in models that have it apart."""
        return self.language_model

    @property
    def image_inputs(self) -> ImageInputs:
        """Return what images the model takes."""
        raise NotImplementedError

    def embed_image(self, pixels: nn.Tensor) -> nn.Tensor:
        """Return the rows (num_rows, hidden) float32 of a view (3, size, size) float32."""
        raise NotImplementedError

    def hidden_states(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Embed the tokens (n) of a step without images and run all layers."""
        return self.text.hidden_states(token_ids, kv)

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | Rows:
        """Normalise rows (r, hidden) for the output layer."""
        return self.text.final_norm(hidden)

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        return self.text.logits(rows)

    def forward_with_images(
        self,
        token_ids: nn.Tensor,
        positions: nn.Tensor,
        query_start: nn.Tensor,
        slots: nn.Tensor,
        page_table: nn.Tensor,
        context_len: nn.Tensor,
        logit_rows: nn.Tensor,
        image_rows: nn.Tensor,
        image_embeds: nn.Tensor,
        kv_pages: list[nn.Tensor],
    ) -> tuple[Any, ...]:
        """Run one step as `forward` does, rows of images in place of tokens.

        image_rows: (n) int32, -1 for text, else a row of image_embeds (m, hidden) float32.
        """
        kv = self._paged_kv(positions, query_start, slots, page_table, context_len, kv_pages)
        text = self.text.embed(token_ids)
        mixed = image_ops.put_image_rows(text, image_rows, image_embeds)
        hidden = self.text.decoder(mixed, kv)
        logits = self.logits(self.final_norm(ops.take_rows(hidden, logit_rows)))
        return as_float32(logits), kv.pages

    def entry_specs(self, task: str) -> dict[str, Any]:
        """Return the specification of each entry by its name."""
        if task != "chat":
            raise UnsupportedModel("models that take images make no embeddings; use another")
        entries = super().entry_specs(task)
        entry, images = entries["forward"], self.image_inputs
        entry["image_rows"] = spec.Tensor(["n"], "int32")
        entry["image_embeds"] = spec.Tensor(["m", images.width], "float32")
        entries["forward"] = spec.MethodSpec.from_raw(entry, self.forward_with_images)
        entries[IMAGE_ENTRY] = {
            "pixels": spec.Tensor([3, images.size, images.size], "float32"),
            "$": {"param_mode": "plain", "effect_mode": "none"},
        }
        return entries
