"""Dense against slim behind one Triton server, under the same load.

    python -m lowpass.benchmarks.serving --out benchmarks/results/serving

The digits model and DeiT-Small (random weights), both at the share of MACs that the paper leaves of DeiT-Small. The
runs and exports it needs are made in `--work` and used again. Dense and slim take turns point by point. The bare
session is ONNX Runtime with all cores in a process that does nothing else; the server's cost beside it is at the same
batch, from two clients. What one model came to is kept in `--work` until all are measured: ended before, the same
command goes on with the next model.
"""

import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from lowpass.benchmarks.figures import write_figure
from lowpass.benchmarks.latency.machine import Machine, describe, in_a_line
from lowpass.benchmarks.rows import RESULTS, Origin, Row, origin_of, write_rows
from lowpass.benchmarks.serving.load import Point, closed_loop, open_loop
from lowpass.benchmarks.serving.overload import TURNS, Overload, overload
from lowpass.benchmarks.speed.candidates import RECIPES
from lowpass.export.artefacts import export_run, open_session
from lowpass.export.onnx.file import current_onnx
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.session import Session
from lowpass.export.triton.address import Address
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy
from lowpass.export.triton.server import Supervisor, find_server
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_json
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.data.datasets import made_batches
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.run.recipe import make_recipe

MODELS = ("digits", "deit_small")
# What is compared: the precision of the file, and whether it is the dense model's.
KINDS: dict[str, tuple[Precision, bool]] = {
    "dense": ("fp32", True),
    "slim": ("fp32", False),
    "slim int8": ("int8", False),
}
BARE_BATCH, BARE_CLIENTS = 8, 2
BATCHING_CLIENTS = (2, 4, 8)  # with BARE_BATCH images in every request
OPEN_CLIENTS = 32
OVERHEAD_TURNS = 5
LEAST_REQUESTS = 10  # of a turn: fewer, and starting and ending would show
PAPER_SHARE = 0.456  # of the dense MACs, what the paper leaves of DeiT-Small
# Loads are to be answered however long it takes; floods meet a queue that is empty again within a second.
PATIENT = DeployOptions(queue_limit=1000, queue_timeout_ms=0)
BOUNDED, BOUNDED_SUFFIX = DeployOptions(queue_limit=16, queue_timeout_ms=500), "-bounded"
COLOURS = {"dense": "black", "slim": "#0b6e4f", "slim int8": "#b5651d"}
RECIPE = RECIPES / "deit_small_paper.json"


class Overhead(BaseModel):
    """Milliseconds an image at one batch size: the bare session, and the server at saturation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int
    bare_ms: float
    served_ms: float
    percent: float


class Result(BaseModel):
    """One model: dense over slim MACs, every load by kind, slim's throughput over dense's at best in FP32
    and in INT8, and what floods of twice the capacity came to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    macs_saved: float
    points: dict[str, list[Point]]
    overhead: dict[str, Overhead]
    gain: float
    gain_int8: float
    floods: dict[str, list[Overload]]


class Serving(BaseModel):
    """Everything that was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str
    seconds: float
    machine: Machine
    models: dict[str, Result]


def prepare(model: str, work: Path) -> Path:
    """A run with the ONNX files of every kind; made where missing."""
    run = work / model
    if not (run / "metrics.json").exists():
        if model == "digits":
            recipe = make_recipe(model="digits_deit", data="digits", target_macs=PAPER_SHARE)
        else:
            recipe = make_recipe(model="deit_small_patch16_224", random_weights=True, architecture=RECIPE)
        compress(recipe, run, resume=run.exists())
    for precision, dense in KINDS.values():
        try:
            current_onnx(run, precision, dense)
        except InputError:
            export_run(run, ExportOptions(precision=precision), dense=dense)
    return run


def model_name(model: str, kind: str) -> str:
    """What a kind of a model is served as."""
    return f"{model}-{kind.replace(' ', '-')}"


def free_address() -> Address:
    """Three ports of this machine that nobody uses."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    address = Address("127.0.0.1", *(one.getsockname()[1] for one in sockets))
    for one in sockets:
        one.close()
    return address


def measure(run: Path, url: str, name: str, concurrencies: tuple[int, ...], seconds: float, server: int) -> Result:
    """Every load on a model and its dense one, both behind `url` (gRPC) of the process `server`.

    Raises:
        RunError: a request failed.
    """
    metrics, architecture = Metrics.load(run), SlimViT.load(run).architecture
    (images, _), *_ = made_batches(architecture, BARE_BATCH, BARE_BATCH, seed=1)
    batch: NDArray[Any] = images.numpy()
    served = {kind: model_name(name, kind) for kind in KINDS}
    points: dict[str, list[Point]] = {kind: [] for kind in KINDS}
    loads = [(1, clients) for clients in concurrencies] + [(BARE_BATCH, clients) for clients in BATCHING_CLIENTS]
    for together, clients in loads:
        for kind, model in served.items():
            points[kind].append(closed_loop(url, model, batch[:together], clients, seconds))
            console.print(
                f"{model}, {clients} clients x {together} images: {points[kind][-1].images_per_s:.1f} images/s",
                soft_wrap=True,
            )
    best = {kind: max(point.images_per_s for point in all_) for kind, all_ in points.items()}
    single = max(point.images_per_s for point in points["dense"] if point.request_images == 1)
    for share in (0.4, 0.8):  # of what dense can do, so that both meet the same requests
        for kind, model in served.items():
            points[kind].append(open_loop(url, model, batch[:1], share * single, seconds, OPEN_CLIENTS))
    overhead = {}
    for kind, model in served.items():
        session = open_session("onnxruntime", run, *KINDS[kind])
        session.load(batch)
        bare, through = list[float](), list[float]()
        for _ in range(OVERHEAD_TURNS):  # in turns, so that a machine that slows down meanwhile slows both
            bare.append(_alone(session, seconds) / BARE_BATCH)
            # Both clients keep both instances busy to the end only on average, so a turn must hold many requests.
            long = max(seconds, LEAST_REQUESTS * BARE_BATCH * bare[-1] / 1000)
            through.append(1000 / closed_loop(url, model, batch, BARE_CLIENTS, long).images_per_s)
        bare_ms, served_ms = median(bare), median(through)
        overhead[kind] = Overhead(
            batch=BARE_BATCH, bare_ms=bare_ms, served_ms=served_ms, percent=100 * (served_ms / bare_ms - 1)
        )
    floods: dict[str, list[Overload]] = {kind: [] for kind in KINDS}
    for _ in range(TURNS):
        for kind, model in served.items():
            floods[kind].append(overload(url, model + BOUNDED_SUFFIX, batch[:1], seconds, server))
            console.print(f"{model}, flooded: {floods[kind][-1].kept:.2f} of its capacity", soft_wrap=True)
    return Result(
        macs_saved=metrics.dense.macs / metrics.slim.macs,
        points=points,
        overhead=overhead,
        gain=best["slim"] / best["dense"],
        gain_int8=best["slim int8"] / best["dense"],
        floods=floods,
    )


def _alone(session: Session, seconds: float) -> float:
    """Milliseconds of a run, over as many as fit."""
    session.run()
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        session.run()
        runs += 1
    return 1000 * (time.perf_counter() - began) / runs


def as_markdown(done: Serving) -> str:
    """One table of loads a model, with the machine on top."""
    machine = done.machine
    lines = [
        "# Serving: dense against slim on one Triton server",
        "",
        f"`{done.command}`, {done.seconds / 60:.1f} minutes on {in_a_line(machine)}",
    ]
    for name, result in done.models.items():
        lines += ["", f"## {name}: slim serves {result.gain:.2f}x dense, in INT8 {result.gain_int8:.2f}x", ""]
        lines += [f"{result.macs_saved:.2f}x fewer MACs.", ""]
        lines += [
            "| model | load | images/s | p50 ms | p95 ms | p99 ms | mean batch | queue ms | compute ms |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for kind, points in result.points.items():
            for point in points:
                load = f"{point.offered:.0f} clients" if point.kind == "closed" else f"{point.offered:.1f} requests/s"
                load += f" x {point.request_images}" if point.request_images > 1 else ""
                figures = (point.images_per_s, point.p50_ms, point.p95_ms, point.p99_ms)
                rest = (point.mean_batch, point.queue_ms, point.compute_ms)
                cells = ("-" if figure is None else f"{figure:.1f}" for figure in (*figures, *rest))
                lines.append("| " + " | ".join([kind, load, *cells]) + " |")
        lines.append("")
        for kind, one in result.overhead.items():
            lines.append(
                f"{kind}, batch {one.batch}: bare session {one.bare_ms:.2f} ms an image, server {one.served_ms:.2f} ms "
                f"({one.percent:+.1f}%).\n"
            )
        for kind, turns in result.floods.items():
            flood = sorted(turns, key=lambda turn: turn.kept)[len(turns) // 2]
            lines.append(
                f"{kind}, {flood.offered:.1f} requests/s at a capacity of {flood.capacity:.1f}: {flood.goodput:.1f} "
                f"answered, p99 {flood.p99_ms:.0f} ms, {flood.refused_share:.0%} refused, well again after "
                f"{flood.recovery_s:.2f} s, memory {flood.bytes_peak / flood.bytes_before:.3f} of before.\n"
            )
    return "\n".join(lines) + "\n"


def plot(done: Serving, path: Path) -> None:
    """Throughput and p95 against concurrency, a row a model."""
    figure = Figure(figsize=(8.5, 3.2 * len(done.models)), layout="constrained")
    rows = figure.subplots(len(done.models), 2, squeeze=False)
    for (left, right), (name, result) in zip(rows, done.models.items(), strict=True):
        for kind, points in result.points.items():
            for images in (BARE_BATCH, 1):
                closed = [point for point in points if point.kind == "closed" and point.request_images == images]
                style = {"marker": "o", "markersize": 4, "color": COLOURS[kind]}
                style |= {"label": kind} if images == 1 else {"label": f"{kind}, {images} a request", "linestyle": ":"}
                clients = [point.offered for point in closed]
                left.plot(clients, [point.images_per_s for point in closed], **style)
                right.plot(clients, [point.p95_ms for point in closed], **style)
        left.set_title(f"{name}: {result.gain:.2f}x", fontsize=10, loc="left")
        left.set_ylabel("images/s")
        right.set_ylabel("p95, ms")
        for panel in (left, right):
            panel.set_xscale("log", base=2)
            panel.set_xticks(clients, [f"{count:g}" for count in clients])
            panel.set_ylim(bottom=0)
            panel.set_xlabel("concurrent clients")
            panel.spines[["top", "right"]].set_visible(False)
    # Beside the panels: lines are everywhere in them.
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    write_figure(figure, path)


def run_benchmark(
    out: Path, work: Path, models: tuple[str, ...], concurrencies: tuple[int, ...], seconds: float, triton: Path | None
) -> Serving:
    """Prepare, deploy, serve, measure; writes `serving.csv` and `serving.png` into `out`."""
    began = time.monotonic()
    runs = {model: prepare(model, work) for model in models}
    repository = work / f"repository-{os.getpid()}"
    for name, run in runs.items():
        for kind, (precision, dense) in KINDS.items():
            model = model_name(name, kind)
            deploy(run, repository, model, replace(PATIENT, precision=precision), dense)
            deploy(run, repository, model + BOUNDED_SUFFIX, replace(BOUNDED, precision=precision), dense)
    address, results = free_address(), dict[str, Result]()
    with Supervisor(find_server(triton), repository, address, work / "triton.log") as supervisor:
        threading.Thread(target=supervisor.watch, daemon=True).start()
        url = f"127.0.0.1:{address.grpc}"
        assert supervisor.process is not None
        server = supervisor.process.pid
        for name, run in runs.items():
            origin = origin_of(describe(), f"{name} {concurrencies} {seconds}")
            if (found := _measured(work, name, origin)) is None:
                found = measure(run, url, name, concurrencies, seconds, server)
                write_json(_kept(work, name), {"origin": asdict(origin), "result": found.model_dump()})
            results[name] = found
    command = shlex.join(["python", "-m", "lowpass.benchmarks.serving", *sys.argv[1:]])
    done = Serving(command=command, seconds=time.monotonic() - began, machine=describe(), models=results)
    write_rows(out / "serving.csv", rows(done), done.machine, command)
    plot(done, out / "serving.png")
    for name in runs:
        _kept(work, name).unlink()
    return done


def _kept(work: Path, name: str) -> Path:
    """Where the figures of a model wait for those of the others."""
    return work / f"{name}-measured.json"


def _measured(work: Path, name: str, origin: Origin) -> Result | None:
    """What a call of the same origin that was ended has measured."""
    if not _kept(work, name).exists():
        return None
    kept = json.loads(_kept(work, name).read_text())
    if kept["origin"] != asdict(origin):
        return None
    console.print(f"{name}: measured before", soft_wrap=True)
    return Result.model_validate(kept["result"])


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder of runs and repositories, used again.")] = Path("runs/serving"),
    models: Annotated[str, typer.Option(help="Of digits, deit_small.")] = ",".join(MODELS),
    concurrencies: Annotated[str, typer.Option(help="Clients at once.")] = "1,2,4,8,16,32",
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each point.")] = 5.0,
    triton: Annotated[Path | None, typer.Option(envvar="LOWPASS_TRITON", help="The server's environment.")] = None,
) -> None:
    """The serving benchmark."""
    names = tuple(name.strip() for name in models.split(","))
    if unknown := [name for name in names if name not in MODELS]:
        raise InputError(f"there is no model {unknown[0]!r}; choose from {', '.join(MODELS)}")
    done = run_benchmark(out, work, names, tuple(map(int, concurrencies.split(","))), seconds, triton)
    console.print(as_markdown(done), soft_wrap=True, markup=False)


def rows(done: Serving) -> Iterator[Row]:
    """Every load on every model, what slim gains at best, and what the server costs."""
    for name, result in done.models.items():
        yield Row({"model": name}, "macs_saved", result.macs_saved)
        yield Row({"model": name}, "throughput_gain", result.gain)
        yield Row({"model": name}, "throughput_gain_int8", result.gain_int8)
        for kind, points in result.points.items():
            for point in points:
                of = {"model": name, "candidate": kind, "load": point.kind, "offered": point.offered}
                of |= {"request_images": point.request_images}
                for figure in ("images_per_s", "p50_ms", "p95_ms", "p99_ms", "requests", "mean_batch", "queue_ms"):
                    yield Row(of, figure, getattr(point, figure))
                if point.compute_ms is not None:
                    yield Row(of, "compute_ms", point.compute_ms)
                for size, count in point.batches.items():
                    yield Row({**of, "batch": size}, "batches", count)
        for kind, one in result.overhead.items():
            of = {"model": name, "candidate": kind, "load": "at saturation", "request_images": one.batch}
            yield Row(of, "bare_ms_an_image", one.bare_ms)
            yield Row(of, "served_ms_an_image", one.served_ms)
            yield Row(of, "overhead_percent", one.percent)
        for kind, turns in result.floods.items():
            of = {"model": name, "candidate": kind, "load": "flood", "request_images": 1}
            for figure in Overload.model_fields:
                values = [getattr(turn, figure) for turn in turns]
                yield Row(of, figure, median(values), min(values), max(values))
