"""ONNX bytes to a TensorRT engine, and back into the process. `tensorrt` and `tensorrt-rtx` share one API."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch

from lowpass.export.batch import BatchProfile
from lowpass.pipeline.base.errors import InputError, RunError

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")


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
    flavour: Flavour, content: bytes, profile: BatchProfile, cache: bytes = b""
) -> tuple[bytes, bytes, list[str]]:
    """ONNX bytes -> engine, timing cache, warnings.

    Raises:
        InputError: the flavour is not installed.
        RunError: the parser or the compiler refused the graph.
    """
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
    image = network.get_input(0)
    shapes = builder.create_optimization_profile()
    tail = tuple(image.shape)[1:]
    shapes.set_shape(image.name, *((batch, *tail) for batch in (profile.least, profile.best, profile.most)))
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RunError(f"TensorRT could not build the engine: {log.reason()}")
    serialised = config.get_timing_cache().serialize()
    return bytes(plan), b"" if serialised is None else bytes(serialised), log.warnings


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
