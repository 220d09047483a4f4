"""Latency of dense against slim, in interleaved rounds of one run, so that both meet the same machine.

    lowpass benchmark DIR --batches 1,8,32          writes DIR/benchmark.json and DIR/benchmark.md

*Efficiency* is the speed-up over the dense model in the same runtime, divided by dense MACs over slim MACs: 1.0 means
that every FLOP saved arrived as time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from lowpass.benchmarks.latency.machine import Machine, describe, in_a_line
from lowpass.benchmarks.latency.timing import Latency, Rounds, check_logits, interleaved, latency, speedup
from lowpass.export.artefacts import open_session, quantization_of
from lowpass.export.onnx.export import export
from lowpass.export.onnx.file import current_onnx, weights_path
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.engine import FLAVOURS
from lowpass.export.runtimes.pytorch import TORCH
from lowpass.export.runtimes.registry import (
    DEFAULT_RUNTIMES,
    SUPPORTED,
    RuntimeName,
    default_precision,
    describe_runtime,
    missing,
)
from lowpass.export.runtimes.session import Images
from lowpass.export.tensorrt.plan import build, current_plan
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import write_json, write_text
from lowpass.pipeline.base.progress import console, track
from lowpass.pipeline.data.datasets import made_batches
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.dense import dense_run
from lowpass.pipeline.run.images import verification_batches

BENCHMARK_FILE = "benchmark.json"
TABLE_FILE = "benchmark.md"
DEFAULT_BATCHES = (1, 8, 32)
# Logit difference from FP32 PyTorch, over the largest logit, at which a session still counts as this model on an image.
# Wide, for noise makes tokens tie; `lowpass export` judges strictly, on real images.
TOLERANCE = 0.1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
    runtimes: Sequence[RuntimeName] | None = None,
    batches: Sequence[int] = DEFAULT_BATCHES,
    precision: Precision | None = None,
    seconds: float = 2.0,
) -> Benchmark:
    """Time a run's dense and slim models, and write `benchmark.json` and `benchmark.md` beside them.

    Args:
        directory: the run. ONNX files and engines that are missing or stale are made first.
        runtimes: None for `DEFAULT_RUNTIMES`; those that cannot run here are reported with the reason.
        batches: batch sizes.
        precision: None for the runtime's own: FP16 on GPUs; FP32 on CPUs, in OpenVINO BF16 where AMX is.
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
    with dense_run(directory) as dense:
        results = {
            runtime: _result({"dense": dense, "slim": directory}, runtime, precision, batches, seconds, macs)
            for runtime in runtimes or DEFAULT_RUNTIMES
        }
    done = Benchmark(run=str(directory), model=architecture.dense.name, macs=macs, machine=describe(), runtimes=results)
    write_json(directory / BENCHMARK_FILE, done.model_dump(mode="json"))
    write_text(directory / TABLE_FILE, as_markdown(done))
    return done


def refuse_other_rivals(text: str) -> None:
    """Dense is what there is to compare with.

    Raises:
        InputError: something else is named.
    """
    for name in text.split(","):
        if name.strip() != "dense":
            raise InputError(f"--against knows only dense, not {name.strip()!r}")


def _result(
    runs: Mapping[str, Path],
    runtime: RuntimeName,
    precision: Precision | None,
    batches: Sequence[int],
    seconds: float,
    macs: Mapping[str, int],
) -> RuntimeResult:
    """One runtime, or why it was not measured."""
    at = precision or default_precision(runtime)
    reason = missing(runtime)
    if reason is None and at not in SUPPORTED[runtime]:
        reason = f"it does not run {at}"
    compared: dict[int, Comparison] = {}
    if reason is None:
        try:
            compared = _one_runtime(runs, runtime, at, batches, seconds, macs["dense"] / macs["slim"])
        except RunError as error:  # one runtime's failure must not cost the figures of the others
            reason = str(error)
    if reason is not None:
        console.print(f"{runtime}: not measured: {reason}", soft_wrap=True)
    return RuntimeResult(
        precision=at,
        description=None if reason else describe_runtime(runtime),
        not_measured=reason,
        batches=compared,
    )


def _one_runtime(
    runs: Mapping[str, Path],
    runtime: RuntimeName,
    precision: Precision,
    batches: Sequence[int],
    seconds: float,
    saved: float,
) -> dict[int, Comparison]:
    """Every batch size on one runtime. `runs`: where each model lies; `saved`: dense MACs over slim MACs."""
    for name, run in runs.items():
        _prepare(run, runtime, precision, name == "dense")
    sessions = {name: open_session(runtime, run, precision, name == "dense") for name, run in runs.items()}
    models = {name: SlimViT.load(run, weights_path(run, name == "dense").name) for name, run in runs.items()}
    compared = {}
    for batch in track(batches, f"timing {runtime} {precision}"):
        images = _images(runs["slim"], batch)
        for name, session in sessions.items():
            try:
                check_logits(session, models[name], images, TOLERANCE)
            except RunError as error:
                raise RunError(f"the {name} model: {error}") from None
        compared[batch] = compare(interleaved(sessions, seconds), batch, saved)
    return compared


def _prepare(directory: Path, runtime: RuntimeName, precision: Precision, dense: bool) -> None:
    """Make the file that the runtime needs where it is missing or stale."""
    if runtime in TORCH:
        return
    try:
        current_onnx(directory, precision, dense)
    except InputError:
        batches, made = verification_batches(directory, None)
        calibration = quantization_of(directory, precision)
        export(directory, ExportOptions(precision=precision), batches, made, dense, calibration)
    if runtime in FLAVOURS:
        try:
            current_plan(directory, precision, runtime, dense)
        except InputError:
            build(directory, precision, runtime, dense)


def _images(directory: Path, batch: int) -> Images:
    """Noise: shapes are static, so that a latency does not hang on what is seen."""
    (images, _), *_ = made_batches(SlimViT.load(directory).architecture, batch, batch, seed=1)
    return images.numpy()


def compare(timed: Mapping[str, Rounds], batch: int, saved: float) -> Comparison:
    """Percentiles of either model, and the speed-up round by round."""
    factor, quartiles = speedup(timed["dense"], timed["slim"])
    return Comparison(
        dense=latency(timed["dense"], batch),
        slim=latency(timed["slim"], batch),
        speedup=factor,
        speedup_quartiles=quartiles,
        efficiency=factor / saved,
    )


def as_markdown(done: Benchmark) -> str:
    """The table of one benchmark, with its machine."""
    lines = [
        f"# {done.model}: dense {done.macs['dense'] / 1e6:.1f} M MACs, slim {done.macs['slim'] / 1e6:.1f} M "
        f"({done.macs['dense'] / done.macs['slim']:.2f}x fewer)",
        "",
        in_a_line(done.machine),
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
