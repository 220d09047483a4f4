"""What lies in a run directory and is of the model that is there now. What is of another is named, never shown."""

import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from pydantic import ValidationError

from lowpass.benchmarks.latency.compare import BENCHMARK_FILE, Benchmark
from lowpass.export.onnx.file import current_onnx, onnx_path, read_metadata, weights_path
from lowpass.export.onnx.optimum import MODEL_FILE, optimum_path
from lowpass.export.onnx.verify import VERIFICATION_FILE, Verification
from lowpass.export.options import PRECISIONS, Format, Precision
from lowpass.export.tensorrt.layers import Layers
from lowpass.export.tensorrt.plan import Manifest, load_layers, manifest_path, plan_path
from lowpass.export.torch_program import made_from, program_path
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import sha256
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.run.metrics import Metrics

GONE = "the file is gone"
NO_WEIGHTS = "the weights it was made from are not in the run"
OTHER_WEIGHTS = "made from other weights than the run's present ones; export again"


@dataclass(frozen=True)
class ExportedFile:
    """One ONNX file, program of `torch.export`, or folder for Optimum, whose `path` is the file in it. `stale` says why
    it is not of the present weights, `unverified` why nothing is known of it; None: it is, and something is.
    `left_out`: layers that 8 bits would have cost top-1. `pixels`: it takes them as they are, not normalised."""

    name: str
    precision: Precision
    dense: bool
    path: Path
    format: Format = "onnx"
    pixels: bool = False
    bytes: int | None = None
    verification: Verification | None = None
    left_out: tuple[str, ...] = ()
    stale: str | None = None
    unverified: str | None = None


@dataclass(frozen=True)
class Engine:
    """One TensorRT engine; `layers` is empty where its builder named no kernels. `stale` as above."""

    name: str
    precision: Precision
    dense: bool
    manifest: Manifest | None = None
    layers: tuple[Layers, ...] = ()
    stale: str | None = None


def exported_files(directory: Path) -> list[ExportedFile]:
    """Every exported file of a run and every one that `verification.json` speaks of: ONNX by precision, then programs,
    then folders for Optimum; slim before dense."""
    try:
        entries = dict(json.loads((directory / VERIFICATION_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        entries = {}
    found, folders = list[ExportedFile](), list[ExportedFile]()
    for precision, dense in product(PRECISIONS, (False, True)):
        path, folder = onnx_path(directory, precision, dense), optimum_path(directory, precision, dense)
        if path.exists() or path.name in entries:
            found.append(_onnx(ExportedFile(path.name, precision, dense, path), entries.get(path.name)))
        if (folder / MODEL_FILE).exists():
            folders.append(_optimum(ExportedFile(folder.name, precision, dense, folder / MODEL_FILE, "optimum")))
    for dense in (False, True):
        path = program_path(directory, dense)
        if path.exists() or path.name in entries:
            found.append(_program(ExportedFile(path.name, "fp32", dense, path, "torch-export"), entries.get(path.name)))
    return found + folders


def _onnx(file: ExportedFile, entry: object) -> ExportedFile:
    if not file.path.exists():
        return replace(file, stale=GONE)
    file = replace(file, bytes=file.path.stat().st_size)
    if stale := _stale_onnx(file.path.parent, file.precision, file.dense):
        return replace(file, stale=stale)
    metadata = read_metadata(file.path)
    left_out = tuple(json.loads(metadata.get("left_out", "[]")))
    return _verified(replace(file, left_out=left_out, pixels=metadata.get("input") == "uint8"), entry)


def _program(file: ExportedFile, entry: object) -> ExportedFile:
    if not file.path.exists():
        return replace(file, stale=GONE)
    file = replace(file, bytes=file.path.stat().st_size)
    weights = weights_path(file.path.parent, file.dense)
    if not weights.exists():
        return replace(file, stale=NO_WEIGHTS)
    return replace(file, stale=OTHER_WEIGHTS) if made_from(file.path) != sha256(weights) else _verified(file, entry)


def _optimum(file: ExportedFile) -> ExportedFile:
    """The folder's ONNX file is a copy, and as such not verified."""
    file = replace(file, bytes=file.path.stat().st_size)
    weights = weights_path(file.path.parents[1], file.dense)
    if not weights.exists():
        return replace(file, stale=NO_WEIGHTS)
    try:
        made = read_metadata(file.path).get("weights_sha256")
    except InputError:
        made = None
    if made != sha256(weights):
        return replace(file, stale=OTHER_WEIGHTS)
    return replace(
        file, unverified=f"made from {onnx_path(Path(), file.precision, file.dense)}, with another input name"
    )


def _verified(file: ExportedFile, entry: object) -> ExportedFile:
    path = file.path
    if not isinstance(entry, dict):
        return replace(file, unverified=f"{VERIFICATION_FILE} does not describe it")
    try:
        verification = Verification.model_validate({"file": path.name, **entry})
    except ValidationError:
        return replace(file, unverified=f"{VERIFICATION_FILE} cannot be read; export again")
    if verification.sha256 != sha256(path):
        return replace(file, unverified=f"{VERIFICATION_FILE} is of another file of this name")
    return replace(file, verification=verification)


def _stale_onnx(directory: Path, precision: Precision, dense: bool) -> str | None:
    if not weights_path(directory, dense).exists():
        return NO_WEIGHTS
    try:
        current_onnx(directory, precision, dense)
    except InputError:
        return OTHER_WEIGHTS
    return None


def engines(directory: Path) -> list[Engine]:
    """Every engine of a run, by precision, slim before dense. Whether one would run here is not asked."""
    return [
        _engine(directory, precision, dense)
        for precision in PRECISIONS
        for dense in (False, True)
        if plan_path(directory, precision, dense).exists()
    ]


def _engine(directory: Path, precision: Precision, dense: bool) -> Engine:
    plan, onnx_file = plan_path(directory, precision, dense), onnx_path(directory, precision, dense)
    try:
        manifest = Manifest.model_validate_json(manifest_path(plan).read_bytes())
        if _stale_onnx(directory, precision, dense) or manifest.onnx_sha256 != sha256(onnx_file):
            return Engine(plan.name, precision, dense, stale="built from another export; build again")
        if manifest.plan_sha256 != sha256(plan):
            return Engine(plan.name, precision, dense, stale="not what its manifest describes; build again")
        return Engine(plan.name, precision, dense, manifest, tuple(load_layers(plan)))
    except (OSError, ValidationError):
        return Engine(plan.name, precision, dense, stale="its manifest or its kernels cannot be read; build again")


def current_benchmark(directory: Path, architecture: Architecture) -> Benchmark | str:
    """The latencies of a run, or why there are none of the present model: fine-tuning changes none."""
    path = directory / BENCHMARK_FILE
    if not path.exists():
        return "not measured"
    try:
        measured = Benchmark.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return f"not measured: {BENCHMARK_FILE} cannot be read"
    if measured.model != architecture.dense.name or measured.macs.get("slim") != architecture.macs():
        return f"not measured: {BENCHMARK_FILE} is of another architecture than the run's present one"
    return measured


def stale_metrics(metrics: Metrics, architecture: Architecture, parameters: int) -> str | None:
    """Why a run's metrics cannot be of the model that is there; None: they can."""
    if (metrics.slim.macs, metrics.slim.parameters) == (architecture.macs(), parameters):
        return None
    return "metrics.json is of another model than the run's present one: its top-1 is not shown"
