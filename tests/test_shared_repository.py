"""A repository that several users write to: a group's stays a group's, and who may not write is told whose it is."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import ONE, PICTURES
from users import FIRST, SECOND, TEAM, as_user

from lowpass.export.triton.canary import abort_canary, promote_canary, start_canary
from lowpass.export.triton.removal import remove_decode
from lowpass.export.triton.repository import damaged_models, deploy, list_versions, prune_versions, roll_back
from lowpass.export.triton.version import served_version, versions_of
from lowpass.export.triton.writers import LOCK_FILE, explained, locked
from lowpass.pipeline.base.errors import InputError


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """One that every user can enter; pytest's own are one user's alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run(run: Path, open_folder: Path) -> Path:
    copy = Path(shutil.copytree(run, open_folder / "run"))
    deploy(copy, open_folder / "first", "digits", PICTURES)  # imports what it needs, while this is still root
    return copy


@pytest.fixture
def repository(open_folder: Path) -> Iterator[Path]:
    folder = open_folder / "repository"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def given_to(folder: Path, user: int, group: int, mode: int) -> None:
    os.chown(folder, user, group)
    folder.chmod(mode)


@pytest.mark.parametrize("mode", [0o2775, 0o775, 0o777], ids=["setgid", "group", "everybody"])
def test_a_team_shares_a_repository(run: Path, repository: Path, mode: int) -> None:
    """Each goes on where the other was: with another umask, too, and whatever the other has begun."""
    given_to(repository, 0, TEAM, mode)
    before = os.umask(0o077)
    try:
        with as_user(FIRST, TEAM):
            deploy(run, repository, "digits", PICTURES)
            deploy(run, repository, "digits", PICTURES)
        with as_user(SECOND, TEAM):
            assert deploy(run, repository, "digits", ONE).version == 3
            assert roll_back(repository, "digits").version == 2
            start_canary(run, repository, "digits", ONE, 10)
        with as_user(FIRST, TEAM):
            assert promote_canary(repository, "digits").version == 4
            start_canary(run, repository, "digits", ONE, 10)
        with as_user(SECOND, TEAM):
            abort_canary(repository, "digits")
            assert {one.version for one in prune_versions(repository, ["digits"], 1)} == {1, 2}
            assert len(remove_decode(repository, ["digits"])) == 3
    finally:
        os.umask(before)
    assert versions_of(repository / "digits") == (3, 4) and served_version(repository / "digits") == 4
    assert {path.name for path in repository.iterdir()} == {"digits", LOCK_FILE}
    for path in repository.rglob("*"):
        assert path.stat().st_mode & stat.S_IROTH, path
    if mode != 0o777:
        assert {path.stat().st_gid for path in repository.rglob("*") if path.is_dir()} == {TEAM}
        assert not any(path.stat().st_mode & stat.S_IWOTH for path in repository.rglob("*"))


def test_whose_repository_it_is_is_said(run: Path, repository: Path) -> None:
    given_to(repository, FIRST, TEAM, 0o755)
    with as_user(FIRST):
        for _ in range(2):
            deploy(run, repository, "digits", ONE)
        start_canary(run, repository, "digits", ONE, 10)
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    with as_user(SECOND, TEAM):
        for work in (
            lambda: deploy(run, repository, "digits", ONE),
            lambda: roll_back(repository, "digits"),
            lambda: prune_versions(repository, ["digits"], 1),
            lambda: promote_canary(repository, "digits"),
            lambda: abort_canary(repository, "digits"),
        ):
            whose = rf"no permission for {repository}, which belongs to nobody \(group 4711, mode 0755\)"
            with pytest.raises(InputError, match=whose):
                work()
        assert [one.version for one in list_versions(repository, "digits")] == [1, 2, 3]
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before


def test_a_model_that_one_keeps_to_oneself_stays_that_ones(run: Path, repository: Path) -> None:
    """As before models were shared, or in a sticky folder."""
    given_to(repository, 0, TEAM, 0o3775)
    with as_user(FIRST, TEAM):
        deploy(run, repository, "digits", ONE)
        assert not (repository / "digits").stat().st_mode & 0o022
    with as_user(SECOND, TEAM):
        with pytest.raises(InputError, match=rf"no permission for {repository / 'digits'}, which belongs to nobody"):
            deploy(run, repository, "digits", ONE)
        assert deploy(run, repository, "others", ONE).version == 1
    assert versions_of(repository / "digits") == (1,) and not list(repository.rglob("*.part"))


def test_a_repository_that_one_may_not_read(run: Path, repository: Path) -> None:
    deploy(run, repository, "digits", ONE)
    given_to(repository, FIRST, FIRST, 0o700)
    with as_user(SECOND):
        for work in (
            lambda: list_versions(repository),
            lambda: list_versions(repository, "digits"),
            lambda: roll_back(repository, "digits"),
        ):
            with pytest.raises(InputError, match=rf"no permission for {repository}, which belongs to nobody"):
                work()


@pytest.mark.parametrize(
    ("code", "path", "said"),
    [
        (
            errno.EACCES,
            "digits/1",
            r"no permission for .*repository/digits/1 \(Permission denied\); do it as its owner",
        ),
        (
            errno.EPERM,
            None,
            r"no permission for .*repository, which belongs to .*mode 0755\) \(Operation not permitted\)",
        ),
        (errno.EROFS, "digits", r"cannot write to the repository .*repository: Read-only file system; mount it"),
        (errno.ENAMETOOLONG, "digits", "longer than this file system takes; give a shorter --repository or --name"),
        (
            errno.ENOTDIR,
            "digits",
            r"repository/digits cannot be had \(Not a directory\): something else is in its place",
        ),
    ],
)
def test_what_a_system_refuses_is_said_with_what_helps(tmp_path: Path, code: int, path: str | None, said: str) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    error = OSError(code, os.strerror(code), str(repository / path) if path else None)
    with pytest.raises(InputError, match=said), explained(repository):
        raise error


def test_a_full_disk_is_no_fault_of_the_input(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as full, explained(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert full.value.filename == str(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "labels.txt", "SHA256SUMS", "config.pbtxt"])
def test_a_version_that_cannot_be_read_is_not_served(run: Path, repository: Path, name: str) -> None:
    given_to(repository, FIRST, FIRST, 0o755)
    file = repository / "digits" / "1" / name
    with as_user(FIRST):
        for _ in range(2):
            deploy(run, repository, "digits", ONE)
        file.chmod(0)
        with pytest.raises(
            InputError, match=rf"{file} cannot be read \(Permission denied\); serve another with --vers"
        ):
            roll_back(repository, "digits")
    assert served_version(repository / "digits") == 2


def test_another_users_model_hides_no_other(run: Path, repository: Path) -> None:
    for name in ("digits", "hidden", "other"):
        deploy(run, repository, name, ONE)
    (repository / "lost+found").mkdir(0o700)  # as a disk has one
    (repository / "hidden").chmod(0o700)
    with as_user(SECOND):
        assert [one.name for one in list_versions(repository)] == ["digits", "other"]
        (said,) = damaged_models(repository).values()
        assert said == f"{repository / 'hidden'} cannot be read (Permission denied); open it, or move it away"


def test_a_deploy_that_waits_too_long_says_so(run: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(run, repository, "digits", ONE)
    monkeypatch.setattr("lowpass.export.triton.writers.PATIENCE_S", 0.2)
    with locked(repository), pytest.raises(InputError, match=r"another deploy has been writing to .* for 0 s; wait"):
        roll_back(repository, "digits")
    with pytest.raises(InputError, match="no version before 1"):
        roll_back(repository, "digits")
