"""ONNX bytes to a TensorRT engine, and back into the process. `tensorrt` and `tensorrt-rtx` share one API."""

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch

from lowpass.export.batch import BatchProfile
from lowpass.pipeline.base.errors import InputError, RunError

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")
# What TensorRT-RTX compiles for: Turing (T4), A100, other Ampere (A10), Ada (L4, L40S), Blackwell.
Capability = Literal["75", "80", "86", "89", "120"]


@dataclass(frozen=True)
class Compiled:
    """An engine, the timing cache it leaves, what the builder warned of, and the lines of its log that may name a
    kernel (TensorRT-RTX alone has any)."""

    plan: bytes
    timing_cache: bytes
    warnings: tuple[str, ...]
    log: tuple[str, ...]


def installed_flavours() -> dict[Flavour, str]:
    """Installed TensorRT flavours and their versions, the preferred one first."""
    found = {}
    for flavour in FLAVOURS:
        try:
            found[flavour] = str(tensorrt_module(flavour).__version__)
        except InputError:
            continue
    return found


def current_gpu() -> str | None:
    """The GPU engines would run on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def load_engine(plan: bytes, flavour: Flavour) -> Any:
    """Deserialise an engine (needs a GPU).

    Raises:
        RunError: the runtime refuses it.
    """
    trt = tensorrt_module(flavour)
    log = _fresh_log(flavour)
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise RunError(f"{flavour} cannot load the engine: {log.reason()}")
    return engine


def preferred_flavour() -> Flavour:
    """`tensorrt` where it is installed, else `tensorrt-rtx`.

    Raises:
        InputError: neither is.
    """
    for flavour in FLAVOURS:
        if flavour in installed_flavours():
            return flavour
    raise InputError("no TensorRT is installed; pip install 'lowpass-vit[tensorrt-rtx]' or 'lowpass-vit[tensorrt]'")


def tensorrt_module(flavour: Flavour) -> ModuleType:
    """The Python package of a flavour.

    Raises:
        InputError: it is not usable here.
    """
    name = flavour.replace("-", "_")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{flavour} is not usable here ({error}); pip install 'lowpass-vit[{flavour}]'") from None


def compile_engine(
    flavour: Flavour, content: bytes, profile: BatchProfile, cache: bytes = b"", capability: Capability | None = None
) -> Compiled:
    """ONNX bytes -> engine.

    Args:
        flavour: `tensorrt` or `tensorrt-rtx`.
        content: the ONNX file.
        profile: batch sizes; see `BatchProfile.optimisations`.
        cache: of an earlier build.
        capability: for GPUs of that compute capability alone; None: those that TensorRT-RTX chooses, or the GPU here.

    Raises:
        InputError: the flavour is not installed, or is told a compute capability that it does not take.
        RunError: the parser or the compiler refused the graph.
    """
    if capability is not None and flavour != "tensorrt-rtx":
        raise InputError("--compute-capability is for tensorrt-rtx; tensorrt builds for the GPU that it runs on")
    trt = tensorrt_module(flavour)
    log = _fresh_log(flavour)
    builder = trt.Builder(log)
    # TensorRT 10 must be told to keep the precisions of the ONNX file; later ones know no other way.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    if problems := _parse(trt, network, log, content):
        raise RunError(f"TensorRT's parser refused the ONNX file: {problems}")
    config = builder.create_builder_config()
    config.set_timing_cache(config.create_timing_cache(cache), ignore_mismatch=False)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the builder's log then names every kernel
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)
    image = network.get_input(0)
    tail = tuple(image.shape)[1:]
    for batches in profile.optimisations():
        shapes = builder.create_optimization_profile()
        shapes.set_shape(image.name, *((batch, *tail) for batch in batches))
        config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RunError(f"TensorRT could not build the engine: {log.reason()}")
    serialised = config.get_timing_cache().serialize()
    timing = b"" if serialised is None else bytes(serialised)
    return Compiled(bytes(plan), timing, tuple(log.warnings), tuple(log.kernels))


def _parse(trt: Any, network: Any, log: Any, content: bytes) -> str:
    """Fill the network; what the parser refused, or nothing.

    A function of its own, so that the parser is gone before the network: it points into it, but does not keep it alive
    in Python (seen in tensorrt-rtx 1.7.1), whose locals are freed in the order they were made.
    """
    parser = trt.OnnxParser(network, log)
    if parser.parse(content):
        return ""
    return "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or "it gave no reason"


@cache
def _log_of(flavour: Flavour) -> Any:
    """One logger for as long as the process lives: TensorRT keeps a pointer to the first that it is given."""
    trt: Any = tensorrt_module(flavour)

    class Log(trt.ILogger):
        """Keeps what is said instead of printing it."""

        def __init__(self) -> None:
            super().__init__()
            self.warnings: list[str] = []
            self.errors: list[str] = []
            self.kernels: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and message not in self.warnings:
                self.warnings.append(message)
            elif "LayerType:" in message:
                self.kernels += [line for line in message.splitlines() if "LayerType:" in line]

        def reason(self) -> str:
            return self.errors[-1] if self.errors else "it gave no reason"

    return Log()


def _fresh_log(flavour: Flavour) -> Any:
    """The logger, with nothing said yet."""
    log = _log_of(flavour)
    log.warnings, log.errors, log.kernels = [], [], []
    return log
