"""The `lowpass` command as a user sees it."""

import json
from typing import Any

import pytest

from lowpass.cli import main


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that succeeds says on standard output."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    said = capsys.readouterr()
    assert stop.value.code == 0, said.err
    return said.out


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run with `--json`; what was printed must be one JSON object and nothing else."""
    return json.loads(printed(capsys, *arguments, "--json"))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lowpass: ")
    return lines[0]
