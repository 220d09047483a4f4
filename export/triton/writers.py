"""Who may write to a repository: one at a time, each so that the others can go on, and whoever may not is told why.

A repository that a group writes to (`chgrp TEAM REPO; chmod g+ws REPO`) stays one: what is made in it gets its group
and its write bits.
"""

import errno
import fcntl
import grp
import os
import pwd
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import PART

LOCK_FILE = ".lowpass.lock"
PATIENCE_S, NAP_S = 120.0, 0.05  # another deploy may be copying an engine onto a slow disk
READABLE, ENTERABLE = 0o644, 0o755  # also under umask 077: the server is another user
REFUSED = (errno.EACCES, errno.EPERM)
IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP)


@contextmanager
def locked(repository: Path) -> Iterator[None]:
    """One writer at a time; makes the repository where it is missing.

    Raises:
        InputError: it is no folder, cannot be written, or another deploy does not end.
    """
    with explained(repository):
        check_folder(repository)
        if not repository.exists():
            for folder in (*reversed(repository.parents), repository):
                if not folder.exists():
                    folder.mkdir(exist_ok=True)  # another deploy may begin as well
                    _open(folder, ENTERABLE)
        lock = _lock_file(repository)
        try:
            _wait_for(lock, repository)
            yield
        finally:
            os.close(lock)


def check_folder(repository: Path) -> None:
    """That a repository is a folder, if it is there.

    Raises:
        InputError: it is something else.
    """
    with explained(repository):
        if repository.exists() and not repository.is_dir():
            raise InputError(f"{repository} is a file; a repository is a folder")


def share(made: Path) -> None:
    """Let those change a new folder who may change the one that it is in; all may read it."""
    above = made.parent.stat()
    with suppress(PermissionError):  # of a group that this user is not in
        os.chown(made, -1, above.st_gid)
    _open(made, ENTERABLE | _writers(made.stat(), above))


def _writers(made: os.stat_result, above: os.stat_result) -> int:
    """The bits that let others write to what is made in a folder as they may to the folder. Where it is sticky, each
    user's own files are kept from the others."""
    if above.st_mode & stat.S_ISVTX:
        return 0
    same_group = stat.S_IWGRP | stat.S_ISGID if made.st_gid == above.st_gid else 0
    return above.st_mode & (stat.S_IWOTH | same_group)


def hidden(model: Path, what: str) -> Path:
    """A new folder in a model's for what is not there yet, or no longer: a server sees none of it."""
    aside = Path(tempfile.mkdtemp(dir=model, prefix=f".{what}.", suffix=PART))
    share(aside)
    return aside


def _open(folder: Path, mode: int) -> None:
    """Beside what it is open to already, such as by the umask or by an access list."""
    folder.chmod(stat.S_IMODE(folder.stat().st_mode) | mode)


def _lock_file(repository: Path) -> int:
    """The lock's file, open. Whoever may write the repository may take it, whoever made it."""
    path = repository / LOCK_FILE
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, READABLE)
    except PermissionError:  # another user's; where it is, to read it is enough for the lock
        if not path.is_file() or not os.access(repository, os.W_OK | os.X_OK, effective_ids=True):
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with suppress(PermissionError):  # another user's
        above = repository.stat()
        os.fchown(lock, -1, above.st_gid)
        os.fchmod(lock, READABLE | _writers(os.fstat(lock), above) & ~stat.S_ISGID)
    return lock


def _wait_for(lock: int, repository: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise InputError(
                    f"another deploy has been writing to {repository} for {PATIENCE_S:.0f} s; wait for it or end it"
                ) from None
        except OSError as error:
            if error.errno != errno.EBADF:  # over NFS a lock must be open to write
                raise
            raise InputError(
                f"{repository / LOCK_FILE} cannot be locked here: it belongs to {_owner(repository / LOCK_FILE)}; have "
                f"it opened with `chmod g+w {repository / LOCK_FILE}`"
            ) from None
        time.sleep(NAP_S)


@contextmanager
def explained(repository: Path) -> Iterator[None]:
    """Say in words what an operating system refuses for a reason that the user can mend.

    Raises:
        InputError: no permission, a read-only disk, a path that is too long, or something in its place.
        OSError: any other, such as a full disk, with the path.
    """
    try:
        yield
    except OSError as error:
        path = _path_of(error, repository)
        if error.errno in REFUSED:
            raise InputError(_no_permission(path, error)) from None
        if error.errno == errno.EROFS:
            raise InputError(
                f"cannot write to the repository {repository}: {error.strerror}; mount it to be written, or give "
                "another --repository"
            ) from None
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"a path in the repository {repository} is longer than this file system takes; give a shorter "
                "--repository or --name"
            ) from None
        if error.errno in IN_THE_WAY:
            raise InputError(
                f"{path} cannot be had ({error.strerror}): something else is in its place or above it; move that away, "
                "or give another --repository"
            ) from None
        error.filename = error.filename or str(repository)
        raise


def _path_of(error: OSError, repository: Path) -> Path:
    """What was refused; some calls tell a name alone, and some nothing."""
    told = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else repository
    return told if told.is_relative_to(repository) or repository.is_relative_to(told) else repository


def _no_permission(path: Path, error: OSError) -> str:
    """Whose folder it is that keeps this user away, and what opens it."""
    folders = [folder for folder in (path, *path.parents) if _is_folder(folder)]
    closed = next((folder for folder in folders if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True)), path)
    try:
        whose = f", which belongs to {_owner(closed)}"
    except OSError:
        whose = ""
    return (
        f"no permission for {closed}{whose} ({error.strerror}); do it as its owner, or have it opened to you, such as "
        f"by `chmod -R g+rwX {closed}`"
    )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _owner(path: Path) -> str:
    """Such as `alice (group vision, mode 0755)`."""
    about = path.lstat()
    user, group = str(about.st_uid), str(about.st_gid)
    with suppress(KeyError):
        user = pwd.getpwuid(about.st_uid).pw_name
    with suppress(KeyError):
        group = grp.getgrgid(about.st_gid).gr_name
    return f"{user} (group {group}, mode {stat.S_IMODE(about.st_mode):04o})"
