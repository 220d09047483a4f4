"""A candidate in a runtime, as a session; and what it is shown and held to."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from lowpass.benchmarks.speed.candidates import Candidate
from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.quantize import Quantization, quantize
from lowpass.export.onnx.trace import trace
from lowpass.export.options import Precision
from lowpass.export.runtimes.engine import FLAVOURS, compile_engine
from lowpass.export.runtimes.pytorch import TORCH, Capture, cuda_graph, torch_session
from lowpass.export.runtimes.registry import RuntimeName, onnx_session
from lowpass.export.runtimes.session import Images, Session
from lowpass.export.runtimes.tensorrt import TensorRT

Files = dict[tuple[str, Precision], bytes]  # ONNX files of one model, which several runtimes share
IMAGE = (3, 224, 224)
MIN_ROUNDS = 7
ENGINES = Path("runs/engines")  # that ONNX Runtime builds for TensorRT
# Largest logit difference from FP32 PyTorch over the largest logit; wide: noise makes tokens tie.
TOLERANCE: Mapping[Precision, float] = {"fp32": 0.02, "fp16": 0.1, "bf16": 0.25, "int8": 0.5}


def noise(batch: int) -> Images:
    """Images [B, 3, 224, 224]: what is seen does not matter to the time."""
    return np.random.default_rng(batch).standard_normal((batch, *IMAGE), np.float32)


def open_rival(
    rival: Candidate, runtime: RuntimeName, precision: Precision, files: Files, capture: Capture = cuda_graph
) -> tuple[Session, bytes | None]:
    """A session, and the ONNX file it runs where there is one, which is kept in `files`.

    Args:
        rival: the candidate.
        runtime: where it runs.
        precision: what it computes in.
        files: what was exported before.
        capture: for `pytorch-graph`.

    Raises:
        RunError: the runtime refuses it.
    """
    if runtime in TORCH:
        return torch_session(runtime, rival.at(precision), capture), None
    if (rival.name, precision) not in files:
        files[rival.name, precision] = _exported(rival, precision)
    content = files[rival.name, precision]
    if runtime in FLAVOURS:
        plan = compile_engine(runtime, content, BatchProfile(least=1, best=32, most=128)).plan
        return TensorRT(plan, runtime, {}), content
    cache = ENGINES / sha256(content).hexdigest()[:16]  # ONNX Runtime does not tell the models of one candidate apart
    if runtime == "onnxruntime-tensorrt":
        cache.mkdir(parents=True, exist_ok=True)
    return onnx_session(runtime, content, precision, cache), content


def _exported(rival: Candidate, precision: Precision) -> bytes:
    model = trace(rival.at(precision), torch.zeros(2, *IMAGE))
    if precision == "int8":
        model, _ = quantize(model, Quantization([noise(8)]))
    content: bytes = model.SerializeToString()
    return content
