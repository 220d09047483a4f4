"""Fit the forecasts' rates, and forecast every published row from a fit without its model, and without its GPU.

    python -m lowpass.benchmarks.forecast

It writes the rates that `lowpass forecast` uses, too: `export/forecast/calibration.json`.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from lowpass.benchmarks.figures import write_figure
from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.rows import RESULTS, Row, write_rows
from lowpass.export.forecast.calibration import FILE, HeldOut, fit, seconds
from lowpass.export.forecast.published import Published, published
from lowpass.pipeline.base.exits import exit_codes
from lowpass.pipeline.base.files import write_text
from lowpass.pipeline.base.progress import track

LARGE = 32  # batches from here on are bound by arithmetic and memory, smaller ones by launches
Errors = list[tuple[Published, float]]  # relative: forecast over published, less one
RATES = Path("export/forecast") / FILE


def left_out(rows: Sequence[Published], key: Callable[[Published], str], what: str) -> Errors:
    """Each row forecast from a fit without those that share its key."""
    errors = Errors()
    for name in track(sorted({key(row) for row in rows}), f"leaving out {what}"):
        fitted = fit([row for row in rows if key(row) != name])
        errors += [(row, 1000 * seconds(row, fitted) / row.ms - 1) for row in rows if key(row) == name]
    return errors


def held_out(errors: Errors, key: Callable[[Published], str]) -> dict[str, HeldOut]:
    """Summed up by key."""
    found = defaultdict[str, list[float]](list)
    for row, error in errors:
        found[key(row)].append(abs(error))
    return {
        name: HeldOut(rows=len(off), median=float(np.median(off)), nine_in_ten=float(np.quantile(off, 0.9)))
        for name, off in sorted(found.items())
    }


def size_of(row: Published) -> str:
    """Of its batch."""
    return f"{LARGE} and more" if row.batch >= LARGE else "less"


def figures(study: str, errors: Errors) -> list[Row]:
    """A row a group: the median error, and what nine in ten stay below."""
    found = []
    groups = held_out(errors, lambda row: f"{row.gpu.name}|{row.engine}|{row.precision}|{size_of(row)}")
    for name, off in groups.items():
        gpu, engine, precision, batches = name.split("|")
        of = {"left_out": study, "gpu": gpu, "engine": engine, "precision": precision, "batches": batches}
        found += [Row(of, "rows", off.rows), Row(of, "median_error", off.median)]
        found.append(Row(of, "nine_in_ten_below", off.nine_in_ten))
    return found


def draw(models: Errors, gpus: Errors) -> Any:
    """Forecast against published, a point a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, errors, title in zip(
        figure.subplots(1, 2, sharey=True), (models, gpus), ("its model left out", "its GPU left out"), strict=True
    ):
        for engine in sorted({row.engine for row, _ in errors}):
            mine = [(row.ms, error) for row, error in errors if row.engine == engine]
            axes.scatter(*zip(*((ms, 100 * error) for ms, error in mine), strict=True), s=12, alpha=0.7, label=engine)
        axes.set(xscale="log", xlabel="published ms", title=title)
        axes.axhline(0, color="grey", lw=0.8)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("forecast over published, %")
    figure.axes[0].legend()
    return figure


def main(
    out: Annotated[Path, typer.Option(help="Results, as .csv and .png of this name.")] = RESULTS / "forecast",
    rates: Annotated[Path, typer.Option(help="Where the fitted rates go.")] = RATES,
) -> None:
    """A minute or two on one core."""
    with exit_codes():
        rows = published()
        models = left_out(rows, lambda row: row.model, "models")
        gpus = left_out(rows, lambda row: row.gpu.name, "GPUs")
        fitted = fit(rows).model_copy(
            update={
                "models_left_out": held_out(models, lambda row: f"{row.gpu.name} {row.engine}"),
                "gpus_left_out": held_out(gpus, lambda row: row.gpu.name)
                | held_out(gpus, lambda row: row.engine)
                | held_out(gpus, lambda _row: "all"),
            }
        )
        write_text(rates, fitted.model_dump_json(indent=1) + "\n")
        found = [*figures("model", models), *figures("gpu", gpus)]
        write_rows(out.with_suffix(".csv"), found, describe(), "python -m lowpass.benchmarks.forecast")
        write_figure(draw(models, gpus), out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
