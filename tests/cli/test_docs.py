"""Every command line in README and docs must parse, and docs/cli.md must be up to date."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mlc_llm.cli.main import build_app
from mlc_llm.quantization.schemes import SCHEMES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SHELLS = ("", "sh", "bash", "shell", "console")
_INLINE = re.compile(r"`((?:mlc_llm|make) [^`\n]+)`")


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the words of each `mlc_llm` and `make` command in shell blocks."""
    for language, block in _BLOCK.findall(text):
        if language not in _SHELLS:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            for stage in split_at(words, {"|", "&&", ";"}):
                command = stage
                while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                    command = command[1:]
                if command[:3] in (["python", "-m", "mlc_llm"], ["python3", "-m", "mlc_llm"]):
                    command = command[2:]
                if command[:1] in (["mlc_llm"], ["make"]):
                    yield command


def split_at(words: list[str], separators: set[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word in separators:
            yield part
            part = []
        else:
            part.append(word)
    yield part


def documented() -> list[Any]:
    found = []
    for page in PAGES:
        for words in commands_in(page.read_text(encoding="utf-8")):
            found.append(pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}"))
    return found


@pytest.fixture(scope="module")
def group() -> Any:
    return typer.main.get_command(build_app())


def make_targets() -> set[str]:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    return set(phony[1].split())


def check_target(words: list[str]) -> None:
    targets = [word for word in words[1:] if "=" not in word]
    assert targets and set(targets) <= make_targets()


@pytest.mark.parametrize("words", documented())
def test_a_documented_command_parses(words: list[str], group: Any) -> None:
    if words[0] == "make":
        check_target(words)
        return
    if words[1].startswith("-"):
        group.make_context("mlc_llm", words[1:], resilient_parsing=True)
        return
    # A few names are two words.
    length = 3 if " ".join(words[1:3]) in group.commands else 2
    name = " ".join(words[1:length])
    context = group.commands[name].make_context(name, words[length:])
    assert context.params


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_in_sentences_exist(page: Path, group: Any) -> None:
    for text in _INLINE.findall(page.read_text(encoding="utf-8")):
        words = shlex.split(text)
        if words[0] == "make":
            check_target(words)
        elif not words[1].startswith("-"):
            assert words[1] in group.commands, text


def test_the_readme_shows_every_command(group: Any) -> None:
    shown = {words[1] for words in commands_in(PAGES[0].read_text()) if words[0] == "mlc_llm"}
    assert shown >= {"chat", "gen_config", "convert_weight", "compile", "doctor"}


def test_the_readme_lists_every_quantization() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)`", text.partition("**Quantizations**")[2].partition("\n- ")[0])
    assert sorted(listed) == sorted(SCHEMES)


def test_an_unknown_option_would_be_found(group: Any) -> None:
    command = group.commands["chat"]
    with pytest.raises(typer.BadParameter.__bases__[0], match="--modle-lib"):
        command.make_context("chat", ["model", "--modle-lib", "x.so"])


def test_the_command_page_is_up_to_date() -> None:
    script = ROOT / "scripts" / "cli_docs.py"
    spec = importlib.util.spec_from_file_location("cli_docs", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == module.render_page(), "run `python scripts/cli_docs.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
