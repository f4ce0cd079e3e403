"""What a reranker is asked: whether a document meets a query, to be answered with yes or no.

Knows the words that Qwen3-Reranker was trained on. Does not know how likely the answers are.
"""

from __future__ import annotations

from mlc_llm.errors import RequestError, UnsupportedModel
from mlc_llm.text.tokenizer import Tokenizer

# https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, section "Transformers Usage".
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_BEGIN = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
_END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
YES, NO = "yes", "no"


class RankingPrompts:
    """Builds the prompts of one model.

    yes_id and no_id: the answers. Of these alone, the first one's probability is the score.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UnsupportedModel for a tokenizer without the tokens that the prompt has."""
        self.yes_id, self.no_id, *_ = (_get_id(tokenizer, text) for text in (YES, NO, *_TOKENS))
        self._tokenizer = tokenizer
        self._begin, self._end = tokenizer.encode(_BEGIN), tokenizer.encode(_END)

    def build(
        self, query: str, document: str, instruction: str | None = None, max_len: int | None = None
    ) -> list[int]:
        """Return the ids of a prompt; the end of the document is left out where it has more than
        max_len.

        instruction: what a document is to be good for, INSTRUCTION if left out. Raises RequestError
        where max_len has no place for the query.
        """
        head = f"<Instruct>: {instruction or INSTRUCTION}\n<Query>: {query}\n<Document>: "
        asked = self._tokenizer.encode(head + document)
        num_fixed = len(self._begin) + len(self._end)
        if max_len is not None and num_fixed + len(asked) > max_len:
            least = num_fixed + len(self._tokenizer.encode(head)) + 1
            if max_len < least:
                raise RequestError(
                    f"the query and what is around it have {least - 1:,} tokens, so there is no "
                    f"document in {max_len:,}; shorten the query, or allow {least:,} or more",
                    "query",
                )
            asked = asked[: max_len - num_fixed]
        return [*self._begin, *asked, *self._end]


def _get_id(tokenizer: Tokenizer, text: str) -> int:
    token_id = tokenizer.token_to_id(text)
    if token_id is None:
        raise UnsupportedModel(
            f"the model has no token {text!r}, so it is no reranker of the kind of Qwen3-Reranker; "
            "let model_task be chat, or serve a model for embeddings"
        )
    return token_id
