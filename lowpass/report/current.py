"""What lies in a run directory and is of the model that is there now. What is of another is named, never shown."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from lowpass.benchmarks.latency.compare import BENCHMARK_FILE, Benchmark
from lowpass.export.onnx.file import current_onnx, onnx_path, read_metadata, weights_path
from lowpass.export.onnx.verify import VERIFICATION_FILE, Verification
from lowpass.export.options import PRECISIONS, Precision
from lowpass.export.tensorrt.layers import Layers
from lowpass.export.tensorrt.plan import Manifest, load_layers, manifest_path, plan_path
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import sha256
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.run.metrics import Metrics


@dataclass(frozen=True)
class ExportedFile:
    """One ONNX file. `stale` says why it is not of the present weights, `unverified` why nothing is known of it; None:
    it is, and something is. `left_out`: layers that 8 bits would have cost top-1."""

    name: str
    precision: Precision
    dense: bool
    path: Path
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
    """Every ONNX file of a run and every one that `verification.json` speaks of, by precision, slim before dense."""
    try:
        entries = dict(json.loads((directory / VERIFICATION_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        entries = {}
    found = []
    for precision in PRECISIONS:
        for dense in (False, True):
            path = onnx_path(directory, precision, dense)
            if path.exists() or path.name in entries:
                found.append(_exported_file(directory, precision, dense, entries.get(path.name)))
    return found


def _exported_file(directory: Path, precision: Precision, dense: bool, entry: object) -> ExportedFile:
    path = onnx_path(directory, precision, dense)
    file = ExportedFile(path.name, precision, dense, path)
    if not path.exists():
        return replace(file, stale="the file is gone")
    file = replace(file, bytes=path.stat().st_size)
    if stale := _stale_onnx(directory, precision, dense):
        return replace(file, stale=stale)
    file = replace(file, left_out=tuple(json.loads(read_metadata(path).get("left_out", "[]"))))
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
        return "the weights it was made from are not in the run"
    try:
        current_onnx(directory, precision, dense)
    except InputError:
        return "made from other weights than the run's present ones; export again"
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
