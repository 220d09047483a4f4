"""The speed benchmark: lowpass against its rivals at matched MACs, on every runtime there is.

    python -m lowpass.benchmarks.speed --suite paper    DeiT-Tiny, -Small, -Base
    python -m lowpass.benchmarks.speed --suite gpu      the one script for a GPU machine

Weights are random: shapes are static, so that a latency does not hang on them. Every model's logits are checked against
its own FP32 PyTorch module before it is timed. Results are written after every runtime, so that a kill leaves what is
done; what cannot run or does not fit into the time is written down as not measured, with the reason.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.latency.timing import check_logits, interleaved, latency, speedup
from lowpass.benchmarks.rows import write_rows
from lowpass.benchmarks.speed.candidates import CANDIDATES, Candidate, candidates
from lowpass.benchmarks.speed.measured import Engine, EngineResult, ModelResult, Suite, Timed
from lowpass.benchmarks.speed.memory import peak_memory
from lowpass.benchmarks.speed.plot import plot_efficiency
from lowpass.benchmarks.speed.result_rows import rows
from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.quantize import Quantization, quantize
from lowpass.export.onnx.trace import trace
from lowpass.export.options import Precision
from lowpass.export.runtimes.engine import FLAVOURS, compile_engine
from lowpass.export.runtimes.pytorch import PyTorch
from lowpass.export.runtimes.registry import PROVIDERS, SUPPORTED, RuntimeName, describe_runtime, missing, onnx_session
from lowpass.export.runtimes.session import Images, Session
from lowpass.export.runtimes.tensorrt import TensorRT
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.files import write_bytes
from lowpass.pipeline.base.progress import console

Files = dict[tuple[str, Precision], bytes]  # ONNX files of one model, which several runtimes share
IMAGE = (3, 224, 224)
MEMORY_BATCH = 8
MIN_ROUNDS = 7
ENGINES = Path("runs/engines")  # that ONNX Runtime builds for TensorRT
# Largest logit difference from FP32 PyTorch over the largest logit; wide: noise makes tokens tie.
TOLERANCE: dict[Precision, float] = {"fp32": 0.02, "fp16": 0.1, "bf16": 0.25, "int8": 0.5}


def engines_here(suite: str, wanted: Sequence[Engine] | None) -> list[tuple[Engine, str | None]]:
    """What to run, each with the reason why it cannot be. On a GPU the GPU suite leaves CPU runtimes out."""
    every: list[Engine] = [(runtime, precision) for runtime, all_ in SUPPORTED.items() for precision in all_]
    chosen = list(wanted) if wanted is not None else [engine for engine in every if _by_default(suite, engine)]
    return [(engine, missing(engine[0])) for engine in chosen]


def _by_default(suite: str, engine: Engine) -> bool:
    runtime, precision = engine
    on_gpu = torch.cuda.is_available()
    if runtime in ("onnxruntime", "openvino"):
        return not (suite == "gpu" and on_gpu) and precision != "fp16"
    if runtime.startswith("pytorch"):
        return precision == ("fp16" if on_gpu else "fp32") and (on_gpu or runtime == "pytorch")
    return precision != "fp32"


def run_suite(
    suite: str,
    out: Path,
    models: Sequence[str],
    batches: Sequence[int],
    engines: Sequence[Engine] | None = None,
    names: tuple[str, ...] = CANDIDATES,
    seconds: float = 2.0,
    limit_s: float | None = None,
) -> Suite:
    """Measure and write `speed_SUITE.csv` and a plot a model into `out`.

    Args:
        suite: `paper` or `gpu`.
        out: the folder.
        models: of `candidates.MODELS`.
        batches: batch sizes.
        engines: runtimes with precisions; None for the suite's own choice.
        names: of `CANDIDATES`; `dense` must be among them.
        seconds: about how long each candidate is timed for at each batch size.
        limit_s: do not begin another measurement later than this.
    """
    began = time.monotonic()
    results: dict[str, ModelResult] = {}

    def snapshot() -> Suite:
        return Suite(
            suite=suite,
            command=shlex.join(["python", "-m", "lowpass.benchmarks.speed", *sys.argv[1:]]),
            seconds=time.monotonic() - began,
            machine=describe(),
            models=results,
        )

    for model in models:
        rivals = candidates(model, names)
        files: Files = {}
        results[model] = ModelResult(macs={rival.name: rival.macs for rival in rivals}, engines=[])
        for (runtime, precision), reason in engines_here(suite, engines):
            late = limit_s is not None and time.monotonic() - began > limit_s
            reason = reason or ("out of time" if late else None)
            console.print(f"{model}: {runtime} {precision}: {reason or 'measuring'}", soft_wrap=True)
            if reason is None:
                deadline = None if limit_s is None else began + limit_s
                measured = _measure(rivals, runtime, precision, batches, seconds, out, deadline, files)
            else:
                measured = EngineResult(runtime=runtime, precision=precision, not_measured=reason)
            results[model].engines.append(measured)
            so_far = snapshot()
            write_rows(out / f"speed_{suite}.csv", rows(so_far), so_far.machine, so_far.command)
        plot_efficiency(snapshot().models[model], model, out / f"speed_{suite}_{model}.png")
    return snapshot()


def _measure(
    rivals: Sequence[Candidate],
    runtime: RuntimeName,
    precision: Precision,
    batches: Sequence[int],
    seconds: float,
    out: Path,
    deadline: float | None,
    files: Files,
) -> EngineResult:
    """All candidates in one runtime at one precision; one that the runtime refuses is left out, and said."""
    sessions: dict[str, Session] = {}
    sizes: dict[str, int] = {}
    memory: dict[str, float | None] = {}
    problems = []
    for rival in rivals:
        try:
            sessions[rival.name], content = open_rival(rival, runtime, precision, out, files)
            check_logits(sessions[rival.name], rival.at("fp32"), noise(2), TOLERANCE[precision])
        except RunError as error:
            sessions.pop(rival.name, None)
            problems.append(f"{rival.name}: {error}")
            continue
        if content is not None:
            sizes[rival.name] = len(content)
            memory[rival.name] = peak_memory(content, runtime, precision, MEMORY_BATCH, IMAGE)
    measured: dict[int, dict[str, Timed]] = {}
    for batch in batches if "dense" in sessions else ():
        if deadline is not None and time.monotonic() > deadline:
            problems.append(f"batch {batch}: out of time")
            break
        try:
            measured[batch] = _one_batch(rivals, sessions, batch, seconds)
        except (RunError, RuntimeError) as error:
            problems.append(f"batch {batch}: {error}")
    for problem in problems:
        console.print(f"  not measured: {problem}", soft_wrap=True)
    return EngineResult(
        runtime=runtime,
        precision=precision,
        description=describe_runtime(runtime),
        not_measured="; ".join(problems) or None,
        file_bytes=sizes,
        peak_memory_mib=memory,
        batches=measured,
    )


def _one_batch(
    rivals: Sequence[Candidate], sessions: dict[str, Session], batch: int, seconds: float
) -> dict[str, Timed]:
    images = noise(batch)
    for session in sessions.values():
        session.load(images)
    timed = interleaved(sessions, seconds, MIN_ROUNDS)
    macs = {rival.name: rival.macs for rival in rivals}
    figures = {}
    for name, rounds in timed.items():
        factor, quartiles = speedup(timed["dense"], rounds)
        figures[name] = Timed(
            latency=latency(rounds, batch),
            speedup=factor,
            speedup_quartiles=quartiles,
            efficiency=factor / (macs["dense"] / macs[name]),
        )
    return figures


def noise(batch: int) -> Images:
    """Images [B, 3, 224, 224]: what is seen does not matter to the time."""
    return np.random.default_rng(batch).standard_normal((batch, *IMAGE), np.float32)


def open_rival(
    rival: Candidate, runtime: RuntimeName, precision: Precision, out: Path, files: Files
) -> tuple[Session, bytes | None]:
    """A session, and the ONNX file it runs where there is one; what is made is kept in `files`, or cached in `out`."""
    if runtime in ("pytorch", "pytorch-compile"):
        return PyTorch(rival.at(precision), compiled=runtime == "pytorch-compile"), None
    if (rival.name, precision) not in files:
        files[rival.name, precision] = _exported(rival, precision)
    content = files[rival.name, precision]
    if runtime in FLAVOURS:
        compiled = compile_engine(runtime, content, BatchProfile(least=1, best=32, most=128))
        return TensorRT(compiled.plan, runtime, {}), content
    cache = ENGINES / f"{rival.name}.{precision}"
    if runtime in PROVIDERS and PROVIDERS[runtime] == "Tensorrt":
        write_bytes(cache / "model.onnx", content)
    return onnx_session(runtime, content, precision, cache), content


def _exported(rival: Candidate, precision: Precision) -> bytes:
    model = trace(rival.at(precision), torch.zeros(2, *IMAGE))
    if precision == "int8":
        model, _ = quantize(model, Quantization([noise(8)]))
    content: bytes = model.SerializeToString()
    return content
