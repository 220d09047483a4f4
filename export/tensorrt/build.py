"""TensorRT engines: `model.<precision>.plan` from the ONNX file, and a manifest that says what it is good for.

`tensorrt` and `tensorrt-rtx` share one API. TensorRT-RTX compiles without a GPU; running needs one in either.
"""

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.file import current_onnx, onnx_path, read_metadata
from lowpass.export.options import Precision
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import sha256, write_bytes, write_json

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")
NO_GPU = "built without a GPU"


class Manifest(BaseModel):
    """What determines an engine, written beside it as `<engine>.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: Flavour
    version: str
    gpu: str
    precision: Precision
    profile: BatchProfile
    onnx: str
    onnx_sha256: str
    plan_sha256: str
    messages: tuple[str, ...] = ()  # what the builder warned of


def plan_path(directory: Path, precision: Precision, dense: bool = False) -> Path:
    """`model.<precision>.plan`, or `dense.<precision>.plan`."""
    return onnx_path(directory, precision, dense).with_suffix(".plan")


def manifest_path(plan: Path) -> Path:
    """The manifest of an engine."""
    return plan.with_name(plan.name + ".json")


def installed_flavours() -> dict[Flavour, str]:
    """Installed TensorRT flavours and their versions, the preferred one first."""
    found = {}
    for flavour in FLAVOURS:
        try:
            found[flavour] = str(_module(flavour).__version__)
        except InputError:
            continue
    return found


def build(
    directory: Path,
    precision: Precision = "fp16",
    flavour: Flavour | None = None,
    dense: bool = False,
) -> Path:
    """Compile a run's exported model.

    Args:
        directory: the run, with `model.<precision>.onnx` exported from its present weights.
        precision: of the ONNX file; TensorRT keeps to it (strong typing). FP32 is refused, see below.
        flavour: None for `tensorrt` where it is installed, else `tensorrt-rtx`.
        dense: compile the dense model instead.

    Returns:
        The engine; its manifest and the timing cache lie beside it.

    Raises:
        InputError: no TensorRT, nothing exported, or FP32, whose `Attention` nodes TensorRT has no fused kernel for.
        RunError: the parser or the compiler refused the graph.
    """
    if precision == "fp32":
        raise InputError("TensorRT has no fused attention in FP32; export and build fp16")
    flavour = flavour or _preferred_flavour()
    trt = _module(flavour)
    onnx_file = current_onnx(directory, precision, dense)
    profile = BatchProfile.parse(read_metadata(onnx_file)["batch"])
    content = onnx_file.read_bytes()
    cache_file = directory / f"timing.{flavour}.cache"
    plan, cache, messages = compile_engine(
        flavour, content, profile, cache_file.read_bytes() if cache_file.exists() else b""
    )
    target = plan_path(directory, precision, dense)
    if cache:
        write_bytes(cache_file, cache)
    # The old manifest goes first: should we die between the two, a plan without a manifest is refused, never mistaken.
    manifest_path(target).unlink(missing_ok=True)
    write_bytes(target, plan)
    manifest = Manifest(
        runtime=flavour,
        version=str(trt.__version__),
        gpu=current_gpu() or NO_GPU,
        precision=precision,
        profile=profile,
        onnx=onnx_file.name,
        onnx_sha256=sha256(onnx_file),
        plan_sha256=sha256(target),
        messages=tuple(messages),
    )
    write_json(manifest_path(target), manifest.model_dump(mode="json"))
    return target


def current_plan(directory: Path, precision: Precision, flavour: Flavour, dense: bool = False) -> tuple[Path, Manifest]:
    """An engine that fits this ONNX file, this runtime version and this GPU.

    Raises:
        InputError: there is none; the message names what differs and the command that rebuilds it.
    """
    plan = plan_path(directory, precision, dense)
    remedy = f"run `lowpass build {directory} --precision {precision} --runtime {flavour}`"
    try:
        manifest = Manifest.model_validate_json(manifest_path(plan).read_bytes())
        content_hash = sha256(plan)
    except OSError as error:
        raise InputError(f"there is no engine {plan} with its manifest ({error.strerror}); {remedy}") from None
    except ValidationError:
        raise InputError(f"{manifest_path(plan)} is not an engine's manifest; {remedy}") from None
    onnx_file = current_onnx(directory, precision, dense)
    gpu = current_gpu() or NO_GPU
    # An engine of TensorRT-RTX is compiled for all its GPUs, one of TensorRT for the GPU it was built on.
    built_for = gpu if manifest.gpu == NO_GPU and flavour == "tensorrt-rtx" else manifest.gpu
    for what, was, now in (
        ("file", manifest.plan_sha256, content_hash),
        ("ONNX", manifest.onnx_sha256, sha256(onnx_file)),
        ("runtime", manifest.runtime, flavour),
        ("version", manifest.version, str(_module(flavour).__version__)),
        ("GPU", built_for, gpu),
    ):
        if was != now:
            raise InputError(f"{plan} does not fit: {what} is {now}, it was built for {was}; {remedy}")
    return plan, manifest


def current_gpu() -> str | None:
    """The GPU engines would run on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def load_engine(plan: bytes, flavour: Flavour) -> Any:
    """Deserialise an engine (needs a GPU).

    Raises:
        RunError: the runtime refuses it.
    """
    trt = _module(flavour)
    log = _fresh_log(flavour)
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise RunError(f"{flavour} cannot load the engine: {log.reason()}")
    return engine


def _preferred_flavour() -> Flavour:
    for flavour in FLAVOURS:
        if flavour in installed_flavours():
            return flavour
    raise InputError("no TensorRT is installed; pip install 'lowpass-vit[tensorrt-rtx]' or 'lowpass-vit[tensorrt]'")


def _module(flavour: Flavour) -> ModuleType:
    name = flavour.replace("-", "_")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{flavour} is not usable here ({error}); pip install 'lowpass-vit[{flavour}]'") from None


def compile_engine(
    flavour: Flavour, content: bytes, profile: BatchProfile, cache: bytes = b""
) -> tuple[bytes, bytes, list[str]]:
    """ONNX bytes -> engine, timing cache, warnings.

    Raises:
        InputError: the flavour is not installed.
        RunError: the parser or the compiler refused the graph.
    """
    trt = _module(flavour)
    log = _fresh_log(flavour)
    builder = trt.Builder(log)
    # TensorRT 10 must be told to keep the precisions of the ONNX file; later ones know no other way.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(content):
        problems = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise RunError(f"TensorRT's parser refused the ONNX file: {problems}")
    config = builder.create_builder_config()
    timing_cache = config.create_timing_cache(cache)
    config.set_timing_cache(timing_cache, ignore_mismatch=False)
    image = network.get_input(0)
    shapes = builder.create_optimization_profile()
    tail = tuple(image.shape)[1:]
    shapes.set_shape(image.name, *((batch, *tail) for batch in (profile.least, profile.best, profile.most)))
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RunError(f"TensorRT could not build the engine: {log.reason()}")
    serialised = config.get_timing_cache().serialize()
    return bytes(plan), bytes(serialised) if serialised is not None else b"", log.warnings


@cache
def _log_of(flavour: Flavour) -> Any:
    """One logger for as long as the process lives: TensorRT keeps a pointer to the first that it is given."""
    trt: Any = _module(flavour)

    class Log(trt.ILogger):
        """Keeps what is said instead of printing it."""

        def __init__(self) -> None:
            super().__init__()
            self.warnings: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and message not in self.warnings:
                self.warnings.append(message)

        def reason(self) -> str:
            return self.errors[-1] if self.errors else "it gave no reason"

    return Log()


def _fresh_log(flavour: Flavour) -> Any:
    """The logger, with nothing said yet."""
    log = _log_of(flavour)
    log.warnings, log.errors = [], []
    return log
