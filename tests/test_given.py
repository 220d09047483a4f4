"""What is given on the command line counts, or is refused: nothing empty, and no option that would have no effect."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import refusal

import lowpass
from lowpass.cli import app
from lowpass.pipeline.base.errors import InputError


def takers() -> Iterator[tuple[str, Any]]:
    """Every parameter of every command that takes a value."""
    commands: Any = typer.main.get_command(app)
    for name, command in commands.commands.items():
        for parameter in command.params:
            if not getattr(parameter, "is_flag", False):
                yield name, parameter


def test_nothing_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as `--repository "$UNSET"`: an empty path would be the present folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("typer.core.TyperCommand.invoke", None)  # one that is let through is not run
    seen = set()
    for command, parameter in takers():
        option = parameter.opts[0] if parameter.param_type_name == "option" else None
        said = refusal(capsys, command, *([option] if option else []), "")
        wanted = option or str(parameter.metavar or parameter.name.upper()).strip("[].")
        assert said.startswith(f"lowpass: {wanted} is empty; give it a value"), (command, said)
        assert ("leave it out" in said) == (not parameter.required)
        seen.add((command, option))
    assert {("deploy", "--repository"), ("compress", "--out"), ("serve", None), ("predict", "--csv")} <= seen
    assert len(seen) > 100 and not list(tmp_path.iterdir())


def test_one_of_several_is_not_empty_either(capsys: pytest.CaptureFixture[str]) -> None:
    assert "IMAGE is empty" in refusal(capsys, "predict", "a.png", "", "--model", "digits")
    assert "--compare is empty" in refusal(capsys, "report", "run", "--compare", "other", "--compare", "")


def test_nor_is_a_path_of_the_python_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slim_run: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="out is empty"):
        lowpass.compress("digits_deit", "digits", "", target_macs=0.5)
    with pytest.raises(InputError, match="path is empty"):
        lowpass.Run("")
    with pytest.raises(InputError, match="repository is empty"):
        lowpass.Run(slim_run).deploy("")
    assert not list(tmp_path.iterdir())


WHOSE = ("--repository", "models", "--name", "digits")
COMPRESS = ("--model", "digits_deit", "--data", "digits", "--target-macs", "0.5")
ADDING = {
    "--backend": "python",
    "--precision": "fp16",
    "--labels": "labels.txt",
    "--instances": "1",
    "--threads": "2",
    "--queue-limit": "4",
    "--queue-timeout-ms": "5",
    "--accelerator": "cuda",
    "--decode": None,
    "--decode-bytes": "7",
    "--decode-pixels": "7",
}


@pytest.mark.parametrize(
    ("action", "takes_dense"),
    [
        (("--rollback",), True),
        (("--prune", "2"), True),
        (("--remove-decode",), True),
        (("--list",), False),
        (("--promote",), False),
        (("--abort",), False),
    ],
)
def test_what_adds_nothing_takes_no_option_of_what_does(
    action: tuple[str, ...], takes_dense: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "deploy", *WHOSE, *action, *(word for pair in ADDING.items() for word in pair if word))
    assert said == f"lowpass: {', '.join(ADDING)}: without effect beside {action[0]}; leave that out"
    for option, value in ADDING.items():
        said = refusal(capsys, "deploy", *WHOSE, *action, option, *([value] if value else []))
        assert f"{option}: without effect" in said
    said = refusal(capsys, "deploy", *WHOSE, *action, "--with-dense")
    assert ("--with-dense: without effect" in said) != takes_dense  # else there is no such model


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("deploy", "run", *WHOSE, "--decode-bytes", "7"), "--decode-bytes: for --decode alone"),
        (("deploy", "run", *WHOSE, "--decode-pixels", "7"), "--decode-pixels: for --decode alone"),
        (("deploy", "run", *WHOSE, "--canary", "5", "--with-dense"), "--with-dense: not for --canary"),
        (("deploy", "run", *WHOSE, "--canary", "5", "--decode"), "--decode: not for --canary"),
        (("deploy", "run", *WHOSE, "--accelerator", "cuda"), "--accelerator cuda is for --backend onnxruntime"),
        (("compress", *COMPRESS, "--epochs", "2"), "--epochs is of fine-tuning"),
        (("compress", *COMPRESS, "--batch", "2"), "--batch: for --target-latency"),
        (("compress", *COMPRESS, "--precision", "fp16"), "--precision: for --target-lat"),
        (("push", "run", "--to", "out", "--private", "--yes"), "--private, --yes: for an upload"),
    ],
)
def test_no_option_is_passed_over(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(capsys, *words)
