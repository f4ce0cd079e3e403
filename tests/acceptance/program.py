"""The program as a user runs it: processes of its own, with a cache of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Nobody listens there: what works with it needs no network.
NOWHERE = "http://127.0.0.1:9"
PROGRAM = (sys.executable, "-m", "mlc_llm")
TIMEOUT_S = 240


@dataclass(frozen=True)
class Program:
    """The command line with a cache directory, away from the settings of who runs the tests."""

    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the process."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MLC_", "HF_", "TVM_")) and not name.lower().endswith("_proxy")
        }
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {
            **kept,
            "PYTHONPATH": python_path,
            "MLC_LLM_HOME": str(self.home),
            "HF_ENDPOINT": NOWHERE,
        }

    def run(self, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one command line to its end."""
        return subprocess.run(
            [*PROGRAM, *map(str, arguments)],
            **{
                "env": self.environment,
                "stdin": subprocess.DEVNULL,
                "capture_output": True,
                "text": True,
                "timeout": TIMEOUT_S,
                **options,
            },
        )

    def must_run(self, *arguments: str | Path, **options: Any) -> str:
        """Run one command line that has to succeed; return its standard output."""
        done = self.run(*arguments, **options)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    def start(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start one command line."""
        command = [*PROGRAM, *map(str, arguments)]
        return subprocess.Popen(command, **{"env": self.environment, **options})

    def refuse(self, *arguments: str | Path, words: str, code: int = 1, **options: Any) -> None:
        """Check that a command line ends with one message that names the problem."""
        done = self.run(*arguments, **options)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        message = done.stderr.splitlines()[-1]
        assert message.startswith("error: ")
        assert words in message
        assert "Traceback" not in done.stderr
