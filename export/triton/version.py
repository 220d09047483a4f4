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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from tritonclient.grpc import model_config_pb2

from lowpass.export.options import Precision
from lowpass.export.triton.config import CONFIG_REMEDY, Backend, as_text, parse_config
from lowpass.export.triton.writers import READABLE, hidden, share
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import PART, sha256, write_text

DEPLOYED = (".onnx", ".plan", ".pbtxt", ".txt", ".json", ".py")  # suffixes of what lies in a version
CONFIG_FILE, FACTS_FILE = "config.pbtxt", "version.json"
SUMS_FILE = "SHA256SUMS"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")  # with what is put beside it, less than a file system takes
VERSION = re.compile(r"[1-9][0-9]*")
# A file of this name keeps Python from writing a folder there, which Triton would take for a change of the version: it
# would load it twice.
NO_BYTECODE = "__pycache__"
# What a deploy sets aside in a folder of a model, see `writers.hidden` and `base.files.replacing`: a version, a model,
# the configuration.
ASIDE = re.compile(r"\.([1-9][0-9]*|.+-(canary|prepare|labels|pictures)|config\.pbtxt)\.[a-z0-9_]+" + re.escape(PART))
LOST = "lost+found"  # of a disk, and only root's
REMEDY = "serve another with --version, or deploy the run once more"  # for a version that is damaged


class VersionFacts(BaseModel):
    """What one version is. `top1` in percent on the run's test images, None where there were none."""

    # Other fields are of another lowpass: its versions are listed and served as well.
    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    kind: str  # slim or dense
    backend: Backend
    precision: Precision
    top1: float | None
    macs: int
    max_batch: int
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
    if not model.is_dir():
        model.mkdir()
        share(model)
    aside = hidden(model, str(version))
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
        aside.rename(model / str(version))
    except OSError as error:
        error.filename, error.filename2 = str(model / str(version)), None  # not the file that was copied
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # it holds something
            model.rmdir()


def sweep(model: Path) -> None:
    """Clear away what a deploy that was killed left half-written or half-removed; the caller holds the lock. What is
    somebody's stays."""
    parts = [part for part in model.glob(f".*{PART}") if ASIDE.fullmatch(part.name)] if model.is_dir() else []
    for part in parts:
        with suppress(PermissionError):  # of another user
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    if parts:
        with suppress(OSError):  # it holds something
            model.rmdir()


def check_whole(model: Path, version: int, remedy: str = REMEDY) -> bool:
    """That all files of a version are those that were deployed; False: it has no sums to see that by.

    Raises:
        InputError: one is damaged, replaced, gone, or cannot be read; the message ends with `remedy`.
    """
    folder = model / str(version)
    try:
        sums = _sums_of(folder)
        if sums is None:
            return False
        # An empty list, or one that ends early, would let anything pass.
        present = {file.name for file in folder.iterdir() if file.is_file() and file.suffix in DEPLOYED}
        if left_out := sorted((present | {CONFIG_FILE}) - sums.keys()):
            raise InputError(f"{folder / SUMS_FILE} does not list {left_out[0]}: it was damaged; {remedy}")
        for name, sum_ in sums.items():
            file = folder / name
            if not file.is_file() or sha256(file) != sum_:
                raise InputError(f"{file} is not what was deployed: it was damaged or replaced; {remedy}")
    except UnicodeDecodeError as error:
        raise InputError(f"{folder / SUMS_FILE} cannot be read: {error}; {remedy}") from None
    except OSError as error:
        raise InputError(f"{error.filename or folder} cannot be read ({error.strerror}); {remedy}") from None
    return True


def _sums_of(folder: Path) -> dict[str, str] | None:
    """The sums of a version's files by name; None: it has none."""
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return {Path(name).name: sum_ for sum_, _, name in (line.partition("  ") for line in lines)}


def own_config(model: Path, version: int, remedy: str = REMEDY) -> Any:
    """The configuration that would serve a version that is there.

    Raises:
        InputError: the version is not there, or has no configuration of its own; the message ends with `remedy`.
    """
    folder = model / str(version)
    if not folder.is_dir():
        raise InputError(f"{model} has no version {version}; there are {', '.join(map(str, versions_of(model)))}")
    if not (folder / CONFIG_FILE).exists():
        raise InputError(
            f"{folder} has no {CONFIG_FILE}: it was taken away, or lowpass deployed it before versions had their own; "
            f"{remedy}"
        )
    config = read_config(folder / CONFIG_FILE, remedy)
    if list(config.version_policy.specific.versions) != [version] or not config.output:
        raise InputError(f"{folder / CONFIG_FILE} does not serve version {version}; {remedy}")
    if config.name != model.name:
        raise InputError(f"{folder / CONFIG_FILE} is of a model {config.name!r}; {remedy}")
    return config


def read_config(path: Path, remedy: str = CONFIG_REMEDY) -> Any:
    """A configuration of a model or of a version.

    Raises:
        InputError: it cannot be read, is empty, or none of Triton's; the message ends with `remedy`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read ({error}); {remedy}") from None
    if not text.strip():
        raise InputError(f"{path} is empty; {remedy}")
    return parse_config(text, str(path), remedy)


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
    try:
        folders = sorted(path for path in repository.iterdir() if path.is_dir())
    except OSError as error:
        return {repository: f"the repository {repository} cannot be read ({error.strerror})"}
    found = {}
    for model in folders:
        if model.name.startswith(".") or model.name == LOST:
            continue
        try:
            problem = _problem_of(model)
        except OSError as error:  # such as another user's; of a disk's own lost+found that is as it should be
            problem = (
                None if model.name == LOST else f"{model} cannot be read ({error.strerror}); open it, or move it away"
            )
        if problem is not None:
            found[model / CONFIG_FILE] = problem
    return found


def _problem_of(model: Path) -> str | None:
    """Why Triton cannot follow a model's configuration, if it cannot."""
    path = model / CONFIG_FILE
    if not path.is_file():
        if any((model / str(version) / CONFIG_FILE).is_file() for version in versions_of(model)):
            return f"{path} is gone, {model.name} is not served; {CONFIG_REMEDY}"
        return None
    try:
        config = read_config(path)
    except InputError as error:
        return str(error)
    needed = [model / one.label_filename for one in config.output if one.label_filename]
    for version in config.version_policy.specific.versions:
        folder = model / str(version)
        if not folder.is_dir():
            return f"{path} serves version {version}, which is not there; {CONFIG_REMEDY}"
        with suppress(UnicodeDecodeError):
            needed += [folder / name for name in _sums_of(folder) or ()]
    missing = next((file for file in needed if not file.is_file()), None)
    return f"{missing} is not there, which {path} needs; {CONFIG_REMEDY}" if missing else None


def remove_version(model: Path, version: int) -> None:
    """Take a version's folder away: at once for who looks, then file by file."""
    aside = hidden(model, str(version))
    (model / str(version)).rename(aside / "removed")
    shutil.rmtree(aside)


def facts_of(model: Path, version: int) -> VersionFacts | None:
    """What a version is; None where nobody wrote it down."""
    try:
        return VersionFacts.model_validate_json((model / str(version) / FACTS_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
