"""Holds the architecture: who may import whom, what is imported when, and how long a file may be.

The picture is docs/architecture.md; here it is a table. Imports inside functions count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlc_llm"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

BASE = {"errors", "artifact", "device", "gpus", "home", "opencl"}
ENGINE_SIDE = {"text", "runtime", "engine", "bench", "serve"}
COMPILER_SIDE = {"kernels", "nn", "models", "quantization", "weights", "compiler"}
EVERYTHING = BASE | ENGINE_SIDE | COMPILER_SIDE | {"images", "prepare", "api", "cli"}

# Layer -> the layers it may import, beside itself.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"api", "chat_module", "errors"},
    "__main__": {"cli"},
    "errors": set(),
    "artifact": {"errors"},
    "home": set(),
    "opencl": {"errors"},
    "gpus": {"errors", "opencl"},
    "device": {"errors", "gpus"},
    "images": BASE,
    # engine half
    "text": BASE | {"images"},
    "runtime": BASE | {"images"},
    "engine": BASE | {"images", "text", "runtime"},
    "bench": BASE | {"runtime", "engine"},
    "serve": BASE | {"images", "text", "runtime", "engine"},
    # compiler half
    "kernels": BASE,
    "nn": BASE | {"kernels"},
    "models": BASE | {"images", "kernels", "nn"},
    "quantization": BASE | {"kernels", "nn", "models"},
    "weights": BASE | {"models", "quantization"},
    "compiler": BASE | {"images", "kernels", "nn", "models", "quantization"},
    # where the halves meet
    "prepare": BASE | COMPILER_SIDE | {"images", "text"},
    "api": EVERYTHING - {"cli"},
    "cli": EVERYTHING,
    # doors that older programs use
    "callback": {"errors"},
    "chat_module": {"api", "callback", "errors"},
    "rest": {"cli", "errors"},
}
# Torch is for the reference scripts only; the engine half lives on tvm_ffi alone.
FORBIDDEN_EVERYWHERE = {"torch", "transformers"}
FORBIDDEN_IN_ENGINE = {"tvm", "gguf"}


def layer_of(path: Path) -> str:
    """Return the first part of a file's place in the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the full name of everything a file imports, at any depth."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            yield node.module
            # `from mlc_llm import x` may mean the module x.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_layers(path: Path) -> set[str]:
    """Return the layers of our own that a file imports."""
    layers = set()
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "mlc_llm" and len(parts) > 1:
            layers.add(parts[1])
    return (layers & set(ALLOWED)) - {layer_of(path)}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_file_belongs_to_a_layer() -> None:
    assert FILES
    unknown = [relative(path) for path in FILES if layer_of(path) not in ALLOWED]
    assert not unknown, f"name the layer of {unknown} here and in docs/architecture.md"


@pytest.mark.parametrize("layer", ALLOWED)
def test_layer_imports_only_what_lies_below(layer: str) -> None:
    wrong = [
        f"{relative(path)} imports {other}"
        for path in FILES
        if layer_of(path) == layer
        for other in sorted(imported_layers(path) - ALLOWED[layer])
    ]
    assert not wrong


def test_table_has_no_cycles() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {
            layer for layer in ALLOWED if layer not in done and ALLOWED[layer] - {layer} <= done
        }
        assert ready, f"a cycle among {sorted(set(ALLOWED) - done)}"
        done |= ready


def test_halves_do_not_know_each_other() -> None:
    for layer in ENGINE_SIDE:
        assert not ALLOWED[layer] & (COMPILER_SIDE | {"prepare"})
    for layer in COMPILER_SIDE:
        assert not ALLOWED[layer] & (ENGINE_SIDE | {"prepare"})


def test_foreign_packages_stay_where_they_belong() -> None:
    wrong = []
    for path in FILES:
        forbidden = set(FORBIDDEN_EVERYWHERE)
        if layer_of(path) in ENGINE_SIDE | BASE | {"api", "images"}:
            forbidden |= FORBIDDEN_IN_ENGINE
        roots = {name.split(".")[0] for name in imported_modules(path)}
        wrong += [f"{relative(path)} imports {name}" for name in sorted(roots & forbidden)]
    assert not wrong


def test_files_are_short() -> None:
    programs = [
        path for name in ("benchmarks", "scripts", "tests") for path in (ROOT / name).rglob("*.py")
    ]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (*FILES, *programs)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, "split by duty, never by part"


def test_files_say_what_they_are() -> None:
    undocumented = [relative(path) for path in FILES if not ast.get_docstring(parse(path))]
    vague = [
        relative(path)
        for path in PACKAGE.rglob("*")
        if path.stem in {"utils", "util", "common", "helpers", "misc"}
    ]
    assert not undocumented
    assert not vague


def reads_environment(tree: ast.Module) -> Iterator[int]:
    """Yield the lines that use the environment; emptying it for a child process is no reading."""
    cleared = {
        id(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "clear"
    }
    names = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "os" and node.attr in names and id(node) not in cleared:
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            if any(alias.name in names for alias in node.names):
                yield node.lineno


def test_environment_is_read_in_few_places() -> None:
    wrong = [
        f"{relative(path)}:{line}"
        for path in FILES
        if layer_of(path) not in ("device", "cli")
        for line in reads_environment(parse(path))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os\nos.environ['A']", [2]),
        ("import os\nos.getenv('A')", [2]),
        ("from os import environ", [1]),
        ("import os\nos.environ.clear()", []),
        ("def f(environ):\n    return environ['A']", []),
    ],
)
def test_reading_the_environment_is_found(code: str, expected: list[int]) -> None:
    assert list(reads_environment(ast.parse(code))) == expected


def loaded_by(statement: str) -> set[str]:
    """Return the modules a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(run.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_by("import mlc_llm")
    assert "mlc_llm" in loaded
    assert not loaded & {"numpy", "tvm", "tvm_ffi", "huggingface_hub", "rich", "typer"}


def test_preparing_what_is_there_loads_no_compiler() -> None:
    loaded = loaded_by(
        "import mlc_llm.prepare.resolve, mlc_llm.prepare.jit, mlc_llm.prepare.download, "
        "mlc_llm.compiler.target"
    )
    heavy = {"tvm", "tvm_ffi", "huggingface_hub", "filelock", "gguf", "rich", "tokenizers"}
    assert not loaded & heavy
    halves = {name.split(".")[1] for name in loaded if name.startswith("mlc_llm.")}
    assert not halves & (COMPILER_SIDE - {"compiler"})
    assert "mlc_llm.compiler.compile" not in loaded
