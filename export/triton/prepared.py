"""A run's exported model made ready for Triton: checked, with its settings, its labels and what it is."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import onnxruntime
from pydantic import ValidationError

from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.file import current_onnx, read_metadata
from lowpass.export.options import Precision
from lowpass.export.runtimes.engine import current_gpu
from lowpass.export.tensorrt.plan import NO_GPU, Manifest, manifest_path, plan_path
from lowpass.export.triton.config import (
    ACCELERATED,
    LABELS_FILE,
    MODEL_FILES,
    Accelerator,
    Backend,
    ModelSettings,
    config_of,
)
from lowpass.export.triton.decode import DecodeLimits, label_text, picture_models
from lowpass.export.triton.version import FACTS_FILE, ModelVersion, VersionFacts, checked_name
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import sha256
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.base.version import __version__
from lowpass.pipeline.model.classes import load_classes
from lowpass.pipeline.run.metrics import Metrics

DEFAULT_DELAY_US, LONGEST_DELAY_US = 1000, 5000
MOST_THREADS = 1024  # of all instances together: no machine has more cores to spare for one model
LAST_VERSION = 2**31 - 1  # Triton's are 64 bits wide; nobody counts that far
QUEUE_LIMIT, QUEUE_TIMEOUT_MS = 256, 5000
MEASURED_IN: dict[Backend, str] = {"python": "onnxruntime", "onnxruntime": "onnxruntime", "tensorrt": "tensorrt"}
MODEL_CODE = Path(__file__).parent / "backend" / "model.py"


@dataclass(frozen=True)
class DeployOptions:
    """How to serve. None: the default; `instances` 1 on a GPU, 2 on a CPU, which share its cores as `threads`.

    `queue_limit` requests may wait, each `queue_timeout_ms` milliseconds (0: for ever); the rest is refused with 503.
    `accelerator` is the one that ONNX Runtime uses on a GPU. `decode`: pictures in, labels out, as `decode.py` says."""

    backend: Backend = "python"
    precision: Precision | None = None
    version: int | None = None
    labels: Path | None = None
    instances: int | None = None
    threads: int | None = None
    queue_limit: int = QUEUE_LIMIT
    queue_timeout_ms: int = QUEUE_TIMEOUT_MS
    accelerator: Accelerator = "cuda"
    decode: DecodeLimits | None = None


@dataclass(frozen=True)
class Prepared:
    """A model that was checked and can be written: how it is served, its files by name, its labels, and whether
    pictures are taken in front of it."""

    settings: ModelSettings
    files: Mapping[str, Path | str]
    labels: Sequence[str]
    decode: DecodeLimits | None

    def models(self, version: int) -> list[ModelVersion]:
        """All that is to be written as one version: the model first, then what stands around it."""
        model = ModelVersion(self.settings.name, config_of(self.settings, version), self.files)
        return [model, *(picture_models(self.settings, self.labels, self.decode) if self.decode else [])]


def prepare(directory: Path, name: str, options: DeployOptions, dense: bool) -> Prepared:
    """Check all that can be checked before anything is written.

    Raises:
        InputError: see `deploy`.
        RunError: see `deploy`.
    """
    checked_name(name)
    if options.version is not None and not 1 <= options.version <= LAST_VERSION:
        raise InputError(f"--version {options.version} is not one of 1 to {LAST_VERSION}")
    backend = options.backend
    precision: Precision = options.precision or ("fp16" if backend == "tensorrt" else "fp32")
    source = onnx_file = current_onnx(directory, precision, dense)
    metadata = read_metadata(onnx_file)
    if options.accelerator == "tensorrt" and (backend != "onnxruntime" or precision not in ACCELERATED):
        raise InputError(
            f"--accelerator tensorrt is for --backend onnxruntime and --precision {', '.join(ACCELERATED)}, not for "
            f"{backend} and {precision}"
        )
    profile = BatchProfile.parse(metadata["batch"])
    if backend == "tensorrt":
        source, profile = _engine(directory, precision, dense, onnx_file)
    else:
        _try_load(onnx_file)
    settings = _settings(directory, name, options, metadata, precision, profile, dense)
    labels = _labels(directory, options.labels, settings.classes)
    figures = getattr(Metrics.load(directory), "dense" if dense else "slim")
    facts = VersionFacts(
        model=metadata["model"],
        kind="dense" if dense else "slim",
        backend=backend,
        precision=precision,
        top1=figures.top1,
        macs=figures.macs,
        max_batch=profile.most,
        deployed=datetime.now(UTC).isoformat(timespec="seconds"),
        lowpass=__version__,
    )
    files: dict[str, Path | str] = {
        MODEL_FILES[backend]: source,
        LABELS_FILE: label_text(labels),
        FACTS_FILE: facts.model_dump_json(indent=2) + "\n",
    }
    if backend == "python":
        files["model.py"] = MODEL_CODE
    return Prepared(settings, files, labels, options.decode)


def _engine(directory: Path, precision: Precision, dense: bool, onnx_file: Path) -> tuple[Path, BatchProfile]:
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
    if manifest.profile.least > 1:
        raise InputError(
            f"{plan} takes no batch below {manifest.profile.least}, and Triton forms batches of one; `lowpass export "
            f"{directory} --precision {precision} --batch 1:{manifest.profile.best}:{manifest.profile.most}`, and build"
        )
    return plan, manifest.profile


def _try_load(onnx_file: Path) -> None:
    try:
        onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise RunError(f"ONNX Runtime cannot load {onnx_file}, it was not deployed: {error}") from None


def _settings(
    directory: Path,
    name: str,
    options: DeployOptions,
    metadata: dict[str, str],
    precision: Precision,
    profile: BatchProfile,
    dense: bool,
) -> ModelSettings:
    backend = options.backend
    channels, height, width = json.loads(metadata["input_size"])
    uint8 = metadata["input"] == "uint8"
    best, delay = _measured(directory, MEASURED_IN[backend], profile, dense)
    instances, threads = _sessions(options)
    return ModelSettings(
        name=name,
        backend=backend,
        precision=precision,
        uint8=uint8,
        shape=(height, width, channels) if uint8 else (channels, height, width),
        classes=int(metadata["num_classes"]),
        profile=profile,
        preferred=tuple(sorted({best, profile.most})),
        delay_us=delay,
        queue_limit=options.queue_limit,
        queue_timeout_ms=options.queue_timeout_ms,
        instances=instances,
        threads=threads,
        accelerator=options.accelerator,
        parameters={key: metadata[key] for key in ("model", "precision", "input", "input_size", "preprocessing")}
        | {"precision": precision},
    )


def _sessions(options: DeployOptions) -> tuple[int, int]:
    """How many sessions there are, and how many threads each has."""
    cores = len(os.sched_getaffinity(0))
    instances = options.instances or (min(2, cores) if options.backend == "python" else 1)
    threads = options.threads or max(1, cores // instances)
    if options.backend == "tensorrt":
        if options.threads is not None:
            raise InputError(f"--threads {threads} is of ONNX Runtime, and --backend tensorrt has none; leave it out")
        return instances, threads
    together = instances * threads
    if together > MOST_THREADS:
        raise InputError(
            f"--instances {instances} of --threads {threads} are {together} threads, and the most are {MOST_THREADS}; "
            f"this machine has {cores} cores"
        )
    if together > cores:
        side_by_side = min(instances, cores)
        logger.warning(
            "--instances %d of --threads %d are %d threads, more than the %d cores of this machine: served here, they "
            "wait for each other; --instances %d --threads %d would fill it",
            *(instances, threads, together, cores, side_by_side, cores // side_by_side),
        )
    return instances, threads


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not measured
        return profile.best, DEFAULT_DELAY_US


def _labels(directory: Path, file: Path | None, classes: int) -> Sequence[str]:
    if file is None:
        labels: Sequence[str] = load_classes(directory, classes)
        source = f"the class names of {directory}"
    else:
        try:
            labels = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the labels {file}: {error}; one a line, in the classes' order") from None
        if len(labels) != classes:
            raise InputError(f"{file} has {len(labels)} lines, the model {classes} classes; give one label a line")
        labels, source = [label.removesuffix("\r") for label in labels], str(file)
    for index, label in enumerate(labels):
        if (
            not label.strip() or "\n" in label or "\r" in label
        ):  # Triton reads a label a line, and answers with none for an empty one
            raise InputError(f"{source}: class {index} is called {label!r}; a label is one line that is not empty")
        if any("\ud800" <= letter <= "\udfff" for letter in label):  # of a folder's name that is not UTF-8
            raise InputError(f"{source}: class {index} is called {label!r}, which is no text; give --labels FILE")
    return labels
