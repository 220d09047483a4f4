"""Plots of what was measured."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

from pipeline.files import write_bytes

if TYPE_CHECKING:
    from benchmarks.accuracy import Accuracy
    from benchmarks.suite import ModelResult

matplotlib.use("Agg")
COLOURS = {
    "lowpass": "#0b6e4f",
    "as-published": "#c0392b",
    "no-recovery": "#8e44ad",
    "uniform-width": "#7f8c8d",
    "evit": "#2e86c1",
    "tome": "#d68910",
}


def plot_efficiency(result: "ModelResult", model: str, path: Path) -> None:
    """Efficiency by batch size, one panel a runtime, one bar a model; the line at 1 is every saved MAC arriving as
    time. Nothing is drawn where nothing was measured."""
    engines = [engine for engine in result.engines if engine.batches]
    if not engines:
        return
    figure = Figure(figsize=(7.5, 2.6 * len(engines)), layout="constrained")
    panels = figure.subplots(len(engines), 1, squeeze=False)[:, 0]
    names = [name for name in result.macs if name != "dense"]
    for panel, engine in zip(panels, engines, strict=True):
        width = 0.8 / max(1, len(names))
        for position, name in enumerate(names):
            offset = (position - (len(names) - 1) / 2) * width
            for place, figures in enumerate(engine.batches.values()):
                if name not in figures:
                    continue
                bar = figures[name]
                scale = bar.efficiency / bar.speedup
                low, high = (quartile * scale for quartile in bar.speedup_quartiles)
                error = [[max(0.0, bar.efficiency - low)], [max(0.0, high - bar.efficiency)]]
                panel.bar(
                    place + offset,
                    bar.efficiency,
                    width,
                    color=COLOURS.get(name, "black"),
                    yerr=error,
                    error_kw={"elinewidth": 0.8},
                    label=name if place == 0 else None,
                )
        panel.axhline(1, color="black", linewidth=0.8, linestyle="--")
        panel.set_xticks(range(len(engine.batches)), [f"batch {batch}" for batch in engine.batches])
        panel.set_ylabel("efficiency")
        panel.set_title(f"{model}, {engine.runtime} {engine.precision}", fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(ncols=len(names), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.32), frameon=False)
    write_figure(figure, path)


def plot_accuracy(done: "Accuracy", path: Path) -> None:
    """Top-1 against MACs, one panel before and one after fine-tuning, one line a variant; bars are the standard
    deviation over the seeds."""
    stages = [("pruned_top1", "no training"), ("finetuned_top1", "fine-tuned")]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, (field, title) in zip(panels, stages, strict=True):
        for variant in dict.fromkeys(summary.variant for summary in done.summaries):
            points = sorted(
                (summary.target, spread.mean, spread.deviation)
                for summary in done.summaries
                if summary.variant == variant and (spread := getattr(summary, field)) is not None
            )
            if points:
                shares, means, deviations = zip(*points, strict=True)
                style = {"capsize": 3, "marker": "o", "markersize": 4, "color": COLOURS.get(variant, "black")}
                panel.errorbar(shares, means, deviations, label=variant, **style)
        panel.axhline(done.seeds[0].dense_top1, color="black", linewidth=0.8, linestyle="--", label="dense")
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel("share of the dense MACs")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_xaxis()  # both: the axis is shared
    panels[0].set_ylabel("top-1, percent")
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """A figure as PNG, written whole."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_bytes(path, content.getvalue())
