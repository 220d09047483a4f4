"""Every runtime by name: whether it can run here, what it runs, and a `Session` on a run's model."""

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from typing import Literal

import onnxruntime
import torch

from lowpass.export.options import Precision
from lowpass.export.runtimes.cpu import matrix_units
from lowpass.export.runtimes.engine import FLAVOURS, Flavour, installed_flavours
from lowpass.export.runtimes.onnx_packages import available_providers
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.openvino import OpenVino
from lowpass.export.runtimes.pytorch import TorchRuntime
from lowpass.export.runtimes.session import Session
from lowpass.pipeline.base.errors import InputError

RuntimeName = TorchRuntime | Literal["onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "openvino"] | Flavour
PROVIDERS: dict[str, str] = {
    "onnxruntime": "CPU",
    "onnxruntime-cuda": "CUDA",
    "onnxruntime-tensorrt": "Tensorrt",
}
# What each runtime can compute in, the default of a machine without matrix units first.
SUPPORTED: dict[RuntimeName, tuple[Precision, ...]] = {
    "pytorch": ("fp32", "fp16", "bf16"),
    "pytorch-graph": ("fp16", "bf16", "fp32"),
    "pytorch-compile": ("fp32", "fp16", "bf16"),
    "onnxruntime": ("fp32", "fp16", "int8", "int8-fp16", "fp8"),
    "onnxruntime-cuda": ("fp16", "fp32", "bf16"),
    "onnxruntime-tensorrt": ("fp16", "bf16", "int8-fp16", "fp8", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "tensorrt": ("fp16", "bf16", "int8-fp16", "fp8", "int8"),
    "tensorrt-rtx": ("fp16", "bf16", "int8-fp16", "fp8", "int8"),
}
RUNTIMES: tuple[RuntimeName, ...] = tuple(SUPPORTED)


def missing(runtime: RuntimeName) -> str | None:
    """Why a runtime cannot run here, or None if it can. Nothing is imported to find out but ONNX Runtime."""
    if runtime == "pytorch":
        return None
    if runtime == "onnxruntime":
        return None if available_providers() else "onnxruntime is broken; `lowpass doctor` says why"
    if runtime == "pytorch-compile":
        compiler = torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++")
        return None if compiler else "torch.compile needs a C++ compiler (g++ or clang++) on a CPU"
    if runtime == "openvino":
        return None if importlib.util.find_spec("openvino") else _install(runtime)
    if runtime in PROVIDERS:
        if f"{PROVIDERS[runtime]}ExecutionProvider" not in available_providers():
            remedy = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
            return f"this onnxruntime has no {PROVIDERS[runtime]} provider; {remedy}"
    elif runtime in FLAVOURS and runtime not in installed_flavours():
        return _install(runtime)
    return None if torch.cuda.is_available() else "it needs an NVIDIA GPU to run on"


def _install(runtime: RuntimeName) -> str:
    return f"{runtime} is not installed; pip install 'lowpass-vit[{runtime}]'"


def default_precision(runtime: RuntimeName) -> Precision:
    """FP16 on a GPU; on a CPU FP32, in OpenVINO BF16 where the CPU has matrix units for it."""
    if runtime.startswith("pytorch") and torch.cuda.is_available():
        return "fp16"
    if runtime == "openvino" and "amx_bf16" in matrix_units():
        return "bf16"
    return SUPPORTED[runtime][0]


def describe_runtime(runtime: RuntimeName) -> str:
    """Version and device, for a report."""
    if runtime.startswith("pytorch"):
        return f"torch {torch.__version__}, {'cuda' if torch.cuda.is_available() else 'cpu'}"
    if runtime in PROVIDERS:
        return f"onnxruntime {onnxruntime.__version__}, {PROVIDERS[runtime]}"
    if runtime == "openvino":
        return f"openvino {importlib.metadata.version('openvino')}, cpu"
    assert runtime in FLAVOURS
    return f"{runtime} {installed_flavours()[runtime]}"


def onnx_session(runtime: RuntimeName, content: bytes, precision: Precision, directory: Path) -> Session:
    """A session on the bytes of an ONNX file; what the runtime builds from it is cached in `directory`.

    Raises:
        RunError: the runtime cannot load it.
    """
    if runtime == "openvino":
        return OpenVino(content, precision)
    options = {}
    if runtime == "onnxruntime-tensorrt":
        cache = directory / "cache"
        cache.mkdir(exist_ok=True)
        options = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
    return OnnxRuntime(content, PROVIDERS[runtime], options)


def check_precision(runtime: RuntimeName, precision: Precision) -> None:
    """Refuse what a runtime cannot compute in.

    Raises:
        InputError: naming what it can.
    """
    if precision not in SUPPORTED[runtime]:
        raise InputError(f"{runtime} does not run {precision}; choose from {', '.join(SUPPORTED[runtime])}")


DEFAULT_RUNTIMES = tuple(runtime for runtime in RUNTIMES if runtime != "pytorch-compile")  # it compiles for minutes


def parse_runtimes(text: str | None) -> tuple[RuntimeName, ...]:
    """Names separated by commas; None: all but the slow-starting `pytorch-compile`.

    Raises:
        InputError: one is unknown.
    """
    if text is None:
        return DEFAULT_RUNTIMES
    names = [name.strip() for name in text.split(",")]
    chosen = tuple(runtime for name in names for runtime in RUNTIMES if runtime == name)
    if len(chosen) != len(names):
        unknown = next(name for name in names if name not in RUNTIMES)
        raise InputError(f"there is no runtime {unknown!r}; choose from {', '.join(RUNTIMES)}")
    return chosen
