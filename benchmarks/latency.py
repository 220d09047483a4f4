"""Latency of dense against slim, in interleaved rounds of one run, so that both meet the same machine.

    lowpass benchmark DIR --batches 1,8,32          writes DIR/benchmark.json and DIR/benchmark.md

*Efficiency* is the speed-up over the dense model in the same runtime, divided by dense MACs over slim MACs: 1.0 means
that every FLOP saved arrived as time.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from benchmarks.machine import Machine, describe
from export.runtimes import (
    RUNTIMES,
    Images,
    RuntimeName,
    Session,
    default_precision,
    describe_runtime,
    logits_of,
    missing,
    open_session,
)
from export.to_onnx import Precision, current_onnx, weights_path
from export.to_tensorrt import FLAVOURS, build, current_plan
from export.verify import export
from pipeline.data import made_batches
from pipeline.errors import InputError, RunError
from pipeline.files import write_json, write_text
from pipeline.progress import console, track
from pipeline.slim import SlimViT

BENCHMARK_FILE = "benchmark.json"
TABLE_FILE = "benchmark.md"
MODELS = ("dense", "slim")
DEFAULT_BATCHES = (1, 8, 32)
ROUNDS = 20
WARM_UP_S = 0.3  # of each model, and two runs at least
# Largest logit difference from FP32 PyTorch, over the largest logit, at which a session still counts as this model.
# Wide, for noise makes tokens tie; `lowpass export` judges strictly, on real images.
TOLERANCE = 0.1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Latency(_Frozen):
    """One model at one batch size; images a second at the median."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    runs: int


class Comparison(_Frozen):
    """Dense and slim at one batch size. `speedup` is the median over rounds; the quartiles are its spread."""

    dense: Latency
    slim: Latency
    speedup: float
    speedup_quartiles: tuple[float, float]
    efficiency: float


class RuntimeResult(_Frozen):
    """One runtime; `not_measured` says why there are no figures."""

    precision: Precision
    description: str | None
    not_measured: str | None
    batches: dict[int, Comparison]


class Benchmark(_Frozen):
    """Everything one call measured."""

    run: str
    model: str
    macs: dict[str, int]
    machine: Machine
    runtimes: dict[RuntimeName, RuntimeResult]


def benchmark(
    directory: Path,
    runtimes: Sequence[RuntimeName] = RUNTIMES,
    batches: Sequence[int] = DEFAULT_BATCHES,
    precision: Precision | None = None,
    seconds: float = 2.0,
) -> Benchmark:
    """Time a run's dense and slim models, and write `benchmark.json` and `benchmark.md` beside them.

    Args:
        directory: the run. ONNX files and engines that are missing or stale are made first.
        runtimes: those that cannot run here are reported with the reason.
        batches: batch sizes.
        precision: None for FP32 on CPUs and FP16 on GPUs.
        seconds: about how long each model is timed for at each batch size.

    Raises:
        InputError: the directory holds no finished run.
    """
    slim = SlimViT.load(directory)
    architecture = slim.architecture
    macs = {
        "dense": architecture.model_copy(update={"blocks": architecture.dense.blocks()}).macs(),
        "slim": architecture.macs(),
    }
    results = {}
    for runtime in runtimes:
        at = precision or default_precision(runtime)
        reason = missing(runtime)
        compared: dict[int, Comparison] = {}
        if reason is None:
            try:
                compared = _one_runtime(directory, runtime, at, batches, seconds, macs["dense"] / macs["slim"])
            except RunError as error:  # one runtime's failure must not cost the figures of the others
                reason = str(error)
        if reason is not None:
            console.print(f"{runtime}: not measured: {reason}", soft_wrap=True)
        results[runtime] = RuntimeResult(
            precision=at,
            description=None if reason else describe_runtime(runtime),
            not_measured=reason,
            batches=compared,
        )
    done = Benchmark(run=str(directory), model=architecture.dense.name, macs=macs, machine=describe(), runtimes=results)
    write_json(directory / BENCHMARK_FILE, done.model_dump(mode="json"))
    write_text(directory / TABLE_FILE, as_markdown(done))
    return done


def parse_runtimes(text: str | None) -> tuple[RuntimeName, ...]:
    """Names separated by commas; None: all.

    Raises:
        InputError: one is unknown.
    """
    if text is None:
        return RUNTIMES
    names = [name.strip() for name in text.split(",")]
    chosen = tuple(runtime for name in names for runtime in RUNTIMES if runtime == name)
    if len(chosen) != len(names):
        unknown = next(name for name in names if name not in RUNTIMES)
        raise InputError(f"there is no runtime {unknown!r}; choose from {', '.join(RUNTIMES)}")
    return chosen


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes separated by commas.

    Raises:
        InputError: one is not a positive number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--batches takes positive numbers separated by commas, such as 1,8,32, not {text!r}")
    return tuple(map(int, parts))


def refuse_other_rivals(text: str) -> None:
    """Dense is what there is to compare with.

    Raises:
        InputError: something else is named.
    """
    for name in text.split(","):
        if name.strip() != "dense":
            raise InputError(f"--against knows only dense, not {name.strip()!r}")


def _one_runtime(
    directory: Path, runtime: RuntimeName, precision: Precision, batches: Sequence[int], seconds: float, saved: float
) -> dict[int, Comparison]:
    """Every batch size on one runtime. `saved`: dense MACs over slim MACs."""
    for name in MODELS:
        _prepare(directory, runtime, precision, name == "dense")
    sessions = {name: open_session(runtime, directory, precision, name == "dense") for name in MODELS}
    compared = {}
    for batch in track(batches, f"timing {runtime} {precision}"):
        images = _images(directory, batch)
        for name, session in sessions.items():
            _check(directory, name, session, images)
        compared[batch] = compare(interleaved(sessions, seconds), batch, saved)
    return compared


def _prepare(directory: Path, runtime: RuntimeName, precision: Precision, dense: bool) -> None:
    """Make the file that the runtime needs where it is missing or stale."""
    if runtime == "pytorch":
        return
    try:
        current_onnx(directory, precision, dense)
    except InputError:
        architecture = SlimViT.load(directory).architecture
        export(directory, precision, made_batches(architecture, 8, 4, seed=0), made_images=True, dense=dense)
    if runtime in FLAVOURS:
        try:
            current_plan(directory, precision, runtime, dense)
        except InputError:
            build(directory, precision, runtime, dense)


def _images(directory: Path, batch: int) -> Images:
    """Noise: shapes are static, so that a latency does not hang on what is seen."""
    (images, _), *_ = made_batches(SlimViT.load(directory).architecture, batch, batch, seed=1)
    return images.numpy()


def _check(directory: Path, name: str, session: Session, images: Images) -> None:
    """Refuse to time a session whose logits are not this model's.

    Raises:
        RunError: they differ from FP32 PyTorch by more than `TOLERANCE`.
    """
    model = SlimViT.load(directory, weights_path(directory, name == "dense").name)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    difference = float(np.abs(logits_of(session, images) - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:
        raise RunError(f"the {name} model's logits differ from PyTorch's by {100 * difference:.1f}% of the largest")


def interleaved(sessions: Mapping[str, Session], seconds: float) -> dict[str, list[list[float]]]:
    """Milliseconds of every run, by session and round. Sessions take turns, and the order turns each round; each has
    its images loaded."""
    needed = {name: _warm_up(session) for name, session in sessions.items()}
    runs = {name: max(1, round(seconds / ROUNDS / cost)) for name, cost in needed.items()}
    timed: dict[str, list[list[float]]] = {name: [] for name in sessions}
    order = list(sessions)
    for _ in range(ROUNDS):
        for name in order:
            timed[name].append([_milliseconds(sessions[name]) for _ in range(runs[name])])
        order.reverse()
    return timed


def compare(timed: Mapping[str, list[list[float]]], batch: int, saved: float) -> Comparison:
    """Percentiles of either model, and the speed-up round by round."""
    latencies = {}
    for name in MODELS:
        every = np.concatenate([np.asarray(round_) for round_ in timed[name]])
        p50, p90, p99 = (float(value) for value in np.percentile(every, [50, 90, 99]))
        latencies[name] = Latency(p50_ms=p50, p90_ms=p90, p99_ms=p99, images_per_s=1000 * batch / p50, runs=len(every))
    ratios = [median(d) / median(s) for d, s in zip(timed["dense"], timed["slim"], strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return Comparison(**latencies, speedup=middle, speedup_quartiles=(low, high), efficiency=middle / saved)


def _warm_up(session: Session) -> float:
    """Seconds of a run once warm."""
    began = time.perf_counter()
    runs: list[float] = []
    while len(runs) < 2 or time.perf_counter() - began < WARM_UP_S:
        runs.append(_milliseconds(session) / 1000)
    return median(runs)


def _milliseconds(session: Session) -> float:
    began = time.perf_counter_ns()
    session.run()
    return (time.perf_counter_ns() - began) / 1e6


def as_markdown(done: Benchmark) -> str:
    """The table of one benchmark, with its machine."""
    lines = [
        f"# {done.model}: dense {done.macs['dense'] / 1e6:.1f} M MACs, slim {done.macs['slim'] / 1e6:.1f} M "
        f"({done.macs['dense'] / done.macs['slim']:.2f}x fewer)",
        "",
        f"{done.machine.cpu}, {done.machine.cores} cores, {done.machine.gpu or 'no GPU'}; "
        + ", ".join(f"{name} {version}" for name, version in done.machine.packages.items()),
        "",
        "| runtime | batch | dense p50 / p90 / p99 ms | slim p50 / p90 / p99 ms | dense img/s | slim img/s "
        "| speed-up (quartiles) | efficiency |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for runtime, result in done.runtimes.items():
        if result.not_measured:
            lines.append(f"| {runtime} {result.precision} | | not measured: {result.not_measured} | | | | | |")
        for batch, one in result.batches.items():
            low, high = one.speedup_quartiles
            cells = [
                f"{runtime} {result.precision}",
                str(batch),
                *(" / ".join(f"{ms:.2f}" for ms in (x.p50_ms, x.p90_ms, x.p99_ms)) for x in (one.dense, one.slim)),
                *(f"{x.images_per_s:.0f}" for x in (one.dense, one.slim)),
                f"{one.speedup:.2f}x ({low:.2f} to {high:.2f})",
                f"{one.efficiency:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
