"""`report.html`: everything a run has written and what its models say of its test images, on one page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from lowpass.benchmarks.latency.compare import Benchmark, Comparison
from lowpass.benchmarks.latency.machine import in_a_line
from lowpass.export.forecast.forecast import Forecast, Target
from lowpass.export.forecast.gpus import GPUS
from lowpass.export.forecast.of_run import forecast_run
from lowpass.export.forecast.target import is_forecast, parse_target
from lowpass.export.options import QUANTISED
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_text
from lowpass.pipeline.base.version import __version__
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.classes import load_classes
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.dense_check import Provenance
from lowpass.pipeline.run.images import DataSource
from lowpass.pipeline.run.metrics import Metrics, count_parameters, slim_figures
from lowpass.pipeline.run.readings import is_a_guess
from lowpass.pipeline.run.recipe import RECIPE_FILE, Recipe
from lowpass.report import drawn, words
from lowpass.report.asked import Asked, Command, asked, commands
from lowpass.report.compared import Compared, compare_runs
from lowpass.report.current import Engine, ExportedFile, current_benchmark, engines, exported_files, stale_metrics
from lowpass.report.patches import Picture, pictures
from lowpass.report.plane import Chart
from lowpass.report.searched import Searched, read_search
from lowpass.report.seen import (
    ClassTop1,
    Confusion,
    FileTop1,
    Seen,
    by_class,
    confusions,
    files_top1,
    look,
    only_one_right,
    top1_of,
)

Timed = tuple[str, int, Comparison]  # a runtime, a batch size, and how the models compare
REPORT_FILE = "report.html"
FORECAST_GPUS, FORECAST_BATCHES = ("t4", "a100", "h100", "rtx4090"), (1, 8, 32)
SAME_TOP1 = 0.5  # points by which machines may differ that round differently


@dataclass(frozen=True)
class Looked:
    """What was measured for the page: on `images` of `total` test images of `data`, top-1 in percent."""

    data: str
    images: int
    total: int
    slim_top1: float
    dense_top1: float | None
    only_one_right: tuple[int, int] | None
    classes: tuple[ClassTop1, ...]
    confusions: tuple[Confusion, ...]
    files: dict[str, FileTop1]
    pictures: tuple[Picture, ...]

    @property
    def standard_error(self) -> float | None:
        """Of the difference of the two top-1, in points: only images that one model alone gets right count."""
        if self.only_one_right is None:
            return None
        dense, slim = self.only_one_right
        return 100 * math.sqrt(dense + slim - (dense - slim) ** 2 / self.images) / self.images


@dataclass(frozen=True)
class Page:
    """Everything the page shows. A string in place of a part says why it is not there."""

    directory: Path
    version: str
    architecture: Architecture
    metrics: Metrics
    stale: str | None
    asked: tuple[Asked, ...]
    recipe: str
    benchmark: Benchmark | str
    machine: str
    searched: Searched | str
    looked: Looked | str
    files: tuple[ExportedFile, ...]
    engines: tuple[Engine, ...]
    compared: Compared | None
    commands: tuple[Command, ...]
    forecasts: tuple[Forecast, ...]
    charts: dict[str, tuple[Chart, ...]]

    @property
    def macs_ratio(self) -> float:
        """Dense MACs over slim ones."""
        return self.metrics.dense.macs / self.metrics.slim.macs

    @property
    def speedups(self) -> tuple[Timed, Timed] | None:
        """The least speed-up that was measured and the largest; None: nothing was measured."""
        if isinstance(self.benchmark, str):
            return None
        every = [(name, batch, one) for name, r in self.benchmark.runtimes.items() for batch, one in r.batches.items()]
        every.sort(key=lambda each: each[2].speedup)
        return (every[0], every[-1]) if every else None

    @property
    def guesses(self) -> str | None:
        """A warning where the slim model, or the dense one, does no better than guessing does; None: they do."""
        chance, models = (
            100 / self.architecture.dense.num_classes,
            {"dense": self.metrics.dense, "slim": self.metrics.slim},
        )
        count = self.metrics.test_images
        if count is None or chance == 100:
            return None
        found = [
            name
            for name, figures in models.items()
            if figures.top1 is not None and is_a_guess(figures.top1, chance, count)
        ]
        if not found:
            return None
        return f"The top-1 of the {' and the '.join(found)} model is no better than that of a guess, {chance:.3g} %."

    @property
    def reduced(self) -> list[ExportedFile]:
        """Current files of which it is known whether a layer was left in a higher precision."""
        told = [file for file in self.files if file.stale is None and file.format == "onnx"]
        return [
            file
            for file in told
            if file.precision in QUANTISED
            or (file.verification and (file.precision == "fp16" or file.verification.kept_fp32))
        ]

    @property
    def disagrees(self) -> bool:
        """Whether `metrics.json` tells another top-1 of the very images that were looked at, rounding aside."""
        if isinstance(self.looked, str) or self.metrics.slim.top1 is None:
            return False
        same = (self.looked.data, self.looked.total) == (self.metrics.data, self.metrics.test_images)
        apart = abs(self.looked.slim_top1 - self.metrics.slim.top1) > SAME_TOP1
        return same and self.looked.images == self.looked.total and apart


def write_report(
    directory: Path, data: DataSource = None, compare: Sequence[Path] = (), images: int | None = None
) -> Path:
    """Write `report.html` into a run directory: one page that opens from disk and fetches nothing.

    Args:
        directory: a finished run.
        data: test images to show and to measure on; None: the run's own. Where those are gone, the page says so.
        compare: runs to put beside it.
        images: how many test images to measure on, at most; None: as many as a minute allows.

    Returns:
        The page.

    Raises:
        InputError: a directory holds no finished run, or `data` cannot be used.
    """
    page = gather(directory, data, compare, images)
    path = directory / REPORT_FILE
    write_text(path, render(page))
    return path


def gather(directory: Path, data: DataSource = None, compare: Sequence[Path] = (), images: int | None = None) -> Page:
    """Read and measure what the page shows; see `write_report`."""
    recipe, metrics, slim = Recipe.load(directory), Metrics.load(directory), SlimViT.load(directory)
    architecture = slim.architecture
    compared = compare_runs([directory, *compare]) if compare else None
    stale = stale_metrics(metrics, architecture, count_parameters(slim))
    if stale is not None:
        unmeasured = {"slim": slim_figures(slim, None, directory), "pruned_top1": None}
        metrics = metrics.model_copy(update=unmeasured | {"dense": metrics.dense.model_copy(update={"top1": None})})
    files, built = exported_files(directory), engines(directory)
    measured, searched = (
        current_benchmark(directory, architecture),
        read_search(directory, architecture, recipe.runtime),
    )
    seen = look(directory, data, metrics, images)
    looked = seen if isinstance(seen, str) else _looked(directory, seen, slim, files)
    return Page(
        directory=directory,
        version=__version__,
        architecture=architecture,
        metrics=metrics,
        stale=stale,
        asked=tuple(asked(recipe, Provenance.load(directory), metrics, architecture)),
        recipe=(directory / RECIPE_FILE).read_text(),
        benchmark=measured,
        machine="" if isinstance(measured, str) else in_a_line(measured.machine),
        searched=searched,
        looked=looked,
        files=tuple(files),
        engines=tuple(built),
        compared=compared,
        commands=tuple(commands(directory, recipe, metrics, architecture, files, built, _batch(searched))),
        forecasts=tuple(forecast_run(directory, target) for target in forecast_targets(recipe, searched)),
        charts={
            "blocks": drawn.blocks(architecture),
            "speed": () if isinstance(measured, str) else drawn.speed(measured),
            "curves": () if isinstance(searched, str) else drawn.loss_curves(searched.losses),
            "classes": () if isinstance(looked, str) else drawn.classes(looked.classes),
            "kernels": drawn.kernels(built),
        },
    )


def forecast_targets(recipe: Recipe, searched: Searched | str) -> list[Target]:
    """What is forecast: first what the run's own target was of, if that was a forecast."""
    usual = [Target(GPUS[gpu], "tensorrt", "fp16", FORECAST_BATCHES) for gpu in FORECAST_GPUS]
    if recipe.runtime is None or not is_forecast(recipe.runtime):
        return usual
    own = parse_target(recipe.runtime, recipe.latency_precision, _batch(searched) or recipe.latency_batch)
    alike = [(own.gpu, own.engine, own.precision) == (other.gpu, other.engine, other.precision) for other in usual]
    batches = sorted({*own.batches, *FORECAST_BATCHES})
    return [replace(own, batches=batches), *(other for other, same in zip(usual, alike, strict=True) if not same)]


def _batch(searched: Searched | str) -> int | None:
    """Which the run was planned for; None: for none."""
    return None if isinstance(searched, str) else searched.plan_batch


def _looked(directory: Path, seen: Seen, slim: SlimViT, files: Sequence[ExportedFile]) -> Looked | str:
    architecture = slim.architecture
    classes = load_classes(directory, architecture.dense.num_classes)
    macs = {
        False: architecture.macs(),
        True: architecture.model_copy(update={"blocks": architecture.dense.blocks()}).macs(),
    }
    try:
        return Looked(
            data=seen.data.name,
            images=len(seen.chosen),
            total=seen.total,
            slim_top1=top1_of(seen.slim, seen.labels),
            dense_top1=None if seen.dense is None else top1_of(seen.dense, seen.labels),
            only_one_right=only_one_right(seen),
            classes=tuple(by_class(seen, classes)),
            confusions=tuple(confusions(seen, classes)),
            files=files_top1(seen, files, macs),
            pictures=tuple(pictures(seen, slim, classes)),
        )
    except (InputError, OSError) as error:  # a picture that has gone since the others were read
        return str(error)


def render(page: Page) -> str:
    """The page as HTML. Whatever a user named is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (words.percent, words.points, words.count, words.scaled, words.small, words.milliseconds, words.batches)
    environment.filters.update({function.__name__: function for function in filters})
    environment.tests["missing"] = lambda value: isinstance(value, str)
    environment.globals.update(change=words.change, NOT_MEASURED=words.NOT_MEASURED, QUANTISED=QUANTISED)
    return environment.get_template("page.html").render(page=page)
