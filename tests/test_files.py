"""A file is the old one or the new one, whatever happens while it is written."""

import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowpass.pipeline.base.files import sha256, write_bytes, write_json, write_text

SIZE = 1 << 21  # of the files that are killed in the making: large enough that writing one takes a while


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"\x00\xff new", b"x" * 100_000])
def test_a_file_is_written_with_its_folder(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run" / "file.bin"
    write_bytes(path, content)
    assert path.read_bytes() == content
    assert names(path.parent) == ["file.bin"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"a long old content")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file.bin"]


def test_others_may_read_it(tmp_path: Path) -> None:
    """A temporary file is its maker's alone; a model served by another user is not."""
    write_bytes(tmp_path / "file.bin", b"new")
    assert stat.S_IMODE((tmp_path / "file.bin").stat().st_mode) == 0o644


def test_text_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / "file.txt", "größer\n")
    assert (tmp_path / "file.txt").read_bytes() == "größer\n".encode()
    write_json(tmp_path / "file.json", {"a": [1, None]})
    assert (tmp_path / "file.json").read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "1\n"
    assert names(tmp_path) == ["file.json"]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "file.bin") == hashlib.sha256(b"abc" * 1000).hexdigest()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_failure_midway_leaves_the_old_file_alone(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        assert path.read_bytes() == b"old"  # until the very last step
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_it_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut may leave the new name on an empty file."""
    path, steps = tmp_path / "file.bin", list[str]()
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        assert os.fstat(handle).st_size == 3
        steps.append("fsync")
        real_fsync(handle)

    def replace(source: str | Path, target: str | Path) -> None:
        assert Path(source).parent == Path(target).parent  # a rename across file systems would be a copy
        steps.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_bytes(path, b"new")
    assert steps == ["fsync", "replace"]


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="file"):
        write_bytes(tmp_path / "file" / "below.bin", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


REWRITE = """
import sys
from pathlib import Path
from lowpass.pipeline.base.files import write_bytes
path, size = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        write_bytes(path, size * letter)
"""


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, rng = tmp_path / "file.bin", random.Random(0)
    root = Path(__file__).parents[1]
    for _ in range(6):
        path.write_bytes(SIZE * b"a")
        writer = subprocess.Popen(
            [sys.executable, "-c", REWRITE, str(path), str(SIZE)], stdout=subprocess.PIPE, text=True, cwd=root
        )
        with writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert content in (SIZE * b"a", SIZE * b"b")


KILL_ITSELF = """
import os, signal, sys
from pathlib import Path
import lowpass.pipeline.base.files
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], die)
lowpass.pipeline.base.files.write_bytes(Path(sys.argv[1]), b"new")
"""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_kill_at_the_worst_moment(step: str, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    root = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", KILL_ITSELF, str(path), step], cwd=root, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_bytes(path, b"newer")  # what the killed writer left beside it is in nobody's way
    assert path.read_bytes() == b"newer"
