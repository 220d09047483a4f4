"""Files that are written whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, of which `path` becomes the content at the end: written beside it, flushed to disk, then
    renamed. A kill or an error leaves the old file or the new one, never a part.

    Raises:
        OSError: the folder is read-only or full; the old file, if any, is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException as error:
        with suppress(OSError):  # such as a disk that has turned read-only
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say what it was full for
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, as `replacing` does.

    Raises:
        OSError: the folder is read-only or full; the old file, if any, is untouched.
    """
    with replacing(path) as file:
        file.write(content)


def remove_parts(directory: Path) -> None:
    """Clear away what a kill left half-written in `directory`."""
    for part in directory.glob(f".*{PART}"):
        part.unlink()


def write_text(path: Path, content: str) -> None:
    """`write_bytes` of UTF-8 text; what is no Unicode, as in a file's name, is written out."""
    write_bytes(path, content.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """Where what may be made again is kept: `$XDG_CACHE_HOME/lowpass`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowpass"
