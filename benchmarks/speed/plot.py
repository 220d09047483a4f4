"""Efficiency of every candidate, by runtime and batch size."""

from pathlib import Path

from matplotlib.figure import Figure

from lowpass.benchmarks.figures import COLOURS, write_figure
from lowpass.benchmarks.speed.measured import ModelResult


def plot_efficiency(result: ModelResult, model: str, path: Path) -> None:
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
                bar = figures.get(name)
                if bar is None or bar.speedup is None or bar.efficiency is None or bar.speedup_quartiles is None:
                    continue
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
