"""The `lowpass` command as a user sees it."""

import json
from typing import Any

import pytest

from lowpass.cli import main


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run with `--json`; what was printed must be one JSON object and nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--json"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return json.loads(printed.out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lowpass: ")
    return lines[0]
