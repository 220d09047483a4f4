"""What a server leaves behind when it is killed, and whose it is.

Triton's Python backend keeps regions of shared memory, a megabyte each, and forgets some even when it stops cleanly.
All that belongs to one supervisor carries its token. A lock on a small file says that the owner lives: the supervisor
holds it, its server and backends inherit it, so it is free once all of them are dead, however they died. Process
numbers would not do: containers that share the memory count their processes apart.
"""

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from lowpass.pipeline.base.errors import RunError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the backend has no other place
NAME = "lowpass-triton-"
SUPERVISOR = "LOWPASS_SUPERVISOR"  # in a server's environment: the number of the process that started it
LOCK = re.compile(NAME + r"([0-9a-f]{16})\.lock")


class Belongings:
    """The regions and the folder of one supervisor; `lock` is for its children to inherit.

    Raises:
        RunError: the shared memory cannot be written to.
    """

    def __init__(self) -> None:
        sweep()
        try:
            self.token, self.lock = _new_token()
        except OSError as error:
            raise RunError(f"{SHARED_MEMORY} cannot be written ({error.strerror}); the server needs it") from None
        self.folder = self.place_of(self.token)
        self.folder.mkdir(mode=0o700)

    @staticmethod
    def place_of(token: str) -> Path:
        """The folder of a supervisor with that token."""
        return Path(tempfile.gettempdir()) / f"{NAME}{token}"

    @property
    def region_prefix(self) -> str:
        """How the names of the server's regions must begin."""
        return f"{NAME}{self.token}-"

    def remove_regions(self) -> None:
        """When no server of this supervisor runs."""
        _remove_regions(self.token)

    def give_up(self) -> None:
        """Leave nothing."""
        _remove(self.token)
        os.close(self.lock)


def sweep() -> None:
    """Remove what supervisors left that died without cleaning up. What is in use, or another user's, stays."""
    if not SHARED_MEMORY.is_dir():
        return
    for path in SHARED_MEMORY.iterdir():
        if found := LOCK.fullmatch(path.name):
            with suppress(OSError), _taken(path):
                _remove(found[1])


def orphans(ports: Container[int]) -> list[int]:
    """The servers of this user that listen on one of `ports`, and whose supervisor was killed: they have been told to
    end, and finish what they have."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = process.cmdline()
            if not any(word.startswith("--id=lowpass-") for word in line):
                continue
            own = [
                int(word.partition("=")[2]) for word in line if re.fullmatch(r"--(http|grpc|metrics)-port=\d+", word)
            ]
            alive = process.environ().get(SUPERVISOR) == str(process.ppid())
            if not alive and any(port in ports for port in own):
                found.append(process.pid)
    return found


@contextmanager
def _taken(path: Path) -> Iterator[None]:
    """Hold a lock that nobody holds.

    Raises:
        OSError: somebody does, it is another user's, or it has gone.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError(f"{path} is another user's")
        yield
    finally:
        os.close(descriptor)


def _new_token() -> tuple[str, int]:
    """A token that nobody has, with its lock."""
    while True:
        token = secrets.token_hex(8)
        descriptor = os.open(_lock_file(token), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return token, descriptor
        os.close(descriptor)  # a sweep came between the two lines above, and took it for a dead one's


def _lock_file(token: str) -> Path:
    return SHARED_MEMORY / f"{NAME}{token}.lock"


def _remove_regions(token: str) -> None:
    for region in SHARED_MEMORY.glob(f"{NAME}{token}-*"):
        region.unlink(missing_ok=True)


def _remove(token: str) -> None:
    _remove_regions(token)
    shutil.rmtree(Belongings.place_of(token), ignore_errors=True)
    _lock_file(token).unlink(missing_ok=True)  # last: without it nobody would find the rest
