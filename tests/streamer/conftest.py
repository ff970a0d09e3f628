"""The command line, run in this process."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from streamer.cli import main

# Most tests are not about plans: none is built beside them, and what runs does not depend on what ran before.
os.environ.setdefault("STREAMER__ENGINE__BACKEND", "onnxruntime")


@pytest.fixture
def streamer(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command and return its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run
