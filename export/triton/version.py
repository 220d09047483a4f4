"""Versions of Triton models, each of them whole.

    REPO/NAME/config.pbtxt            which version is served, and how: a copy of that version's own
    REPO/NAME/VERSION/config.pbtxt    how this version is served
    REPO/NAME/VERSION/labels.txt      its classes
    REPO/NAME/VERSION/version.json    what it is, for people
    REPO/NAME/VERSION/SHA256SUMS      of all these files, as sha256sum reads it
    REPO/NAME/VERSION/model.*         its file

A version is written aside and renamed into place. Which one is served is `NAME/config.pbtxt`, replaced in one rename:
so a new version, and the way back, come with everything that belongs to them at once, or not at all.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError
from tritonclient.grpc import model_config_pb2

from lowpass.export.options import Precision
from lowpass.export.triton.config import CONFIG_REMEDY, Backend, as_text, parse_config
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import PART, sha256, write_text

DEPLOYED = (".onnx", ".plan", ".pbtxt", ".txt", ".json", ".py")  # suffixes of what lies in a version
CONFIG_FILE, FACTS_FILE, LOCK_FILE = "config.pbtxt", "version.json", ".lowpass.lock"
SUMS_FILE = "SHA256SUMS"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")  # with what is put beside it, less than a file system takes
VERSION = re.compile(r"[1-9][0-9]*")
# A file of this name keeps Python from writing a folder there, which Triton would take for a change of the version: it
# would load it twice.
NO_BYTECODE = "__pycache__"
PATIENCE_S = 120.0  # another deploy may be copying an engine onto a slow disk
READABLE, ENTERABLE = 0o644, 0o755  # also under umask 077: the server is another user


class VersionFacts(BaseModel):
    """What one version is. `top1` in percent on the run's test images, None where there were none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    kind: str  # slim or dense
    backend: Backend
    precision: Precision
    top1: float | None
    macs: int
    max_batch: int
    sha256: str  # of the model's file
    deployed: str  # ISO 8601, UTC
    lowpass: str


@dataclass(frozen=True)
class ModelVersion:
    """One version of one Triton model: its configuration, without a version policy, and what lies in the version's
    folder, a file to copy or a text each."""

    name: str
    config: Any
    files: Mapping[str, Path | str]


def checked_name(name: str) -> str:
    """A name that is one folder of the repository.

    Raises:
        InputError: it is none.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"--name {name!r}: use up to 200 letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    return name


@contextmanager
def locked(repository: Path) -> Iterator[None]:
    """One writer at a time; makes the repository where it is missing.

    Raises:
        InputError: it is no folder, cannot be written, or another deploy does not end.
    """
    if repository.exists() and not repository.is_dir():
        raise InputError(f"{repository} is a file; --repository takes a folder")
    try:
        if not repository.exists():
            for folder in (*reversed(repository.parents), repository):
                if not folder.exists():
                    folder.mkdir(exist_ok=True)  # another deploy may begin as well
                    folder.chmod(ENTERABLE)
        lock = FileLock(repository / LOCK_FILE, timeout=PATIENCE_S, mode=READABLE)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another deploy has been writing to {repository} for {PATIENCE_S:.0f} s; wait for it or end it"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write to the repository {repository}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def versions_of(model: Path) -> tuple[int, ...]:
    """The versions in a model's folder, ascending."""
    if not model.is_dir():
        return ()
    return tuple(sorted(int(one.name) for one in model.iterdir() if one.is_dir() and VERSION.fullmatch(one.name)))


def write_version(repository: Path, version: int, one: ModelVersion) -> None:
    """Write a version's folder whole; it is not served yet.

    Args:
        repository: the model's folder in it is made if missing.
        version: must not be there.
        one: what to write.
    """
    model = repository / one.name
    config = model_config_pb2.ModelConfig()
    config.CopyFrom(one.config)
    config.version_policy.specific.versions[:] = [version]
    model.mkdir(exist_ok=True)
    model.chmod(ENTERABLE)
    for part in model.glob(f".*{PART}"):  # of a deploy that was killed
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    aside = Path(tempfile.mkdtemp(dir=model, prefix=f".{version}.", suffix=PART))
    try:
        files = {**one.files, CONFIG_FILE: as_text(config)}
        if config.backend == "python":
            files[NO_BYTECODE] = ""
        for name, content in files.items():
            target = aside / name
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            else:
                target.write_text(content, encoding="utf-8")
            target.chmod(READABLE)
            with target.open("rb") as handle:
                os.fsync(handle.fileno())
        sums = "".join(f"{sha256(aside / name)}  {name}\n" for name in sorted(files))
        write_text(aside / SUMS_FILE, sums)
        (aside / SUMS_FILE).chmod(READABLE)
        aside.chmod(ENTERABLE)
        aside.rename(model / str(version))
    except OSError as error:
        error.filename, error.filename2 = str(model / str(version)), None  # not the file that was copied
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # it holds something
            model.rmdir()


def check_whole(model: Path, version: int) -> bool:
    """That all files of a version are those that were deployed; False: it has no sums to see that by.

    Raises:
        InputError: one is damaged, replaced or gone.
    """
    folder = model / str(version)
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / SUMS_FILE} cannot be read: {error}; give another --version") from None
    sums = {Path(name).name: sum_ for sum_, _, name in (line.partition("  ") for line in lines)}
    # An empty list, or one that ends early, would let anything pass.
    present = {file.name for file in folder.iterdir() if file.is_file() and file.suffix in DEPLOYED}
    if left_out := sorted((present | {CONFIG_FILE}) - sums.keys()):
        raise InputError(f"{folder / SUMS_FILE} does not list {left_out[0]}: it was damaged; give another --version")
    for name, sum_ in sums.items():
        file = folder / name
        if not file.is_file() or sha256(file) != sum_:
            raise InputError(f"{file} is not what was deployed: it was damaged or replaced; give another --version")
    return True


def own_config(model: Path, version: int) -> Any:
    """The configuration that would serve a version that is there.

    Raises:
        InputError: the version is not there, or has no configuration of its own.
    """
    folder = model / str(version)
    if not folder.is_dir():
        raise InputError(f"{model} has no version {version}; there are {', '.join(map(str, versions_of(model)))}")
    if not (folder / CONFIG_FILE).exists():
        raise InputError(
            f"{folder} has no {CONFIG_FILE}: it was taken away, or lowpass deployed it before versions had their own; "
            "deploy it again, or give another --version"
        )
    config = read_config(folder / CONFIG_FILE)
    if list(config.version_policy.specific.versions) != [version] or not config.output:
        raise InputError(f"{folder / CONFIG_FILE} does not serve version {version}; give another --version")
    if config.name != model.name:
        raise InputError(f"{folder / CONFIG_FILE} is of a model {config.name!r}; give another --version")
    return config


def read_config(path: Path) -> Any:
    """A configuration of a model or of a version.

    Raises:
        InputError: it cannot be read, is empty, or none of Triton's.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); {CONFIG_REMEDY}") from None
    if not text.strip():
        raise InputError(f"{path} is empty; {CONFIG_REMEDY}")
    return parse_config(text, str(path))


def serve_version(model: Path, version: int) -> None:
    """Make a version that is there the one that is served.

    Raises:
        InputError: it has no configuration of its own.
    """
    write_text(model / CONFIG_FILE, as_text(own_config(model, version)))


def served_config(model: Path) -> Any:
    """The configuration that serves a model.

    Raises:
        InputError: it is none of Triton's.
    """
    return read_config(model / CONFIG_FILE)


def served_version(model: Path) -> int | None:
    """The version that a model's configuration serves; None: there is no configuration.

    Raises:
        InputError: it is no configuration of Triton's.
    """
    if not (model / CONFIG_FILE).is_file():
        return None
    return max(served_config(model).version_policy.specific.versions, default=None)


def unreadable_configs(repository: Path) -> dict[Path, str]:
    """The models' configurations that Triton cannot follow, and says so in its log alone; why."""
    found = {}
    for model in sorted(path for path in repository.iterdir() if path.is_dir() and not path.name.startswith(".")):
        path = model / CONFIG_FILE
        if not path.is_file():
            if any((model / str(version) / CONFIG_FILE).is_file() for version in versions_of(model)):
                found[path] = f"{path} is gone, {model.name} is not served; {CONFIG_REMEDY}"
            continue
        try:
            config = read_config(path)
        except InputError as error:
            found[path] = str(error)
            continue
        gone = [version for version in config.version_policy.specific.versions if not (model / str(version)).is_dir()]
        labels = [model / one.label_filename for one in config.output if one.label_filename]
        if gone:
            found[path] = f"{path} serves version {gone[0]}, which is not there; {CONFIG_REMEDY}"
        elif missing := [file for file in labels if not file.is_file()]:
            found[path] = f"{missing[0]} is not there, which {path} names; {CONFIG_REMEDY}"
    return found


def remove_version(model: Path, version: int) -> None:
    """Take a version's folder away: at once for who looks, then file by file."""
    aside = Path(tempfile.mkdtemp(dir=model, prefix=f".{version}.", suffix=PART))
    (model / str(version)).rename(aside / "removed")
    shutil.rmtree(aside)


def facts_of(model: Path, version: int) -> VersionFacts | None:
    """What a version is; None where nobody wrote it down."""
    try:
        return VersionFacts.model_validate_json((model / str(version) / FACTS_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
