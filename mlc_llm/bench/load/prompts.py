"""What to ask: made-up prompts of a wanted length in tokens, or the dialogues of a file.

Learns from the server how its tokenizer counts; does not know tokenizers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.bench.load.ask import Asker, Sample, call
from mlc_llm.bench.load.http import RequestFailed
from mlc_llm.errors import OptionError

# Short common words, a token each in most vocabularies.
_WORDS = tuple(
    (
        "able also area away back ball bank base bear best bird blue boat body book both call card "
        "care case cell city club coal cold cost dark data date deal deep door down draw each east "
        "easy edge even ever face fact fair fall farm fast feel file film fine fire fish five food "
        "foot form four free full game girl give glad goal gold good gray grow hair half hall hand "
        "hard have head hear heat help high hill hold home hope hour idea inch iron item join jump "
        "keep kind king know lake land last late lead left less life lift like line list live long "
        "look loss loud love main make many mark mass meal mean meet milk mind mine more most move "
        "much must name near neck need news next nine noon nose note once only open over page pair "
        "park part past path plan play poem poor post pull push race rain read real rest rice rich "
        "ride ring rise road rock room root rope rule safe sail salt same sand save seat seed self "
        "send ship shop side sign sing site size skin snow soft soil some song soon star stay step "
        "such sure talk tall team tell term test that then they thin this time tiny tone tool town "
        "tree trip true tube turn type unit upon vast very view vote wait walk wall want warm wash "
        "wave wear week well west what wide wild will wind wing wire wise wish wood word work yard"
    ).split()
)
_REPEATS = 16
_CHARACTERS_PER_TOKEN = 4.0  # of English text, where a server cannot count


@dataclass(frozen=True)
class Ruler:
    """How many tokens a prompt of made-up words has: overhead + per_word * words."""

    words: Sequence[str] = _WORDS
    per_word: float = 1.0
    overhead: float = 0.0

    def num_words(self, tokens: int) -> int:
        """Return how many words make a prompt of so many tokens, one at least."""
        return max(1, round((tokens - self.overhead) / self.per_word))


@dataclass(frozen=True)
class Lengths:
    """Tokens of made-up prompts and answers, both spread evenly by a share around their mean."""

    prompt_len: int
    output_len: int
    spread: float = 0.0

    def draw(self, generator: random.Random) -> tuple[int, int]:
        """Return the lengths of one request."""
        prompt, output = (
            max(1, round(mean * (1 + generator.uniform(-self.spread, self.spread))))
            for mean in (self.prompt_len, self.output_len)
        )
        return prompt, output


def made_up(lengths: Lengths, ruler: Ruler, seed: int) -> Iterator[Sample]:
    """Yield requests without end; prompts of different seeds have no beginning in common."""
    generator = random.Random(seed)
    while True:
        prompt_len, output_len = lengths.draw(generator)
        words = generator.choices(ruler.words, k=ruler.num_words(prompt_len))
        yield Sample(" ".join(words), output_len)


async def count_tokens(asker: Asker, text: str) -> int | None:
    """Return the tokens of a text by the server's /tokenize, None where it has none that works."""
    # Two forms are known: vLLM's, which is ours too, and llama-server's.
    for body in ({"model": asker.model, "prompt": text}, {"content": text}):
        try:
            answer = await call(asker.server, f"{asker.server.root}/tokenize", body)
        except RequestFailed:
            continue
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if isinstance(tokens, list) and tokens:
            return len(tokens)
    return None


async def make_ruler(asker: Asker, seed: int) -> Ruler:
    """Learn from two small requests how the server counts words.

    Where the server also has /tokenize, words that are not as long as most are left out, which
    makes prompts exact. Raises RequestFailed if the server refuses the requests.
    """
    words = await _equal_words(asker)
    generator = random.Random(seed)
    counts = []
    for num_words in (_REPEATS, 5 * _REPEATS):
        text = " ".join(generator.choices(words, k=num_words))
        record = await asker.ask(Sample(text, 1))
        if record.error is not None:
            raise RequestFailed(record.error, record.detail)
        counts.append(record.prompt_tokens)
    per_word = (counts[1] - counts[0]) / (4 * _REPEATS)
    if per_word <= 0:  # a server that reports no usage
        return Ruler(words)
    return Ruler(words, per_word, counts[0] - per_word * _REPEATS)


async def _equal_words(asker: Asker) -> Sequence[str]:
    if await count_tokens(asker, _WORDS[0]) is None:
        return _WORDS
    sizes: dict[str, int | None] = {}
    for word in _WORDS:
        sizes[word] = await count_tokens(asker, f"{word} " * _REPEATS)
    [(most, _)] = Counter(sizes.values()).most_common(1)
    return [word for word in _WORDS if sizes[word] == most]


@dataclass(frozen=True)
class Exchange:
    """A question and the answer it once got."""

    question: str
    answer: str


def read_sharegpt(path: Path) -> list[Exchange]:
    """Return the first question and answer of each dialogue of a ShareGPT file.

    That is a JSON list of {"conversations": [{"from": "human" | "gpt", "value": text}, ...]}.
    Dialogues that do not begin with a question and an answer are left out. Raises OptionError.
    """
    try:
        dialogues = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"--dataset {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise OptionError(f"--dataset {path} is not JSON: {error}") from None
    if not isinstance(dialogues, list):
        raise OptionError(f"--dataset {path} is not a list of dialogues, as ShareGPT files are")
    exchanges = [found for found in map(_first_exchange, dialogues) if found is not None]
    if not exchanges:
        raise OptionError(
            f'--dataset {path} has no dialogue with "conversations" of "human" and "gpt"'
        )
    return exchanges


def _first_exchange(dialogue: Any) -> Exchange | None:
    turns = dialogue.get("conversations") if isinstance(dialogue, dict) else None
    if not isinstance(turns, list):
        return None
    pairs = [(t.get("from"), t.get("value")) for t in turns if isinstance(t, dict)]
    pairs = [(who, text) for who, text in pairs if who != "system"][:2]
    if [who for who, _ in pairs] not in (["human", "gpt"], ["user", "assistant"]):
        return None
    question, answer = (text for _, text in pairs)
    if not (isinstance(question, str) and isinstance(answer, str) and question.strip()):
        return None
    return Exchange(question, answer) if answer else None


async def choose_exchanges(
    asker: Asker,
    exchanges: Sequence[Exchange],
    *,
    count: int,
    seed: int,
    output_len: int | None,
    max_total_len: int,
) -> list[Sample]:
    """Return up to `count` requests in random order, none longer than `max_total_len` tokens.

    An answer may have as many tokens as the one in the file, or `output_len`. Raises OptionError
    if all are too long.
    """
    samples: list[Sample] = []
    for exchange in random.Random(seed).sample(exchanges, len(exchanges)):
        if len(samples) == count:
            break
        if output_len is None:
            answer_len = await _length(asker, exchange.answer)
        else:
            answer_len = output_len
        if await _length(asker, exchange.question) + answer_len <= max_total_len:
            samples.append(Sample(exchange.question, answer_len))
    if not samples:
        raise OptionError(
            f"no dialogue of --dataset has at most {max_total_len} tokens; raise --max-total-len"
        )
    return samples


async def _length(asker: Asker, text: str) -> int:
    return await count_tokens(asker, text) or math.ceil(len(text) / _CHARACTERS_PER_TOKEN)


async def settle_ignore_eos(asker: Asker) -> Asker:
    """Return the asker with `ignore_eos` set if the server takes that field, else without.

    Raises RequestFailed if it takes no request at all.
    """
    eager = dataclasses.replace(asker, extra={**asker.extra, "ignore_eos": True})
    record = await eager.ask(Sample("Hello", 2))
    if record.error is None:
        return eager
    if record.error not in ("HTTP 400", "HTTP 422"):
        raise RequestFailed(record.error, record.detail)
    record = await asker.ask(Sample("Hello", 2))
    if record.error is not None:
        raise RequestFailed(record.error, record.detail)
    return asker
