"""How every command ends badly: one line that says what is wrong, and an exit code; never a traceback."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lowpass.pipeline.base.errors import InputError, RunError


@contextmanager
def exit_codes() -> Iterator[None]:
    """0 done, 2 bad input, 1 failure, 130 interrupted."""
    try:
        yield
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(_why(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; --resume goes on with a search", 130)


def _why(error: OSError) -> str:
    """An operating system's refusal with the file and the remedy."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write {what}; what was written before is whole: make room, then go on (a search: with --resume)"
    return what


def _fail(message: str, code: int) -> None:
    print(f"lowpass: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
