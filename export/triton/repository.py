"""A Triton model repository from a run: `REPO/NAME/config.pbtxt`, `labels.txt`, `VERSION/model.*`.

A version is written aside and renamed into place; which one is served is a line of `config.pbtxt`, itself replaced in
one step. So a new version, and the way back, come all at once or not at all.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnxruntime
from pydantic import ValidationError

from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.file import current_onnx, read_metadata
from lowpass.export.options import Precision
from lowpass.export.runtimes.engine import current_gpu
from lowpass.export.tensorrt.plan import NO_GPU, Manifest, manifest_path, plan_path
from lowpass.export.triton.config import (
    LABELS_FILE,
    MODEL_FILES,
    Backend,
    ModelSettings,
    as_text,
    config_of,
    parse_config,
    served_versions,
)
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import PART, sha256, write_text
from lowpass.pipeline.run.classes import load_classes

CONFIG_FILE = "config.pbtxt"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
DEFAULT_DELAY_US, LONGEST_DELAY_US = 1000, 5000
MEASURED_IN: dict[Backend, str] = {"python": "onnxruntime", "onnxruntime": "onnxruntime", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class Deployed:
    """A model as it now lies in the repository. `versions` are all that are there, `version` the one served."""

    name: str
    version: int
    versions: tuple[int, ...]
    backend: Backend
    path: Path


@dataclass(frozen=True)
class DeployOptions:
    """How to serve. None: the default; `instances` 1 on a GPU, 2 on a CPU, which share its cores as `threads`."""

    backend: Backend = "python"
    precision: Precision | None = None
    version: int | None = None
    labels: Path | None = None
    instances: int | None = None
    threads: int | None = None


def deploy(directory: Path, repository: Path, name: str, options: DeployOptions, dense: bool = False) -> Deployed:
    """Add a run's exported model to a repository as a new version, and make it the one that is served.

    Args:
        directory: the run; its ONNX file (or TensorRT engine) must be there and current.
        repository: made if missing.
        name: what clients call the model.
        options: how to serve it.
        dense: the dense model instead.

    Raises:
        InputError: nothing current is exported or built, the engine is for other hardware, or the version exists.
        RunError: ONNX Runtime cannot load the file.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"--name {name!r}: use letters, digits, '.', '_' and '-', beginning with a letter or digit")
    backend = options.backend
    precision: Precision = options.precision or ("fp16" if backend == "tensorrt" else "fp32")
    onnx_file = current_onnx(directory, precision, dense)
    metadata = read_metadata(onnx_file)
    source = onnx_file
    if backend == "tensorrt":
        source = _engine(directory, precision, dense, onnx_file)
    else:
        _try_load(onnx_file)
    settings = _settings(directory, name, options, metadata, precision, dense)
    model = repository / name
    if repository.exists() and not repository.is_dir():
        raise InputError(f"{repository} is a file; --repository takes a folder")
    if model.exists() and not (model / CONFIG_FILE).exists():
        raise InputError(f"{model} is there and holds no {CONFIG_FILE}; give another --name")
    present = versions_of(model)
    version = options.version or max(present, default=0) + 1
    if version in present:
        raise InputError(f"{model} already holds version {version}; give another --version, or --rollback to serve it")
    labels = "\n".join(_labels(directory, options.labels, settings.classes)) + "\n"
    config = as_text(config_of(settings, version))
    repository.mkdir(parents=True, exist_ok=True)
    if (model / CONFIG_FILE).exists():
        _check_same_interface(model, settings)
        _place(model / str(version), source, backend)
        write_text(model / LABELS_FILE, labels)
        write_text(model / CONFIG_FILE, config)
    else:
        # Beside the repository, not in it: a server that watches takes every folder there for a model.
        aside = Path(tempfile.mkdtemp(dir=repository.absolute().parent, prefix=f".{name}.", suffix=PART))
        try:
            _place(aside / str(version), source, backend)
            write_text(aside / LABELS_FILE, labels)
            write_text(aside / CONFIG_FILE, config)
            aside.chmod(0o755)
            aside.rename(model)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return Deployed(name, version, versions_of(model), backend, model)


def serve_version(repository: Path, name: str, version: int | None = None) -> Deployed:
    """Serve another version that is already there; None: the one before the present.

    Raises:
        InputError: there is no such model or version.
    """
    model = repository / name
    path = model / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"there is no model {name} in {repository}; `lowpass deploy DIR --repository {repository}`")
    config = parse_config(path.read_text(), str(path))
    present = versions_of(model)
    now = max(served_versions(config), default=0)
    chosen = version or max((v for v in present if v < now), default=0)
    if chosen not in present:
        wanted = f"version {version}" if version else f"version before {now}"
        raise InputError(f"{model} has no {wanted}; there are {', '.join(map(str, present))}")
    config.version_policy.specific.versions[:] = [chosen]
    write_text(path, as_text(config))
    backend = cast(Backend, config.backend)
    return Deployed(name, chosen, present, backend, model)


def versions_of(model: Path) -> tuple[int, ...]:
    """The versions in a model's folder, ascending."""
    if not model.is_dir():
        return ()
    return tuple(sorted(int(entry.name) for entry in model.iterdir() if entry.is_dir() and entry.name.isdecimal()))


def _place(target: Path, source: Path, backend: Backend) -> None:
    """Write a version's folder whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=PART))
    try:
        shutil.copyfile(source, aside / MODEL_FILES[backend])
        if backend == "python":
            shutil.copyfile(Path(__file__).parent / "backend" / "model.py", aside / "model.py")
        for file in aside.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        aside.chmod(0o755)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _engine(directory: Path, precision: Precision, dense: bool, onnx_file: Path) -> Path:
    plan = plan_path(directory, precision, dense)
    remedy = f"run `lowpass build {directory} --precision {precision} --runtime tensorrt` where it will be served"
    try:
        manifest = Manifest.model_validate_json(manifest_path(plan).read_bytes())
        content = sha256(plan)
    except OSError as error:
        raise InputError(f"there is no engine {plan} with its manifest ({error.strerror}); {remedy}") from None
    except ValidationError:
        raise InputError(f"{manifest_path(plan)} is not an engine's manifest; {remedy}") from None
    if manifest.runtime != "tensorrt":
        raise InputError(f"{plan} was built by {manifest.runtime}, which Triton has no backend for; {remedy}")
    if manifest.plan_sha256 != content or manifest.onnx_sha256 != sha256(onnx_file):
        raise InputError(f"{plan} was built from another {onnx_file.name}, or is damaged; {remedy}")
    gpu = current_gpu()
    if gpu is not None and manifest.gpu not in (gpu, NO_GPU):
        raise InputError(f"{plan} was built for {manifest.gpu}, this machine has {gpu}; {remedy}")
    return plan


def _try_load(onnx_file: Path) -> None:
    try:
        onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise RunError(f"ONNX Runtime cannot load {onnx_file}, it was not deployed: {error}") from None


def _settings(
    directory: Path, name: str, options: DeployOptions, metadata: dict[str, str], precision: Precision, dense: bool
) -> ModelSettings:
    profile = BatchProfile.parse(metadata["batch"])
    backend = options.backend
    channels, height, width = json.loads(metadata["input_size"])
    uint8 = metadata["input"] == "uint8"
    best, delay = _measured(directory, MEASURED_IN[backend], profile, dense)
    cores = len(os.sched_getaffinity(0))
    instances = options.instances or (min(2, cores) if backend == "python" else 1)
    return ModelSettings(
        name=name,
        backend=backend,
        uint8=uint8,
        shape=(height, width, channels) if uint8 else (channels, height, width),
        classes=int(metadata["num_classes"]),
        max_batch=profile.most,
        preferred=tuple(sorted({best, profile.most})),
        delay_us=delay,
        instances=instances,
        threads=options.threads or max(1, cores // instances),
        # What a client must know to prepare an image, and what a person may want to.
        parameters={key: metadata[key] for key in ("model", "precision", "input", "input_size", "preprocessing")}
        | {"precision": precision},
    )


def _measured(directory: Path, runtime: str, profile: BatchProfile, dense: bool) -> tuple[int, int]:
    """The batch with most images a second, and a tenth of its time in microseconds, from `lowpass benchmark`; else the
    profile's own best."""
    try:
        measured = json.loads((directory / "benchmark.json").read_bytes())
        batches = {
            int(batch): figures["dense" if dense else "slim"]
            for batch, figures in measured["runtimes"][runtime]["batches"].items()
            if profile.least <= int(batch) <= profile.most
        }
        best = max(batches, key=lambda batch: batches[batch]["images_per_s"])
        return best, int(min(LONGEST_DELAY_US, max(100, 100 * batches[best]["p50_ms"])))
    except (OSError, ValueError, KeyError, TypeError):  # not measured
        return profile.best, DEFAULT_DELAY_US


def _labels(directory: Path, file: Path | None, classes: int) -> Sequence[str]:
    if file is not None:
        try:
            labels = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the labels {file}: {error}; one a line, in the classes' order") from None
        if len(labels) != classes:
            raise InputError(f"{file} has {len(labels)} lines, the model {classes} classes; give one label a line")
        return labels
    return load_classes(directory, classes)


def _check_same_interface(model: Path, settings: ModelSettings) -> None:
    """Versions share one configuration, so they must share what it says of inputs and outputs."""
    path = model / CONFIG_FILE
    old: Any = parse_config(path.read_text(), str(path))
    new = config_of(settings, 1)
    if old.backend != new.backend or list(old.input) != list(new.input) or list(old.output) != list(new.output):
        raise InputError(f"{model} serves another backend, input or class count; give another --name")
