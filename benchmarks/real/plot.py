"""The table of the real model as a plot: top-1 without training against the MACs that stay."""

from pathlib import Path

from matplotlib.figure import Figure

from lowpass.benchmarks.figures import COLOURS, write_figure
from lowpass.benchmarks.rows import Row


def plot_rows(rows: list[Row], path: Path) -> None:
    """A panel a setting, a line a method: the mean over its seeds, and a dot for each."""
    settings = list(dict.fromkeys(str(row.of["setting"]) for row in rows))
    figure = Figure(figsize=(5.5 * max(1, len(settings)), 4.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(settings)), squeeze=False)[0]
    for panel, setting in zip(panels, settings, strict=True):
        own = [row for row in rows if row.of["setting"] == setting]
        for place, method in enumerate(dict.fromkeys(str(row.of["method"]) for row in own)):
            found: dict[float, list[float]] = {}
            for row in own:
                if row.of["method"] == method and row.figure == "top1_no_training":
                    found.setdefault(float(str(row.of["level"])), []).append(float(row.value))
            levels = sorted(found)
            means = [sum(found[level]) / len(found[level]) for level in levels]
            colour = COLOURS.get(method, f"C{place}")
            panel.plot(levels, means, label=method, marker="o", markersize=4, color=colour)
            for level in levels:
                panel.scatter([level] * len(found[level]), found[level], s=8, color=colour, alpha=0.6)
        dense = [float(row.value) for row in own if row.figure == "top1_dense"]
        panel.axhline(dense[0] if dense else 0, color="black", linewidth=0.8, linestyle="--", label="dense")
        panel.set_title(setting, fontsize=10, loc="left")
        panel.set_xlabel("share of the dense MACs")
        panel.spines[["top", "right"]].set_visible(False)
        panel.invert_xaxis()
    panels[0].set_ylabel("top-1 without training, percent")
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    write_figure(figure, path)
