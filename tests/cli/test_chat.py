"""The `chat` command from its options to its answers, on a fake session."""

import io
import os
from pathlib import Path
from typing import Any

import pytest

import mlc_llm.engine.session
import mlc_llm.prepare.jit
import mlc_llm.prepare.resolve
from mlc_llm.cli.main import main
from mlc_llm.device import host_cpu
from mlc_llm.errors import ContextTooLong, ModelNotFound
from mlc_llm.text.events import Reasoning

from .fakes import FakeSession

# A CPU that this machine is not.
_OTHER_CPU = "haswell" if host_cpu().arch == "aarch64" else "neoverse-n1"


class Chat:
    """Runs `mlc_llm chat` with everything below the command line replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.session = FakeSession([["The capital ", "is Paris."]])
        self.calls: dict[str, dict[str, Any]] = {}
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("MLC_LLM_HOME", str(tmp_path / "home"))
        for name in ("MLC_JIT_POLICY", "MLC_DOWNLOAD_CACHE_POLICY", "HF_TOKEN", "HF_ENDPOINT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(mlc_llm.prepare.resolve, "prepare_artifact", self._prepare_artifact)
        monkeypatch.setattr(mlc_llm.prepare.jit, "prepare_library", self._prepare_library)
        monkeypatch.setattr(mlc_llm.engine.session, "ChatSession", self)

    def run(self, *arguments: str, stdin: bytes | None = None) -> int:
        """Run the command; `stdin` is piped in."""
        text = io.TextIOWrapper(io.BytesIO(stdin or b""), encoding="utf-8")
        self._monkeypatch.setattr("sys.stdin", text)
        return main(["chat", *arguments])

    def _prepare_artifact(self, model: str | None, **options: Any) -> Path:
        self.calls["artifact"] = {"model": model, **options}
        if model == "missing":
            raise ModelNotFound("missing does not exist")
        return Path("artifact")

    def _prepare_library(self, artifact: Path, **options: Any) -> Path:
        self.calls["library"] = {"artifact": artifact, **options}
        return Path("library")

    def open(self, artifact: Path, library: Path, **options: Any) -> FakeSession:
        """Stand for ChatSession.open."""
        self.calls["open"] = {"artifact": artifact, "library": library, **options}
        return self.session


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Chat:
    return Chat(monkeypatch, tmp_path)


def test_an_adapter_is_passed_on(chat: Chat) -> None:
    assert chat.run("model", "--prompt", "Hi", "--lora-adapter", "adapter") == 0
    assert chat.calls["artifact"]["lora_adapter"] == Path("adapter")


def test_a_prompt_is_answered_once_on_stdout(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat.run("model", "--prompt", "What is the capital of France?") == 0
    captured = capsys.readouterr()
    assert captured.out == "The capital is Paris.\n"
    assert captured.err == ""
    expected = [{"role": "user", "content": "What is the capital of France?"}]
    assert chat.session.prompts == [expected]
    assert chat.session.is_closed


@pytest.mark.parametrize(
    ("options", "streams", "is_shown"),
    [
        ([], (), False),
        ([], ("stdout",), False),
        ([], ("stderr",), False),
        ([], ("stdout", "stderr"), True),
        (["--thoughts"], (), True),
        (["--no-thoughts"], ("stdout", "stderr"), False),
    ],
)
def test_thoughts_are_printed_beside_the_answer_on_terminals_and_if_asked_for(  # type: ignore[no-untyped-def]
    chat: Chat, monkeypatch, capsys, options: list[str], streams: tuple[str, ...], is_shown: bool
) -> None:
    for name in streams:
        monkeypatch.setattr(f"sys.{name}.isatty", lambda: True)
    chat.session = FakeSession([[Reasoning("A city."), "Paris."]])
    assert chat.run("model", "--prompt", "Where?", *options) == 0
    captured = capsys.readouterr()
    assert captured.out == "Paris.\n"
    assert ("A city." in captured.err) == is_shown
    assert is_shown or captured.err == ""


def test_piped_input_is_the_prompt(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.run("model", stdin="zwei\nZeilen ü\n".encode()) == 0
    assert capsys.readouterr().out == "The capital is Paris.\n"
    assert chat.session.prompts[0][0]["content"] == "zwei\nZeilen ü\n"


def test_no_model_is_left_to_prepare(chat: Chat) -> None:
    assert chat.run("--prompt", "hi") == 0
    assert chat.calls["artifact"]["model"] is None
    assert chat.calls["artifact"]["quantization"] is None
    params = chat.session.params[0]
    assert (params.temperature, params.frequency_penalty, params.max_tokens) == (0, 0.3, 512)
    assert chat.session.prompts[0][0]["role"] == "system"


def test_a_named_model_keeps_its_own_sampling_settings(chat: Chat) -> None:
    assert chat.run("model", "--prompt", "hi") == 0
    params = chat.session.params[0]
    assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 1.0, None)


def test_options_reach_their_places(chat: Chat) -> None:
    arguments = (
        "model --device cpu:0 --quantization q0f32 --overrides context_window_size=99;opt=O1 "
        "--system Brief. --max-tokens 5 --temperature 0 --top-p 0.5 --seed 7 --prompt hi"
    )
    assert chat.run(*arguments.split()) == 0
    assert chat.calls["artifact"]["quantization"] == "q0f32"
    library = chat.calls["library"]
    assert (library["device"], library["opt"]) == ("cpu:0", "O1")
    assert library["overrides"] == {"context_window_size": 99}
    assert chat.calls["open"]["overrides"] == {"context_window_size": 99}
    assert chat.calls["open"]["device"] == "cpu:0"
    assert chat.calls["open"]["library"] == Path("library")
    assert chat.session.prompts[0][0] == {"role": "system", "content": "Brief."}
    params = chat.session.params[0]
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (5, 0, 0.5, 7)


def test_threads_are_set_before_the_runtime_is_loaded(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "7")
    assert chat.run("model", "--threads", "1", "--prompt", "hi") == 0
    assert os.environ["TVM_NUM_THREADS"] == "1"


def test_a_given_library_is_used_and_none_is_made(chat: Chat, tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.touch()
    assert chat.run("model", "--model-lib", str(library), "--prompt", "hi") == 0
    assert chat.calls["open"]["library"] == library
    assert "library" not in chat.calls


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing", "--prompt", "x"], 1, "missing does not exist"),
        (["m", "--prompt", " "], 2, "--prompt is empty"),
        (["m", "--prompt", "a\udcff"], 2, "--prompt is not valid UTF-8"),
        (["m", "--prompt", "x", "--system", ""], 2, "--system is empty"),
        (["m"], 2, "the piped input is empty"),
        (["m", "--prompt", "x", "--overrides", "size=1"], 2, "unknown key 'size'"),
        (["m", "--prompt", "x", "--overrides", "opt=O1", "--opt", "O2"], 2, "use one"),
        (["m", "--prompt", "x", "--model-lib", "no.so"], 1, "--model-lib no.so does not exist"),
        (["m", "--prompt", "x", "--model-lib", "no.so", "--opt", "O2"], 2, "--opt has no effect"),
        (["m", "--prompt", "x", "--device", "rocm"], 1, "no runtime for AMD's ROCm"),
        (["m", "--prompt", "x", "--device", "toaster"], 2, "'toaster' is not known"),
        (["m", "--prompt", "x", "--device", "znver9"], 2, "'znver9' is not known"),
        (["m", "--prompt", "x", "--device", _OTHER_CPU], 1, f"'{_OTHER_CPU}' is an"),
        (["m", "--prompt", "x", "--opt", "O9"], 2, "'O9' is not known"),
        (["m", "--prompt", "x", "--temperature", "-1"], 2, "temperature"),
        (["m", "--prompt", "x", "--temperature", "nan"], 2, "temperature"),
        (["m", "--prompt", "x", "--top-p", "2"], 2, "top_p"),
        (["m", "--prompt", "x", "--max-tokens", "0"], 2, "max_tokens"),
        (["m", "--prompt", "x", "--threads", "0"], 2, "0 threads were asked for"),
        (["m", "--prompt", "x", "--threads", "99999"], 2, "99999 threads were asked for"),
    ],
)
def test_mistakes_are_explained(  # type: ignore[no-untyped-def]
    chat: Chat, capsys, arguments: list[str], code: int, words: str
) -> None:
    assert chat.run(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert "open" not in chat.calls
    assert "missing" in arguments or not chat.calls


def test_a_bad_policy_is_named(chat: Chat, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("MLC_JIT_POLICY", "MAYBE")
    assert chat.run("m", "--prompt", "x") == 2
    assert "MLC_JIT_POLICY is 'MAYBE'" in capsys.readouterr().err


def test_piped_bytes_that_are_no_text_are_refused(chat: Chat, capsys) -> None:  # type: ignore[no-untyped-def]
    assert chat.run("m", stdin=b"\xff\xfe\x00") == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_fails(chat: Chat, capsys) -> None:  # type: ignore[no-untyped-def]
    chat.session = FakeSession([[ContextTooLong("prompt has 9,120 tokens, the model allows 64")]])
    assert chat.run("m", "--prompt", "x") == 1
    captured = capsys.readouterr()
    assert captured.err == "error: prompt has 9,120 tokens, the model allows 64\n"
    assert captured.out == ""


def test_ctrl_c_ends_a_single_answer(chat: Chat, capsys) -> None:  # type: ignore[no-untyped-def]
    chat.session = FakeSession([["so far", KeyboardInterrupt()]])
    assert chat.run("m", "--prompt", "x") == 130
    assert capsys.readouterr().out == "so far\n"
    assert chat.session.is_closed


def test_a_terminal_opens_the_dialogue(chat: Chat, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    lines = iter(["hello", "/exit"])
    monkeypatch.setattr("mlc_llm.cli.terminal.prompt_reader", lambda: lambda: next(lines))
    monkeypatch.setattr("sys.stdin", Terminal(io.BytesIO()))
    assert main(["chat", "model"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "The capital is Paris.\n"
    assert "/help lists the commands" in captured.err
    assert chat.session.is_closed
