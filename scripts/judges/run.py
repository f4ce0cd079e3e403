#!/usr/bin/env python3
"""Let clients and judges of OpenAI's API that others have written try a server.

    python scripts/judges/run.py [--url URL --model NAME] [JUDGE ...]

Without --url a server of the demo model is started. Each judge is installed, at a fixed version,
into a temporary environment of its own. What a judge finds missing must be in MISSES with the
reason; anything else, and a miss that is none any more, fails the run. A judge that cannot be
installed is skipped and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALL_TIMEOUT_S = 300
RUN_TIMEOUT_S = 900
# What is asked is bounded, so that requests that want the whole context end.
SERVER = (
    "serve",
    "--port",
    "0",
    "--request-timeout",
    "20",
    "--overrides",
    "context_window_size=2048",
)

# Judge and check -> why the server does not do it.
MISSES = {
    ("llm-comply", "Image Input"): "the model reads text only, images are refused by name",
    ("llm-comply", "Error Handling"): "it leaves out `model`, which is optional here as in MLC LLM",
}

# The checks of a judge, and what was wrong where one failed.
Results = dict[str, str | None]


class Unavailable(Exception):
    """A judge cannot be installed here."""


@dataclass(frozen=True)
class Judge:
    """A program that tries a server: what to install, how to ask it, how to read its answer.

    command: its words may have {url} (with /v1), {base} (without), {model} and {here}.
    """

    packages: tuple[str, ...]
    command: tuple[str, ...]
    read: Callable[[str, int], Results]
    is_npm: bool = False


def read_lines(output: str, _: int) -> Results:
    """Read what the scripts in this directory print."""
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {entry["check"]: entry["problem"] for entry in found}


def read_llm_comply(output: str, _: int) -> Results:
    """Read llm-comply's JSON; checks that it skips do not count."""
    results = json.loads(output[output.index("{") :])["results"]
    return {
        result["name"]: None if result["status"] == "passed" else "; ".join(result["errors"][:2])
        for result in results
        if result["status"] != "skipped"
    }


def read_compatcanary(output: str, _: int) -> Results:
    """Read compatcanary's JSON."""
    report = json.loads(output[output.index("{") :])
    return {
        check["name"]: None if check["status"] == "pass" else str(check.get("summary"))
        for check in report["results"]
    }


def read_schemathesis(output: str, code: int) -> Results:
    """Read the end of what schemathesis prints; its exit code says whether it found something."""
    is_good = code == 0 and " passed" in output
    return {"no 5xx, nothing undocumented": None if is_good else output[-3000:] or "no output"}


JUDGES = {
    "openai-npm": Judge(
        ("openai@6.49.0",), ("node", "openai_npm.mjs", "{url}", "{model}"), read_lines, is_npm=True
    ),
    "langchain": Judge(
        ("langchain-openai==1.7.3",),
        ("python", "{here}/langchain_client.py", "{url}", "{model}"),
        read_lines,
    ),
    "litellm": Judge(
        ("litellm==1.106.2",),
        ("python", "{here}/litellm_client.py", "{url}", "{model}"),
        read_lines,
    ),
    "schemathesis": Judge(
        ("schemathesis==4.32.5",),
        (
            *("schemathesis", "run", "{base}/openapi.json", "--max-examples", "5", "--seed", "1"),
            # The other phases take long where a model answers: tests/serve has them without one.
            *("--phases", "fuzzing"),
            # Some rules, such as "either prompt or messages", cannot be said in a schema.
            *("--exclude-checks", "positive_data_acceptance", "--request-timeout", "60"),
        ),
        read_schemathesis,
    ),
    "llm-comply": Judge(
        ("llm-comply==0.5.0",),
        (
            "llm-comply",
            "--json",
            "--format",
            "openai-chat",
            "-u",
            "{url}",
            "-k",
            "x",
            "-m",
            "{model}",
        ),
        read_llm_comply,
    ),
    "compatcanary": Judge(
        ("compatcanary@0.2.2",),
        (
            *("node_modules/.bin/compatcanary", "scan", "--base-url", "{url}", "--api-key", "x"),
            *("--model", "{model}", "--profile", "chat", "--format", "json"),
        ),
        read_compatcanary,
        is_npm=True,
    ),
}


def install(judge: Judge, home: Path) -> dict[str, str]:
    """Install a judge below `home`; return the environment to run it in. Raises Unavailable."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if judge.is_npm:
        npm = shutil.which("npm")
        if npm is None or shutil.which("node") is None:
            raise Unavailable("there is no npm")
        for script in HERE.glob("*.mjs"):
            shutil.copy(script, home)
        commands = [[npm, "install", "--no-audit", "--no-fund", "--silent", *judge.packages]]
    else:
        python = home / "environment" / "bin" / "python"
        environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        commands = [
            [sys.executable, "-m", "venv", str(home / "environment")],
            [*pip, *judge.packages],
        ]
    for command in commands:
        try:
            done = subprocess.run(
                command, cwd=home, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"no answer for {INSTALL_TIMEOUT_S} s of {command[:4]}") from None
        if done.returncode != 0:
            raise Unavailable(f"{' '.join(judge.packages)}: {done.stderr.strip()[-300:]}")
    return environment


def ask(judge: Judge, url: str, model: str) -> Results:
    """Install and run a judge. Raises Unavailable."""
    with tempfile.TemporaryDirectory(prefix="judge-") as home:
        environment = install(judge, Path(home))
        places = {"base": url, "url": f"{url}/v1", "model": model, "here": str(HERE)}
        command = [word.format(**places) for word in judge.command]
        try:
            done = subprocess.run(
                [shutil.which(command[0], path=environment["PATH"]) or command[0], *command[1:]],
                cwd=home,
                env=environment,
                capture_output=True,
                text=True,
                timeout=RUN_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return {"an end": f"it was not done after {RUN_TIMEOUT_S} s"}
        try:
            results = judge.read(done.stdout, done.returncode)
        except (ValueError, KeyError) as error:
            return {"a readable answer": f"{error}: {(done.stdout + done.stderr)[-1000:]}"}
        return results or {"an answer": (done.stdout + done.stderr)[-1000:]}


def report(name: str, results: Results) -> list[str]:
    """Print a judge's results; return what is wrong and not explained."""
    num_passed = sum(problem is None for problem in results.values())
    print(f"{name:13} {num_passed} of {len(results)}")
    problems = []
    for check, problem in results.items():
        reason = MISSES.get((name, check))
        if problem is not None:
            print(f"    {check}: {reason or problem}")
            if reason is None:
                problems.append(f"{name}: {check}")
        elif reason is not None:
            problems.append(f"{name}: {check} passes now, so take it out of MISSES")
    return problems


@contextmanager
def serving() -> Iterator[str]:
    """Serve the demo model; yield where."""
    server = subprocess.Popen(
        [sys.executable, "-m", "mlc_llm", *SERVER], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        url = next((line.split()[-1] for line in server.stdout if "Listening" in line), None)
        if url is None:
            sys.exit("error: the server did not start")
        yield url
        server.terminate()
        server.wait(60)
    finally:
        server.kill()
        server.wait()


def main() -> int:
    """Ask all judges, or those that are named; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("judges", nargs="*", metavar="JUDGE", help=", ".join(JUDGES))
    parser.add_argument("--url", help="of a server that runs, without /v1")
    parser.add_argument("--model", default="demo", help="its name there (demo)")
    arguments = parser.parse_args()
    names = arguments.judges or list(JUDGES)
    if unknown := [name for name in names if name not in JUDGES]:
        parser.error(f"there is no judge {unknown[0]!r}; there are {', '.join(JUDGES)}")
    if arguments.url is None:
        with serving() as url:
            problems = ask_all(names, url, arguments.model)
    else:
        problems = ask_all(names, arguments.url.rstrip("/"), arguments.model)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def ask_all(names: list[str], url: str, model: str) -> list[str]:
    """Ask judges one after another; return what is wrong and not explained."""
    problems = []
    for name in names:
        start = time.monotonic()
        try:
            problems += report(name, ask(JUDGES[name], url, model))
            print(f"    in {time.monotonic() - start:.0f} s", flush=True)
        except Unavailable as error:
            print(f"{name:13} skipped: {error}", flush=True)
    return problems


if __name__ == "__main__":
    sys.exit(main())
