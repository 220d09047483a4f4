"""Runs side by side. Only what was measured alike is drawn together: on the same images, on the same machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowpass.benchmarks.latency.compare import Benchmark, Comparison
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.metrics import Metrics, count_parameters
from lowpass.report.charts import Point, pareto
from lowpass.report.current import current_benchmark, stale_metrics
from lowpass.report.plane import Chart
from lowpass.report.seen import IN_MEMORY_NAME


@dataclass(frozen=True)
class Candidate:
    """One run: its letter, its figures, its latencies or why there are none, what is not comparable with the first
    run's, and what may not be (None: all is)."""

    letter: str
    path: Path
    model: str
    metrics: Metrics
    benchmark: Benchmark | str
    other_images: str | None = None
    unsure: str | None = None
    other_machine: str | None = None


@dataclass(frozen=True)
class LatencyRow:
    """One runtime with its precision, and a batch size: the latencies of each run; None: not measured alike."""

    name: str
    batch: int
    cells: tuple[Comparison | None, ...]


@dataclass(frozen=True)
class Compared:
    """Several runs, the first being the report's own."""

    runs: tuple[Candidate, ...]
    latencies: tuple[LatencyRow, ...]
    charts: tuple[Chart, ...]


def compare_runs(directories: Sequence[Path]) -> Compared:
    """Put runs side by side.

    Raises:
        InputError: one is no finished run, or is given twice.
    """
    for index, directory in enumerate(directories):
        if directory.resolve() in [other.resolve() for other in directories[:index]]:
            raise InputError(f"{directory} is there twice; compare a run with others")
    first = _candidate(directories[0], "A", None)
    others = [_candidate(path, _letter(index), first) for index, path in enumerate(directories[1:], 1)]
    runs = (first, *others)
    rows = _latencies(runs)
    charts = [_by_macs(runs), *_by_latency(runs, rows)]
    return Compared(runs, tuple(rows), tuple(chart for chart in charts if chart is not None))


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"A{index}"


def _candidate(directory: Path, letter: str, first: Candidate | None) -> Candidate:
    metrics, slim = Metrics.load(directory), SlimViT.load(directory)
    stale = stale_metrics(metrics, slim.architecture, count_parameters(slim))
    if stale is not None:
        raise InputError(f"{directory}: {stale}")
    measured = current_benchmark(directory, slim.architecture)
    other_images = other_machine = unsure = None
    if first is not None:
        mine, theirs = ((m.data, m.test_images) for m in (metrics, first.metrics))
        if mine != theirs:
            other_images = f"top-1 is of other images: {_images(metrics)}, not {_images(first.metrics)}"
        elif metrics.data == IN_MEMORY_NAME:
            unsure = "its images were in memory, and nobody knows whether they are those of the first run"
        if isinstance(measured, Benchmark) and isinstance(first.benchmark, Benchmark):
            here, there = ((m.machine.cpu, m.machine.cores, m.machine.gpu) for m in (measured, first.benchmark))
            other_machine = None if here == there else "its latencies are of another machine"
    name = slim.architecture.dense.name
    return Candidate(letter, directory, name, metrics, measured, other_images, unsure, other_machine)


def _images(metrics: Metrics) -> str:
    count = "an unknown number" if metrics.test_images is None else f"{metrics.test_images:,}"
    return "none" if metrics.data is None else f"{count} of {metrics.data}"


def _latencies(runs: Sequence[Candidate]) -> list[LatencyRow]:
    """Rows that at least two runs have, measured by the same version of a runtime on the same machine."""
    by_run = [_measured(run) if run.other_machine is None else {} for run in runs]
    names = dict.fromkeys(name for measured in by_run for name in measured)
    rows = [LatencyRow(*name, tuple(measured.get(name) for measured in by_run)) for name in names]
    return [row for row in rows if sum(cell is not None for cell in row.cells) > 1]


def _measured(run: Candidate) -> dict[tuple[str, int], Comparison]:
    if isinstance(run.benchmark, str):
        return {}
    return {
        (f"{runtime} {result.precision} ({result.description})", batch): one
        for runtime, result in run.benchmark.runtimes.items()
        for batch, one in result.batches.items()
    }


def _by_macs(runs: Sequence[Candidate]) -> Chart | None:
    points = list[Point]()
    for run in runs:
        for dense, figures in ((False, run.metrics.slim), (True, run.metrics.dense)):
            if figures.top1 is not None and run.other_images is None:
                points.append(Point(_name(run, dense), figures.macs / 1e6, figures.top1, dense))
    return _plane("Top-1 against MACs", _distinct(points), "million MACs")


def _by_latency(runs: Sequence[Candidate], rows: Sequence[LatencyRow]) -> list[Chart | None]:
    charts = list[Chart | None]()
    for row in sorted(rows, key=lambda row: row.batch):
        points = list[Point]()
        for run, cell in zip(runs, row.cells, strict=True):
            for dense, figures in ((False, run.metrics.slim), (True, run.metrics.dense)):
                if cell is not None and figures.top1 is not None and run.other_images is None:
                    milliseconds = (cell.dense if dense else cell.slim).p50_ms
                    points.append(Point(_name(run, dense), milliseconds, figures.top1, dense))
        charts.append(
            _plane(f"Top-1 against latency: {row.name.partition(' (')[0]}, batch {row.batch}", points, "ms (median)")
        )
    return charts


def _name(run: Candidate, dense: bool) -> str:
    return f"{run.letter} dense" if dense else run.letter


def _distinct(points: Sequence[Point]) -> list[Point]:
    """Runs of one dense model have that point in common."""
    places = {(point.x, point.y, point.dense): point for point in reversed(points)}
    return [point for point in points if places[point.x, point.y, point.dense] is point]


def _plane(title: str, points: Sequence[Point], x_label: str) -> Chart | None:
    """None: fewer than two slim models have both figures."""
    if sum(not point.dense for point in points) < 2:
        return None
    return pareto(title, points, x_label, "top-1 in percent")
