"""Commands end with one line and the exit code that a script can act on."""

import errno

import pytest

from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.exits import exit_codes


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such\n  model"), 2, "no such model"),
        (RunError("it does not build"), 1, "it does not build"),
        (OSError(errno.ENOSPC, "No space left", "slim.json"), 1, "slim.json: No space left; what was written before"),
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
