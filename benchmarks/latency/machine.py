"""What this machine can do: for `lowpass doctor`, and beside every measurement."""

import importlib.metadata
import os
import platform
import shutil

import torch
from pydantic import BaseModel, ConfigDict

from lowpass.benchmarks.latency.gpu import GpuState, gpu_state
from lowpass.export.runtimes.cpu import cpu_info, matrix_units
from lowpass.export.runtimes.engine import current_gpu, installed_flavours
from lowpass.export.runtimes.onnx_packages import available_providers
from lowpass.export.runtimes.registry import RUNTIMES, missing

PACKAGES = ("lowpass-vit", "torch", "timm", "torch-pruning", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino")


class Machine(BaseModel):
    """The hardware and software that a figure was measured with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    cores: int
    matrix_units: tuple[str, ...]  # of the CPU, as the kernel names them
    memory_gib: float
    gpu: str | None
    gpu_memory_gib: float | None
    gpu_state: GpuState
    cuda: str | None  # that torch was built with
    threads: dict[str, int | None]  # torch's, and what the environment asks of OpenMP
    python: str
    packages: dict[str, str]
    onnxruntime_providers: tuple[str, ...]
    tensorrt: dict[str, str]  # flavour -> version
    triton: str | None  # the server's binary
    runtimes: dict[str, str | None]  # name -> why it cannot run here, or None


def describe() -> Machine:
    """This machine, now."""
    gpu_memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None
    return Machine(
        cpu=cpu_info().get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        matrix_units=matrix_units(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpu=current_gpu(),
        gpu_memory_gib=None if gpu_memory is None else round(gpu_memory, 1),
        gpu_state=gpu_state(),
        cuda=torch.version.cuda,
        threads={
            "torch": torch.get_num_threads(),
            "torch between operators": torch.get_num_interop_threads(),
            "OMP_NUM_THREADS": int(asked) if (asked := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() else None,
        },
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
        onnxruntime_providers=available_providers(),
        tensorrt=dict(installed_flavours()),
        triton=shutil.which("tritonserver"),
        runtimes={name: missing(name) for name in RUNTIMES},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def in_a_line(machine: Machine) -> str:
    """What a table was measured on, for its heading."""
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    return f"{machine.cpu}, {machine.cores} cores, {machine.gpu or 'no GPU'}; {packages}"


def _clocks(state: GpuState) -> str:
    known = {
        "now": (state.sm_clock_mhz, "MHz"),
        "at most": (state.max_sm_clock_mhz, "MHz"),
        "memory": (state.memory_clock_mhz, "MHz"),
        "power limit": (state.power_limit_w, "W"),
    }
    return (
        ", ".join(f"{name} {value} {unit}" for name, (value, unit) in known.items() if value is not None) or "unknown"
    )


def as_text(machine: Machine) -> str:
    """For people, one fact a line."""
    gpu = "none" if machine.gpu is None else f"{machine.gpu}, {machine.gpu_memory_gib} GiB"
    lines = {
        "CPU": f"{machine.cpu}, {machine.cores} cores ({', '.join(machine.matrix_units) or 'no matrix units'})",
        "memory": f"{machine.memory_gib} GiB",
        "threads": ", ".join(f"{name} {count}" for name, count in machine.threads.items() if count is not None),
        "GPU": gpu,
        "GPU driver": machine.gpu_state.driver or "unknown",
        "GPU clocks": _clocks(machine.gpu_state),
        "CUDA of torch": machine.cuda or "none",
        "Python": machine.python,
        **machine.packages,
        "ONNX Runtime on": ", ".join(machine.onnxruntime_providers),
        "TensorRT": ", ".join(f"{name} {version}" for name, version in machine.tensorrt.items()) or "not installed",
        "Triton server": machine.triton or "not found",
        **{f"runs {name}": "yes" if reason is None else f"no: {reason}" for name, reason in machine.runtimes.items()},
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
