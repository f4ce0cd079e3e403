"""Images in the step loop: made once, one a step, kept, found again, and never mixed up."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from fakes import FakeRunner, Logits, next_token
from numpy.typing import NDArray

from mlc_llm.engine.engine import Engine
from mlc_llm.engine.images import MAX_HELD
from mlc_llm.engine.request import Output, Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.errors import RequestError, StepFailed
from mlc_llm.images.inputs import ImageInputs, PromptImage
from mlc_llm.images.tiles import arrange
from mlc_llm.runtime.runner import Step

TOKEN, SIZE, NUM_ROWS, WIDTH = 5, 4, 20, 3
INPUTS = ImageInputs(TOKEN, SIZE, NUM_ROWS, WIDTH)


class FakeImageRunner(FakeRunner):
    """Keeps, in place of an image's tokens, numbers made of the image and of the row."""

    def __init__(self, inputs: ImageInputs = INPUTS, **changes: Any) -> None:
        super().__init__(images=inputs.to_json(), **changes)
        self.num_rows = inputs.num_rows
        self.encoded: list[int] = []
        self.encoded_in_step: list[int] = []

    def embed_image(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        assert pixels.shape == (3, SIZE, SIZE)
        number = int(pixels[0, 0, 0])
        self.encoded.append(number)
        rows = 1000 * number + np.arange(self.num_rows)
        return np.repeat(rows[:, None], WIDTH, axis=1).astype(np.float32)

    def forward(self, step: Step) -> Logits:
        self.encoded_in_step.append(len(self.encoded) - sum(self.encoded_in_step))
        seen = step.token_ids
        if step.image_rows is not None:
            assert step.image_embeds is not None and step.image_embeds.dtype == np.float32
            is_image = step.image_rows >= 0
            assert np.array_equal(is_image, step.token_ids == TOKEN)
            rows = step.image_embeds[step.image_rows, 0].astype(np.int32)
            seen = np.where(is_image, rows, step.token_ids)
        else:
            assert TOKEN not in step.token_ids
        plain = {"image_rows": None, "image_embeds": None, "token_ids": seen}
        return super().forward(Step(**{**vars(step), **plain}))


def image(number: int, first: int) -> PromptImage:
    return PromptImage(np.full((3, SIZE, SIZE), number, np.float32), first, NUM_ROWS)


def prompt_of(*parts: int | list[int]) -> tuple[list[int], list[int], tuple[PromptImage, ...]]:
    """Return a prompt, what the fake keeps of it, and its images; numbers are images."""
    tokens: list[int] = []
    seen: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, int):
            images.append(image(part, len(tokens)))
            tokens += [TOKEN] * NUM_ROWS
            seen += [1000 * part + row for row in range(NUM_ROWS)]
        else:
            tokens += part
            seen += part
    return tokens, seen, tuple(images)


def make_engine(**changes: Any) -> tuple[Engine, FakeImageRunner]:
    limits = {"context_window_size": 256, "prefill_chunk_size": 64, "num_pages": 64}
    runner = FakeImageRunner(**{**limits, **changes})
    return Engine(runner), runner


def ask(name: str, *parts: int | list[int], count: int = 4, **options: Any) -> Request:
    tokens, _, images = prompt_of(*parts)
    params = SamplingParams(temperature=0, max_tokens=count)
    return Request(name, tokens, params, images=images, **options)


def expected(*parts: int | list[int], count: int = 4) -> list[int]:
    _, seen, _ = prompt_of(*parts)
    for _ in range(count):
        seen.append(next_token(seen))
    return seen[-count:]


def run(engine: Engine) -> list[Output]:
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
        engine.check_integrity()
    return outputs


def tokens_of(outputs: list[Output], name: str, index: int = 0) -> list[int]:
    assert all(output.error is None for output in outputs), [o.error for o in outputs if o.error]
    mine = [o for o in outputs if o.request_id == name and o.index == index]
    return [o.token_id for o in mine if o.token_id is not None]


TEXT = [7, 8, 9]


@pytest.mark.parametrize("chunk", [3, 7, 16, 64])
def test_rows_stand_where_they_belong(chunk: int) -> None:
    engine, runner = make_engine(prefill_chunk_size=chunk)
    engine.add(ask("a", TEXT, 1, [10], 2, 1, [11]))
    assert tokens_of(run(engine), "a") == expected(TEXT, 1, [10], 2, 1, [11])
    # The first comes twice and is kept until then.
    assert runner.encoded == [1, 2]
    assert max(runner.encoded_in_step) == 1


def test_steps_make_one_image_at_most_and_keep_few() -> None:
    engine, runner = make_engine(max_batch_size=8)
    names = "abcdef"
    for number, name in enumerate(names):
        engine.add(ask(name, TEXT, 10 + number, [20 + number], 30 + number, [9]))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
        assert engine._images is not None and engine._images.num_held <= MAX_HELD + 1
    for number, name in enumerate(names):
        parts = (TEXT, 10 + number, [20 + number], 30 + number, [9])
        assert tokens_of(outputs, name) == expected(*parts)
    assert max(runner.encoded_in_step) == 1
    assert sorted(runner.encoded) == [*range(10, 16), *range(30, 36)]


def test_text_beside_images_goes_on() -> None:
    engine, runner = make_engine()
    engine.add(ask("text", TEXT, count=40))
    engine.step()
    engine.add(ask("a", 1, TEXT))
    engine.add(ask("b", 2, TEXT))
    outputs = run(engine)
    assert tokens_of(outputs, "a") == expected(1, TEXT)
    assert tokens_of(outputs, "b") == expected(2, TEXT)
    with_images = [step for step in runner.encoded_in_step if step]
    assert len(with_images) == 2 and len(runner.steps) == 40


def test_equal_pages_of_different_images_are_not_shared() -> None:
    engine, runner = make_engine()
    first = engine.add(ask("a", TEXT * 6, 1, TEXT))
    run(engine)
    again = engine.add(ask("b", TEXT * 6, 1, TEXT))
    other = engine.add(ask("c", TEXT * 6, 2, TEXT))
    later = engine.add(ask("d", TEXT * 6, 1, TEXT, 3, [12]))
    outputs = run(engine)
    assert first.cached_tokens == 0
    # All whole pages but the one with the last token; of other images, those before it.
    assert again.cached_tokens == 32 and other.cached_tokens == 16 and later.cached_tokens == 32
    for name, parts in (("b", (1, TEXT)), ("c", (2, TEXT)), ("d", (1, TEXT, 3, [12]))):
        assert tokens_of(outputs, name) == expected(TEXT * 6, *parts)
    # The rest of the first image is computed once more, from the middle of its rows.
    assert sorted(runner.encoded) == [1, 1, 2, 3]


def test_prompt_may_end_in_an_image() -> None:
    engine, runner = make_engine()
    for name in "ab":
        engine.add(ask(name, TEXT * 4, 1))
        assert tokens_of(run(engine), name) == expected(TEXT * 4, 1)
    assert runner.encoded == [1, 1]


def test_continuations_share_an_image() -> None:
    engine, runner = make_engine(max_batch_size=4)
    engine.add(ask("a", TEXT, 1, TEXT, n=3))
    outputs = run(engine)
    for index in range(3):
        assert tokens_of(outputs, "a", index) == expected(TEXT, 1, TEXT)
    assert runner.encoded == [1]


def test_what_is_preempted_sees_its_image_again() -> None:
    # Two prompts of two pages fit, their answers do not.
    engine, runner = make_engine(num_pages=7, max_batch_size=4)
    engine = Engine(runner, has_prefix_cache=False)
    stats = [engine.add(ask(name, 1 + number, TEXT, count=50)) for number, name in enumerate("ab")]
    outputs = run(engine)
    assert sum(item.num_preemptions for item in stats) > 0
    for number, name in enumerate("ab"):
        assert tokens_of(outputs, name) == expected(1 + number, TEXT, count=50)
    assert len(runner.encoded) > 2


def test_images_are_forgotten_with_their_request() -> None:
    engine, _ = make_engine(prefill_chunk_size=8)
    engine.add(ask("a", 1, TEXT))
    engine.step()
    engine.abort("a")
    engine.add(ask("b", TEXT))
    run(engine)
    assert engine._images is not None and engine._images.num_held == 0
    engine.add(ask("c", 1, TEXT))
    assert tokens_of(run(engine), "c") == expected(1, TEXT)


def test_a_failing_encoder_ends_its_request_alone() -> None:
    engine, runner = make_engine()
    encode = runner.embed_image

    def fail(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        raise RuntimeError("no")

    runner.embed_image = fail  # type: ignore[method-assign]
    engine.add(ask("a", 1, TEXT))
    [output] = run(engine)
    assert isinstance(output.error, StepFailed)
    runner.embed_image = encode  # type: ignore[method-assign]
    engine.add(ask("b", 1, TEXT))
    assert tokens_of(run(engine), "b") == expected(1, TEXT)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((image(1, 10),), "an image begins at token 10 of a prompt of 29 tokens"),
        ((image(1, 0), image(2, 5)), "an image begins at token 5"),
        ((PromptImage(np.zeros((3, 5, 4), np.float32), 0, NUM_ROWS),), "has the shape"),
        ((PromptImage(np.zeros((3, SIZE, SIZE), np.float32), 0, 19),), "and 19 rows"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: tuple[PromptImage, ...], message: str) -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError, match=message):
        engine.check(Request("a", [TOKEN] * 29, SamplingParams(), images=images))


def test_models_of_text_take_no_images() -> None:
    engine = Engine(FakeRunner(context_window_size=256, num_pages=64))
    with pytest.raises(RequestError, match="this model takes no images"):
        engine.check(ask("a", 1, TEXT))


TILED = ImageInputs(TOKEN, SIZE, 6, WIDTH, max_views=5, tiling="sub_glb")


def tiled_image(number: int, first: int, across: int, down: int) -> PromptImage:
    """Return an image whose views are told apart by 10 * number and which of them it is."""
    views = 10 * number + np.arange(1 + across * down, dtype=np.float32)
    pixels = np.broadcast_to(views[:, None, None, None], (len(views), 3, SIZE, SIZE))
    order = arrange(TILED.tiling, TILED.num_rows, across, down)
    return PromptImage(pixels, first, len(order), order)


def seen_of(image: PromptImage) -> list[int]:
    assert image.order is not None
    views, rows = np.divmod(image.order, TILED.num_rows)
    return [
        int(1000 * image.pixels[view, 0, 0, 0] + row) for view, row in zip(views, rows, strict=True)
    ]


@pytest.mark.parametrize("chunk", [3, 64])
def test_steps_make_one_view_at_most_of_images_in_tiles(chunk: int) -> None:
    engine, runner = make_engine(prefill_chunk_size=chunk, inputs=TILED)
    engine.add(ask("text", TEXT, count=40))
    expected_of = {"text": expected(TEXT, count=40)}
    for name, numbers in (("a", (1, 2)), ("b", (3,)), ("c", (4,)), ("d", (5,))):
        tokens, seen, images = list(TEXT), list(TEXT), []
        for number in numbers:
            across, down = (2, 2) if number % 2 else (1, 3)
            image = tiled_image(number, len(tokens), across, down)
            images.append(image)
            tokens += [TOKEN] * image.num_rows + [9]
            seen += [*seen_of(image), 9]
        params = SamplingParams(temperature=0, max_tokens=2)
        engine.add(Request(name, tokens, params, images=tuple(images)))
        for _ in range(2):
            seen.append(next_token(seen))
        expected_of[name] = seen[-2:]
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
        engine.check_integrity()
        assert engine._images is not None and engine._images.num_held <= (MAX_HELD + 1) * 5
    for name, tokens in expected_of.items():
        assert tokens_of(outputs, name) == tokens
    assert max(runner.encoded_in_step) == 1
    # Every view once: the whole and four tiles, or three.
    assert sorted(runner.encoded) == [
        10 * number + view for number in range(1, 6) for view in range(5 if number % 2 else 4)
    ]


def test_images_of_equal_tiles_in_another_grid_are_not_shared() -> None:
    wide, high = tiled_image(0, 0, 2, 1), tiled_image(0, 0, 1, 2)
    assert np.array_equal(wide.pixels, high.pixels) and wide.key != high.key
    assert wide.key == tiled_image(0, 7, 2, 1).key


@pytest.mark.parametrize(
    "changes",
    [
        {"order": None, "num_rows": 6},
        {"num_rows": 12},
        {"order": np.arange(17, dtype=np.int32) + 20},
        {"order": np.arange(17, dtype=np.int32) - 1},
        {"pixels": np.zeros((6, 3, SIZE, SIZE), np.float32)},
        {"pixels": np.zeros((3, 3, SIZE, SIZE + 1), np.float32)},
    ],
)
def test_images_in_tiles_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    engine, _ = make_engine(inputs=TILED)
    image = tiled_image(1, 0, 2, 1)
    assert image.num_rows == 17
    wrong = dataclasses.replace(image, **changes)
    params = SamplingParams(temperature=0, max_tokens=2)
    with pytest.raises(RequestError, match="takes up to 5 views of"):
        engine.add(Request("a", [TOKEN] * 17 + TEXT, params, images=(wrong,)))
