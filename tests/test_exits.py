"""Commands end with one line and the exit code that a script can act on."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.exits import exit_codes


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such\n  model"), 2, "no such model"),
        (RunError("it does not build"), 1, "it does not build"),
        (OSError(errno.ENOSPC, "No space left", "slim.json"), 1, "slim.json: No space left; what was written before"),
        (
            PermissionError(errno.EACCES, "Permission denied", "slim.json"),
            1,
            "no permission for slim.json: Permission d",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), 2, "File name too long; give a shorter name"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_ends_with_a_line_and_a_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, exit_codes():
        raise error
    assert ended.value.code == code
    line = capsys.readouterr().err
    assert line.startswith("lowpass: ") and said in line and line.count("\n") == 1


def test_what_nobody_foresaw_ends_with_a_line_that_names_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOWPASS_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended, exit_codes():
        raise ZeroDivisionError("division\nby zero")
    assert ended.value.code == 1
    line = capsys.readouterr().err
    (kept,) = (tmp_path / "lowpass").iterdir()
    assert line.count("\n") == 1 and "ZeroDivisionError: division" in line and str(kept) in line
    assert "Traceback" not in line and 'raise ZeroDivisionError("division' in kept.read_text()


def test_a_name_that_the_terminal_lacks_is_said_in_escapes() -> None:
    code = "from lowpass.pipeline.base.exits import exit_codes\nwith exit_codes():\n    print('caf\\u00e9')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, r"caf\xe9")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWPASS_DEBUG", "1")
    with pytest.raises(ZeroDivisionError), exit_codes():
        raise ZeroDivisionError


def test_no_place_for_the_traceback_is_no_second_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file" / "none"))
    monkeypatch.delenv("LOWPASS_DEBUG", raising=False)
    with pytest.raises(SystemExit), exit_codes():
        raise ZeroDivisionError
    assert "LOWPASS_DEBUG=1 shows the traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_says_what_to_lower(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as ended, exit_codes():
        raise error
    assert ended.value.code == 1 and "lower --batch-size, or --memory-budget" in capsys.readouterr().err


def test_real_memory_runs_out_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import resource, sys, torch; from lowpass.pipeline.base.exits import exit_codes\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)\n"
        "with exit_codes(): torch.zeros(2**33)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.startswith("lowpass: out of memory") and done.stderr.count("\n") == 1


class _Broken(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        raise InputError("cannot read the image a.png: truncated")

    def __len__(self) -> int:
        return 4


def test_a_loaders_process_is_quoted_without_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_codes():
        list(DataLoader(_Broken(), num_workers=1))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "lowpass: cannot read the image a.png: truncated\n"
