"""The names that programs import, and `python -m mlc_llm.rest`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mlc_llm
from mlc_llm import rest
from mlc_llm.errors import OptionError


def test_the_documented_imports() -> None:
    from mlc_llm import AsyncMLCEngine, ChatModule, MLCEngine
    from mlc_llm.api import engine, sync
    from mlc_llm.callback import StreamToStdout
    from mlc_llm.engine.config import EngineConfig as Original
    from mlc_llm.serve import EngineConfig, PopenServer
    from mlc_llm.serve.config import EngineConfig as OfConfig

    assert AsyncMLCEngine is engine.AsyncMLCEngine and MLCEngine is sync.MLCEngine
    assert EngineConfig is OfConfig is Original
    assert ChatModule.__module__ == "mlc_llm.chat_module"
    assert PopenServer.__module__ == "mlc_llm.serve.popen_server"
    assert StreamToStdout.__module__ == "mlc_llm.callback"


@pytest.mark.parametrize("module", [mlc_llm, mlc_llm.serve])
def test_other_names_are_not_there(module: object) -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        assert module.Nothing  # type: ignore[attr-defined]


def test_importing_the_engine_loads_no_compiler_and_no_server() -> None:
    code = "import sys; from mlc_llm import MLCEngine; print('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & {"tvm", "torch", "fastapi", "uvicorn", "huggingface_hub"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_tracing": True}, "enable_tracing is not supported"),
        ({"overrides": {"no_such_key": 1}}, "unknown key 'no_such_key'"),
        ({"mode": "turbo"}, "mode must be one of"),
        ({"embedding_model_lib": "lib.so"}, "needs embedding_model"),
    ],
)
def test_options_are_checked_before_anything_is_made(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        mlc_llm.MLCEngine("no/such/model", **options)


def test_two_modes_are_refused() -> None:
    config = mlc_llm.serve.EngineConfig(mode="server")
    with pytest.raises(OptionError, match="mode is 'interactive', that of engine_config 'server'"):
        mlc_llm.AsyncMLCEngine("no/such/model", mode="interactive", engine_config=config)


def test_rest_is_a_door_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("mlc_llm.cli.main.main", lambda words: seen.append(list(words)) or 0)
    assert rest.main(["--model", "dist/m"]) == 0
    assert rest.main(["--model", "m", "--lib-path", "l.so", "--host", "::1", "--port", "9"]) == 0
    assert seen == [
        ["serve", "dist/m", "--device", "auto", "--host", "127.0.0.1", "--port", "8000"],
        [
            *("serve", "m", "--device", "auto", "--host", "::1", "--port", "9"),
            "--model-lib",
            "l.so",
        ],
    ]


def test_rest_wants_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        rest.main([])
    assert caught.value.code == 2
    assert "--model" in capsys.readouterr().err
