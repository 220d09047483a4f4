"""Where latencies are measured: a runtime, a precision and a batch size on this machine, and sessions warm there."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from lowpass.benchmarks.latency.machine import describe
from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.quantize import Quantization, quantize
from lowpass.export.onnx.trace import trace
from lowpass.export.options import DTYPES, Precision
from lowpass.export.runtimes.engine import FLAVOURS, compile_engine
from lowpass.export.runtimes.pytorch import TORCH, torch_session
from lowpass.export.runtimes.registry import RuntimeName, check_precision, describe_runtime, missing, onnx_session
from lowpass.export.runtimes.session import Images, Session
from lowpass.export.runtimes.tensorrt import TensorRT
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.architecture import DenseViT

QUANTILE = 10  # percent: a busy machine slows single runs down tenfold, and speeds none up


@dataclass(frozen=True)
class TimingSetup:
    """Where and how parts are run; what a runtime caches goes to `folder`."""

    runtime: RuntimeName
    precision: Precision
    batch: int
    folder: Path

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return DTYPES[self.precision]


def refuse(runtime: RuntimeName, precision: Precision) -> None:
    """Refuse where nothing can be measured.

    Raises:
        InputError: the runtime is missing here, lacks the precision, or would compile for hours.
    """
    reason = missing(runtime)
    if runtime == "pytorch-compile":
        reason = "it would compile every size of every part; take pytorch, or the runtime you deploy"
    if reason is not None:
        raise InputError(f"cannot measure latencies on {runtime}: {reason}")
    check_precision(runtime, precision)


def machine_of(runtime: RuntimeName) -> dict[str, str]:
    """What latencies hang on. A virtual CPU's name may say little, its matrix units more."""
    machine = describe()
    return {
        "runtime": describe_runtime(runtime),
        "cpu": machine.cpu,
        "matrix units": ", ".join(machine.matrix_units) or "none",
        "cores": str(machine.cores),
        "gpu": machine.gpu or "none",
    }


def whole_session(module: nn.Module, dense: DenseViT, setup: TimingSetup, quantised: bool) -> Session:
    """A warm session on a module from images to logits."""
    images = noise(setup.batch, dense.in_chans, *dense.img_size)
    if setup.runtime in TORCH:
        return warm(torch_session(setup.runtime, module.eval()), images)
    graph = trace(module.eval(), torch.zeros(2, dense.in_chans, *dense.img_size))
    if quantised and setup.precision == "int8":
        graph, _ = quantize(graph, Quantization([images]))
    return warm(open_graph(graph, setup), images)


def open_graph(graph: onnx.ModelProto, setup: TimingSetup) -> Session:
    """A session on an ONNX graph; for TensorRT its engine is built.

    Raises:
        RunError: the runtime refuses it.
    """
    content: bytes = graph.SerializeToString()
    if setup.runtime in FLAVOURS:
        profile = BatchProfile(least=setup.batch, best=setup.batch, most=setup.batch)
        timing = setup.folder / "timing.cache"  # parts share kernels
        compiled = compile_engine(setup.runtime, content, profile, timing.read_bytes() if timing.exists() else b"")
        timing.write_bytes(compiled.timing_cache)
        return TensorRT(compiled.plan, setup.runtime, {})
    return onnx_session(setup.runtime, content, setup.precision, setup.folder)


def noise(*shape: int) -> Images:
    """What is seen does not matter to the time."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def warm(session: Session, images: Images) -> Session:
    """Loaded, and run as often as it takes a runtime to allocate what it needs."""
    session.load(images)
    for _ in range(2):
        session.run()
    return session
