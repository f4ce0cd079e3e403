"""The models that one server serves, by the names that requests give them."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from mlc_llm.engine.embedding import EmbeddingModel
from mlc_llm.errors import UnknownModel
from mlc_llm.serve.model import ServedModel


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "mlc_llm"
    max_model_len: int


class ModelList(BaseModel):
    """The models that are served."""

    object: str = "list"
    data: list[ModelCard]


@dataclass(frozen=True)
class ServedModels:
    """What one server serves: at least one of the two."""

    chat: ServedModel | None = None
    embedding: EmbeddingModel | None = None

    def find_chat(self, name: str | None) -> ServedModel:
        """Return the model for chats and completions. Raises UnknownModel for another name."""
        if self.chat is None:
            raise UnknownModel(
                "there is no model for chats and completions here, only one for embeddings; "
                "use v1/embeddings, or serve another model"
            )
        if name in (None, self.chat.name):
            return self.chat
        raise self._unknown(name)

    def find_embedding(self, name: str | None) -> EmbeddingModel:
        """Return the embedding model. Raises UnknownModel where there is none of that name."""
        if self.embedding is None:
            raise UnknownModel(
                "this server has no model for embeddings; start it with --embedding-model"
            )
        if name in (None, self.embedding.name):
            return self.embedding
        raise self._unknown(name)

    def find_reranker(self, name: str | None) -> EmbeddingModel | ServedModel:
        """Return the model that puts documents in order: a reranker goes before one of vectors.

        Raises UnknownModel where there is none of that name.
        """
        chat, vectors = self.chat, self.embedding
        if chat is not None and chat.ranking is not None and name in (None, chat.name):
            return chat
        if vectors is not None and name in (None, vectors.name):
            return vectors
        if name is not None and (chat is None or name != chat.name):
            raise self._unknown(name)
        if vectors is not None:
            raise UnknownModel(
                f"the model {name!r} does not put documents in order; ask {vectors.name!r} to"
            )
        raise UnknownModel(
            "this server has no model that puts documents in order; start it with "
            "--embedding-model, or with a reranker (and --model-task rerank where its files do not "
            "say that it is one)"
        )

    def cards(self) -> list[ModelCard]:
        """Return what is told of each model."""
        cards = []
        if (chat := self.chat) is not None:
            length = chat.max_sequence_len
            cards.append(ModelCard(id=chat.name, created=chat.created, max_model_len=length))
        if (vectors := self.embedding) is not None:
            length = vectors.max_input_len
            cards.append(ModelCard(id=vectors.name, created=vectors.created, max_model_len=length))
        return cards

    def card(self, name: str) -> ModelCard:
        """Return what is told of one model. Raises UnknownModel."""
        for card in self.cards():
            if card.id == name:
                return card
        raise self._unknown(name)

    def _unknown(self, name: str | None) -> UnknownModel:
        return UnknownModel(
            f"the model {name!r:.200} is not served here; GET v1/models lists those that are"
        )
