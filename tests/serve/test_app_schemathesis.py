"""schemathesis asks what /openapi.json allows and forbids; runs where its command is installed.

It brings a pytest plugin, so it belongs in an environment of its own, as `pipx install` makes one.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest
from served import served

from mlc_llm.serve.options import AppOptions

COMMAND = shutil.which("schemathesis")


@pytest.mark.skipif(COMMAND is None, reason="the command schemathesis is not installed")
@pytest.mark.parametrize("key", [None, "sk-1"])
def test_no_answer_is_undocumented(key: str | None) -> None:
    assert COMMAND is not None
    command = [COMMAND, "run", "--max-examples", "10", "--seed", "1"]
    # Some rules, such as "either prompt or messages", cannot be said in a schema.
    command += ["--exclude-checks", "positive_data_acceptance"]
    if key is not None:
        command += ["--header", f"Authorization: Bearer {key}"]
    with served(context=64, options=AppOptions(api_key=key, enable_debug=True)) as running:
        run = subprocess.run(
            [*command, f"{running.url}/openapi.json"], capture_output=True, text=True, timeout=200
        )
        assert run.returncode == 0, run.stdout[-5000:]
    assert " passed" in run.stdout
