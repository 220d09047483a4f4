"""All candidates in one runtime at one precision, batch size by batch size. What fails costs its candidate alone."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from lowpass.benchmarks.latency.gpu import gpu_state
from lowpass.benchmarks.latency.timing import Rounds, check_logits, interleaved, latency, speedup
from lowpass.benchmarks.speed.candidates import Candidate
from lowpass.benchmarks.speed.measured import Engine, EngineResult, Timed
from lowpass.benchmarks.speed.memory import peak_memory
from lowpass.benchmarks.speed.plans import Plan
from lowpass.benchmarks.speed.sessions import IMAGE, MIN_ROUNDS, TOLERANCE, Files, noise, open_rival
from lowpass.export.runtimes.pytorch import reason_of
from lowpass.export.runtimes.registry import describe_runtime
from lowpass.export.runtimes.session import Session
from lowpass.pipeline.base.errors import InputError, RunError

MEMORY_BATCH = 8
WORTH_TELLING_S = 5.0
SETTLING_RUNS = (
    3  # before a session is timed: torch.compile records its CUDA graph in the second, and replays in the third
)


def measure_engine(
    rivals: Sequence[Candidate],
    engine: Engine,
    plan: Plan,
    files: Files,
    deadline: float | None,
    tell: Callable[[str], None],
) -> Iterator[EngineResult]:
    """What is known after every batch size, and at the end.

    Whatever a compiler, a capture or the GPU's memory does to one candidate is written down as the reason why that one
    was not measured; the others go on without it.

    Args:
        rivals: the candidates.
        engine: runtime and precision.
        plan: batch sizes, seconds, and how a graph is captured.
        files: ONNX files that were exported before.
        deadline: `time.monotonic()` after which nothing is begun.
        tell: takes a line of progress.
    """
    runtime, precision = engine
    sessions: dict[str, Session] = {}
    sizes: dict[str, int] = {}
    memory: dict[str, float | None] = {}
    measured: dict[int, dict[str, Timed]] = {}
    clocks: dict[int, int | None] = {}
    problems: list[str] = []

    def lose(name: str, reason: str, batch: int | None = None) -> None:
        sessions.pop(name, None)
        problems.append(f"{name}: {reason}" if batch is None else f"{name}: batch {batch}: {reason}")
        tell(f"  not measured: {problems[-1]}")

    def late() -> bool:
        return deadline is not None and time.monotonic() > deadline

    def so_far() -> EngineResult:
        return EngineResult(
            runtime=runtime,
            precision=precision,
            description=describe_runtime(runtime),
            not_measured="; ".join(problems) or None,
            file_bytes=dict(sizes),
            peak_memory_mib=dict(memory),
            batches=dict(measured),
            sm_clock_mhz=dict(clocks),
        )

    for rival in rivals:
        if late():
            lose(rival.name, "out of time")
            continue
        try:
            sessions[rival.name], content = open_rival(rival, runtime, precision, files, plan.capture)
        except Exception as error:  # see above
            lose(rival.name, _explained(error))
            continue
        if content is not None:
            sizes[rival.name] = len(content)
            memory[rival.name] = peak_memory(content, runtime, precision, MEMORY_BATCH, IMAGE)
    for batch in plan.batches:
        for rival in [rival for rival in rivals if rival.name in sessions]:
            if late():
                lose(rival.name, "out of time", batch)
                continue
            began = time.monotonic()
            try:
                _settle(sessions[rival.name], rival, batch, None if measured else TOLERANCE[precision])
            except Exception as error:
                lose(rival.name, _explained(error), batch)
                _release()
            if time.monotonic() - began > WORTH_TELLING_S:
                tell(f"  batch {batch}: {rival.name} took {time.monotonic() - began:.0f} s to prepare")
        timed = _timed(sessions, plan.seconds, partial(lose, batch=batch))
        if not timed:
            break
        measured[batch] = _figures(rivals, timed, batch)
        clocks[batch] = gpu_state().sm_clock_mhz
        medians = [f"{name} {one.latency.p50_ms:.3g} ms" for name, one in measured[batch].items()]
        tell(f"  batch {batch}: {', '.join(medians)}")
        yield so_far()
    sessions.clear()
    if runtime == "pytorch-compile":
        torch.compiler.reset()  # what it compiled keeps its CUDA graphs, and so their memory
    _release()
    yield so_far()


def _settle(session: Session, rival: Candidate, batch: int, tolerance: float | None) -> None:
    """Load a batch, see that the logits are right unless `tolerance` is None, and run until nothing is made any more.

    Raises:
        RunError: they are not.
    """
    images = noise(batch)
    if tolerance is None:
        session.load(images)
    else:
        check_logits(session, rival.at("fp32"), images, tolerance)
    for _ in range(SETTLING_RUNS):
        session.run()


def _timed(sessions: dict[str, Session], seconds: float, lose: Callable[[str, str], None]) -> Mapping[str, Rounds]:
    """Rounds of all sessions that run. One that fails is lost, and the others are timed anew."""
    while sessions:
        try:
            return interleaved(sessions, seconds, MIN_ROUNDS)
        except Exception as error:
            reason = _explained(error)
        running = len(sessions)
        for name in list(sessions):  # the error does not say whose it is
            try:
                sessions[name].run()
            except Exception as error:
                lose(name, _explained(error))
        if len(sessions) == running:
            for name in list(sessions):
                lose(name, f"timed together with the others: {reason}")
    return {}


def _figures(rivals: Sequence[Candidate], timed: Mapping[str, Rounds], batch: int) -> dict[str, Timed]:
    macs = {rival.name: rival.macs for rival in rivals}
    figures = {}
    for name, rounds in timed.items():
        factor, quartiles = speedup(timed["dense"], rounds) if "dense" in timed else (None, None)
        figures[name] = Timed(
            latency=latency(rounds, batch),
            speedup=factor,
            speedup_quartiles=quartiles,
            efficiency=None if factor is None else factor / (macs["dense"] / macs[name]),
        )
    return figures


def _explained(error: Exception) -> str:
    return str(error) if isinstance(error, RunError | InputError) else reason_of(error)


def _release() -> None:
    """Give back what closed sessions held on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
