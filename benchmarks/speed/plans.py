"""What a suite measures unless told otherwise, the most important first: a limit of time cuts off the end."""

from dataclasses import dataclass

import torch

from lowpass.benchmarks.speed.candidates import CANDIDATES
from lowpass.benchmarks.speed.measured import Engine
from lowpass.export.runtimes.pytorch import Capture, Captured, Compute, cuda_graph
from lowpass.export.runtimes.registry import SUPPORTED, missing

GPU_LIMIT_S = 500.0  # so that it ends within ten minutes
GPU_ENGINES: tuple[Engine, ...] = (
    ("pytorch-graph", "fp16"),
    ("pytorch-graph", "bf16"),
    ("pytorch-compile", "fp16"),
    ("tensorrt", "fp16"),
    ("tensorrt", "bf16"),
    ("tensorrt", "int8"),
    ("tensorrt-rtx", "fp16"),
    ("tensorrt-rtx", "bf16"),
    ("tensorrt-rtx", "int8"),
    ("onnxruntime-tensorrt", "fp16"),
    ("onnxruntime-tensorrt", "bf16"),
    ("onnxruntime-tensorrt", "int8"),
    ("onnxruntime-cuda", "fp16"),
    ("onnxruntime-cuda", "bf16"),
    ("pytorch", "fp16"),
)


@dataclass(frozen=True)
class Plan:
    """What is measured, in that order.

    `names` are of `CANDIDATES`; `seconds` is about how long each is timed for at each batch size; nothing is begun
    later than `limit_s`. `note` goes into the results: why their figures are none.
    """

    models: tuple[str, ...]
    batches: tuple[int, ...]
    engines: tuple[Engine, ...]
    names: tuple[str, ...] = CANDIDATES
    seconds: float = 2.0
    limit_s: float | None = None
    capture: Capture = cuda_graph
    note: str | None = None

    def reason_against(self, engine: Engine) -> str | None:
        """Why a runtime cannot run here, or None if it can."""
        if engine[0] == "pytorch-graph" and self.capture is uncaptured:
            return None
        return missing(engine[0])


def paper() -> Plan:
    """Against all rivals, in every runtime that is here and every precision that makes sense in it."""
    every: list[Engine] = [(runtime, precision) for runtime, all_ in SUPPORTED.items() for precision in all_]
    return Plan(("deit_small", "deit_tiny", "deit_base"), (1, 8, 32, 128), tuple(filter(_makes_sense, every)))


def _makes_sense(engine: Engine) -> bool:
    runtime, precision = engine
    if runtime in ("onnxruntime", "openvino"):
        return precision != "fp16"
    if runtime.startswith("pytorch"):
        on_gpu = torch.cuda.is_available()
        return precision == ("fp16" if on_gpu else "fp32") and (on_gpu or runtime == "pytorch")
    return precision != "fp32"


def gpu() -> Plan:
    """All that a GPU has; no runtime of the CPU. The shapes as published and uniform width only when asked for."""
    names = ("dense", "dense-exported", "lowpass", "evit", "tome")
    return Plan(("deit_small", "deit_tiny", "deit_base"), (1, 8, 32, 128), GPU_ENGINES, names, limit_s=GPU_LIMIT_S)


def dry_run() -> Plan:
    """The steps of `gpu` on a CPU, few and short, with plain calls in place of a CUDA graph."""
    engines = tuple(engine for engine in GPU_ENGINES if engine[0].startswith("pytorch"))
    note = "dry run on a CPU, without CUDA graphs: no figure here says anything of a GPU"
    return Plan(("deit_tiny",), (1,), engines, gpu().names, 0.05, GPU_LIMIT_S, uncaptured, note)


def uncaptured(compute: Compute) -> Captured:
    """In place of a CUDA graph: computes anew, into the same tensor."""
    output = compute()

    @torch.inference_mode()
    def again() -> None:
        output.copy_(compute())

    return again, output
