"""What somebody takes away while a server serves it: the server goes on, says what is gone, and takes up what comes."""

import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import printed
from served import ONE, PICTURES, TRITON, free_address, until

from lowpass.export.triton import backends
from lowpass.export.triton.repository import deploy
from lowpass.export.triton.server import STOP_S, Supervisor, find_server
from lowpass.export.triton.state import is_ready, serving_versions, versions_in
from lowpass.pipeline.base.errors import RunError


@dataclass
class Watched:
    repository: Path
    told: list[str]
    serving: Callable[[], dict[str, int]]


@pytest.fixture
def watched(run: Path, tmp_path: Path) -> Iterator[Watched]:
    """A server on `digits` with pictures around it, and what its supervisor tells."""
    repository, address, told = tmp_path / "repository", free_address(), list[str]()
    deploy(run, repository, "digits", PICTURES)
    with Supervisor(find_server(TRITON), repository, address, tmp_path / "log", told.append) as supervisor:
        threading.Thread(target=supervisor.watch, daemon=True).start()
        yield Watched(repository, told, lambda: serving_versions(versions_in(address) or []))
        began = time.monotonic()
    assert time.monotonic() - began < STOP_S and not is_ready(address)  # as it was told to, and not killed


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits", "digits-prepare"])
def test_a_model_py_that_is_gone_stops_no_later_version(run: Path, watched: Watched, model: str) -> None:
    """Nor any other model: a server that waits for a stub which has died would take up nothing any more."""
    time.sleep(2)  # its first poll loads everything once more
    gone = watched.repository / model / "1" / "model.py"
    gone.unlink()
    until(lambda: any(line.startswith(f"{gone} is not there, which ") for line in watched.told), 30)
    time.sleep(2)
    assert watched.serving()[model] == 1  # with what it has loaded
    deploy(run, watched.repository, "digits", PICTURES)
    deploy(run, watched.repository, "other", ONE)
    wanted = {"other": 1} | {f"digits{what}": 2 for what in ("", "-prepare", "-labels", "-pictures")}
    until(lambda: watched.serving() == wanted, 60)


def test_a_model_py_that_is_gone_before_the_start_is_named_at_once(run: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    deploy(run, repository, "digits", ONE)
    gone = repository / "digits" / "1" / "model.py"
    gone.unlink()
    with (
        pytest.raises(RunError, match=rf"cannot load digits: Internal: FileNotFoundError: {gone} is not there"),
        Supervisor(find_server(TRITON), repository, free_address(), tmp_path / "log"),
    ):
        pass


@pytest.mark.slow
def test_pictures_are_taken_away_under_a_server(
    run: Path, watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    printed(capsys, "deploy", "--repository", str(watched.repository), "--name", "digits", "--remove-decode")
    until(lambda: watched.serving() == {"digits": 1}, 60)
    until(lambda: len([line for line in watched.told if line.endswith("is served no longer")]) == 3, 30)
    assert {line.split()[0] for line in watched.told} == {"digits-pictures", "digits-labels", "digits-prepare"}
    deploy(run, watched.repository, "digits", PICTURES)
    until(lambda: watched.serving() == {f"digits{what}": 2 for what in ("", "-prepare", "-labels", "-pictures")}, 60)


def test_the_stub_is_started_with_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = find_server(TRITON).bundle
    assert bundle is not None
    stub = backends.set_up(tmp_path / "ours", bundle) / "python" / backends.STUB
    assert stub.resolve() == (backends.OURS / "stub.sh").resolve()
    (tmp_path / "ours" / "stub").unlink()
    (tmp_path / "ours" / "stub").symlink_to("/bin/echo")
    model = tmp_path / "a model" / "1" / "model.py"

    def started() -> str:
        return subprocess.run([stub, model, "x y", "z"], capture_output=True, text=True, check=True).stdout

    assert started() == f"{stub.parent}/../../gone/1/model.py x y z\n"
    model.parent.mkdir(parents=True)
    model.touch()
    assert started() == f"{model} x y z\n"
    copied = shutil.copytree(backends.OURS, tmp_path / "copied")
    (copied / "stub.sh").chmod(stat.S_IRUSR)  # a copy that cannot be run: the wheel's own, as it is
    monkeypatch.setattr(backends, "OURS", copied)
    assert (
        backends.set_up(tmp_path / "other", bundle) / "python" / backends.STUB
    ).resolve().parent.parent.parent == bundle
