"""How every command talks and ends: progress and log on standard error; what went wrong as one line with an exit code,
and never as a traceback."""

import errno
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from lowpass.pipeline.base.errors import ElsewhereError, InputError, RunError
from lowpass.pipeline.base.files import cache_dir
from lowpass.pipeline.base.progress import show_on_console

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
REFUSED = (errno.EACCES, errno.EPERM)
SAYING_S = 1.0  # a launcher ends all processes once one goes: the one that has to say why is to have said it
DEBUG = "LOWPASS_DEBUG"
IN_A_WORKER = "Original Traceback"  # how a data loader's process hands on what it met


@contextmanager
def exit_codes() -> Iterator[None]:
    """0 done, 2 bad input, 1 failure, 130 interrupted. What nobody foresaw is a failure as well: its traceback goes to
    a file that the line names, or to standard error with `LOWPASS_DEBUG=1`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A class or a file may have a name that the terminal's encoding lacks: said in escapes, not a failure.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with show_on_console():
            yield
    except ElsewhereError as error:
        time.sleep(SAYING_S)
        raise SystemExit(error.code) from None
    except InputError as error:
        _fail(_message(error), 2)
    except RunError as error:
        _fail(_message(error), 1)
    except OSError as error:
        _fail(_why(error), 2 if error.errno == errno.ENAMETOOLONG else 1)  # a name comes from whoever gave it
    except KeyboardInterrupt:
        _fail("interrupted; --resume goes on with a search or a training", 130)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        if _out_of_memory(error):
            _fail(
                f"out of memory ({_first_line(error)}); lower --batch-size, or --memory-budget for the search's "
                f"activations{_kept(error)}",
                1,
            )
        _fail(f"this should not happen: {type(error).__name__}: {_first_line(error)}{_kept(error)}", 1)


def _message(error: Exception) -> str:
    """What was said, without the traceback that a data loader's process wraps around it."""
    text = str(error)
    if IN_A_WORKER not in text:
        return text
    return text.strip().splitlines()[-1].partition(f"{type(error).__name__}: ")[2] or text


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def _out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def _kept(error: Exception) -> str:
    """Keep the traceback in a file; what to say of it."""
    text = "".join(traceback.format_exception(error))
    name = f"error-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    for folder in (cache_dir(), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        except OSError:
            continue
        return f" (traceback: {folder / name}; {DEBUG}=1 shows it)"
    return f" ({DEBUG}=1 shows the traceback)"


def _why(error: OSError) -> str:
    """An operating system's refusal with the file and the remedy."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno in UNWRITABLE:
        return f"cannot write {what}; what was written before is whole: make room, then go on (a search: with --resume)"
    if error.errno in REFUSED:
        return f"no permission for {what}; have it opened to you by its owner, or give another place"
    if error.errno == errno.ENAMETOOLONG:
        return f"{what}; give a shorter name or path"
    return what


def _fail(message: str, code: int) -> None:
    print(f"lowpass: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
