"""How near searches come to their targets: MACs, and milliseconds on this machine.

    python -m lowpass.benchmarks.targets --out benchmarks/results/targets

Each target is a search of its own. A latency target is a share of what the dense model takes here. What came of it is
measured anew, in turns with the dense model, and given at the best pace at which dense was seen to run, as the search
does: the pace of a machine with neighbours changes by more than the search may miss. Beside that is what
`lowpass benchmark` finds at the end, at the pace of that moment.
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict

from lowpass.benchmarks.latency.compare import benchmark
from lowpass.benchmarks.latency.machine import Machine, describe, in_a_line
from lowpass.benchmarks.latency.target import latency_target
from lowpass.benchmarks.rows import Row, write_rows
from lowpass.export.options import Precision
from lowpass.export.runtimes.registry import RuntimeName, parse_runtimes
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.recipe import make_recipe
from lowpass.pipeline.search.shaping import SHAPINGS, TunedFor
from lowpass.pipeline.search.target import CostTarget

PRECISION: Precision = "fp32"  # every CPU runtime has it
TUNED_FOR: dict[RuntimeName, TunedFor] = {"openvino": "openvino"}  # what else runs on CPUs is tuned as ONNX Runtime is
TIMES = 3  # that the slim model is measured anew; the median counts
TIMED_S = 6.0
# Few images and nothing refitted: how near a search comes to a target does not hang on them.
QUICK = {"score_images": 128, "measure_images": 64, "recovery": False}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MacsTarget(_Frozen):
    """A share of the dense MACs, asked and reached."""

    asked: float
    reached: float


class LatencyTarget(_Frozen):
    """Milliseconds of a batch: asked, measured anew, and what `lowpass benchmark` finds for slim and dense."""

    runtime: RuntimeName
    batch: int
    target_ms: float
    measured_ms: float
    slim_ms: float
    dense_ms: float


class Targets(_Frozen):
    """Everything there is. `refused`: what an unreachable target of each kind was answered."""

    command: str
    seconds: float
    machine: Machine
    macs: tuple[MacsTarget, ...]
    latencies: tuple[LatencyTarget, ...]
    refused: dict[str, str]


def search_to_macs(source: dict[str, Any], share: float) -> MacsTarget:
    """Search to a share of the MACs.

    Raises:
        InputError: it cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        metrics = compress(make_recipe(**source, **QUICK, target_macs=share), Path(folder) / "run")
    return MacsTarget(asked=share, reached=metrics.slim.macs / metrics.dense.macs)


def search_to_latency(source: dict[str, Any], runtime: RuntimeName, batch: int, share: float) -> LatencyTarget:
    """Search to a share of the dense model's milliseconds on a runtime, then time what came of it.

    Raises:
        InputError: it cannot be reached.
    """
    target = latency_target(_dense(source, runtime), 1.0, runtime, PRECISION, batch)
    measure = target.measure
    assert measure is not None
    target = replace(target, value=float(f"{share * measure(_dense(source, runtime)):.3g}"))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        _compress_to(source, runtime, batch, target, run)
        slim = SlimViT.load(run).architecture
        measured_ms = median(measure(slim) for _ in range(TIMES))
        timed = benchmark(run, [runtime], [batch], PRECISION, TIMED_S).runtimes[runtime].batches[batch]
    return LatencyTarget(
        runtime=runtime,
        batch=batch,
        target_ms=target.value,
        measured_ms=measured_ms,
        slim_ms=timed.slim.p50_ms,
        dense_ms=timed.dense.p50_ms,
    )


def _compress_to(source: dict[str, Any], runtime: RuntimeName, batch: int, target: CostTarget, run: Path) -> None:
    timed_on = {"runtime": runtime, "latency_batch": batch, "latency_precision": PRECISION}
    shaping = SHAPINGS[TUNED_FOR.get(runtime, "onnxruntime")]
    recipe = make_recipe(**source, **QUICK, **timed_on, shaping=shaping, target_latency=target.value)
    compress(recipe, run, cost_targets_of=lambda _: [target])


def _dense(source: dict[str, Any], runtime: RuntimeName) -> Architecture:
    model = load_model(source["model"], source["weights"])
    return SlimViT.from_timm(
        model, token_score=SHAPINGS[TUNED_FOR.get(runtime, "onnxruntime")].token_score
    ).architecture


def refusals(source: dict[str, Any], runtime: RuntimeName, batch: int) -> dict[str, str]:
    """What is answered to a target of each kind that cannot be reached."""
    told = {}
    impossible = latency_target(_dense(source, runtime), 0.001, runtime, PRECISION, batch)
    with tempfile.TemporaryDirectory() as folder:
        for name, search in (
            ("macs", lambda run: compress(make_recipe(**source, **QUICK, target_macs=0.001), run)),
            ("latency", lambda run: _compress_to(source, runtime, batch, impossible, run)),
        ):
            try:
                search(Path(folder) / name)
            except InputError as error:
                told[name] = str(error)
            else:
                raise RunError(f"an unreachable target of {name} was not refused")
    return told


def as_markdown(done: Targets) -> str:
    """For people."""
    lines = [
        "# How near searches come to their targets",
        "",
        f"`{done.command}`, {done.seconds / 60:.0f} minutes on {in_a_line(done.machine)}",
        "",
        "| share of the dense MACs asked | reached | off by |",
        "|--:|--:|--:|",
        *(f"| {one.asked:.2f} | {one.reached:.4f} | {_off(one.reached, one.asked)} |" for one in done.macs),
        "",
        "Latency of a batch: asked; measured anew in turns with dense, at dense's best pace; and what",
        "`lowpass benchmark` finds at the end, at the pace of that moment.",
        "",
        "| runtime | batch | asked | measured | off by | benchmark: slim | off by | benchmark: dense |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {one.runtime} {PRECISION} | {one.batch} | {one.target_ms:.2f} ms "
            f"| {one.measured_ms:.2f} ms | {_off(one.measured_ms, one.target_ms)} "
            f"| {one.slim_ms:.2f} ms | {_off(one.slim_ms, one.target_ms)} | {one.dense_ms:.2f} ms |"
            for one in done.latencies
        ),
        "",
        "Targets out of reach are refused:",
        "",
        *(f"- {message}" for message in done.refused.values()),
    ]
    return "\n".join(lines) + "\n"


def _off(reached: float, asked: float) -> str:
    return f"{100 * (reached / asked - 1):+.1f}%"


def main(
    out: Annotated[Path, typer.Option(help="Where OUT.csv goes.")],
    macs: Annotated[str, typer.Option(help="Shares of the dense MACs.")] = "0.8,0.7,0.6,0.5,0.4,0.3",
    shares: Annotated[str, typer.Option(help="Shares of the dense model's latency.")] = "0.8,0.6",
    runtimes: Annotated[str, typer.Option(help="Of the latency targets.")] = "onnxruntime,openvino",
    batch: Annotated[int, typer.Option(min=1, help="Of the latency targets.")] = 8,
    model: Annotated[str, typer.Option(help="timm name of the dense model.")] = "digits_deit",
    weights: Annotated[Path | None, typer.Option(help="Its checkpoint.")] = None,
    data: Annotated[str, typer.Option(help="As of `lowpass compress`.")] = "digits",
) -> None:
    """How near searches come to their targets."""
    began, source = time.monotonic(), {"model": model, "weights": weights, "data": data}
    wanted = parse_runtimes(runtimes)
    latencies = []
    for runtime in wanted:
        for share in _numbers("--shares", shares):
            latencies.append(search_to_latency(source, runtime, batch, share))
            console.print(str(latencies[-1]), soft_wrap=True)
    done = Targets(
        command=shlex.join(["python", "-m", "lowpass.benchmarks.targets", *sys.argv[1:]]),
        macs=tuple(search_to_macs(source, share) for share in _numbers("--macs", macs)),
        latencies=tuple(latencies),
        refused=refusals(source, wanted[0], batch),
        seconds=time.monotonic() - began,
        machine=describe(),
    )
    write_rows(out.with_suffix(".csv"), rows(done), done.machine, done.command)
    console.print(as_markdown(done), soft_wrap=True, markup=False)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r}: give numbers, separated by commas") from None


def rows(done: Targets) -> Iterator[Row]:
    """What was asked, and what was reached."""
    for one in done.macs:
        yield Row({"kind": "macs", "asked": one.asked}, "reached", one.reached)
    for two in done.latencies:
        of = {"kind": "latency", "asked": two.target_ms, "runtime": two.runtime, "batch": two.batch}
        yield Row(of, "measured_ms", two.measured_ms)
        yield Row(of, "benchmark_slim_ms", two.slim_ms)
        yield Row(of, "benchmark_dense_ms", two.dense_ms)
    for kind, message in done.refused.items():
        yield Row({"kind": kind}, "refused", message)
