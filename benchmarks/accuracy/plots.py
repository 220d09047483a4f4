"""Plots of what was measured."""

from pathlib import Path

from matplotlib.figure import Figure

from lowpass.benchmarks.accuracy.noise_table import Noise
from lowpass.benchmarks.accuracy.table import Accuracy, Spread
from lowpass.benchmarks.figures import COLOURS, write_figure

FEWEST_SEEDS = 3  # for a bar


def plot_accuracy(done: Accuracy, path: Path) -> None:
    """Top-1 against MACs, a row of panels for each group of variants, before and after fine-tuning; or at a single
    target one line a variant. Bars are the 95% interval of the mean over the seeds, dots the seeds where they are too
    few for one."""
    if len({summary.target for summary in done.summaries}) == 1:
        _plot_variants(done, path)
        return
    groups = list(dict.fromkeys(summary.group for summary in done.summaries))
    figure = Figure(figsize=(9, 0.6 + 3 * len(groups)), layout="constrained")
    rows = figure.subplots(len(groups), 2, sharex=True, sharey="row", squeeze=False)
    for panels, group in zip(rows, groups, strict=True):
        members = [summary for summary in done.summaries if summary.group == group]
        for panel, (stage, title) in zip(panels, STAGES.items(), strict=True):
            for place, variant in enumerate(dict.fromkeys(summary.variant for summary in members)):
                points = sorted(
                    (summary.target, spread.mean, _bar(spread, count))
                    for summary in members
                    if summary.variant == variant and (spread := getattr(summary, stage)) is not None
                    for count in [len(_seeds(done, variant, summary.target, stage))]
                )
                if points:
                    shares, means, errors = zip(*points, strict=True)
                    style = {"capsize": 3, "marker": "o", "markersize": 4, "color": COLOURS.get(variant, f"C{place}")}
                    panel.errorbar(shares, means, errors, label=variant, **style)
                for share, _, bar in points:
                    few = [] if bar else _seeds(done, variant, share, stage)
                    panel.scatter([share] * len(few), few, s=8, color=style["color"], alpha=0.6)
            panel.axhline(done.seeds[0].dense_top1, color="black", linewidth=0.8, linestyle="--", label="dense")
            panel.set_title(f"{group}, {title}", fontsize=10, loc="left")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("top-1, percent")
        panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    for panel in rows[-1]:
        panel.set_xlabel("share of the dense MACs")
    rows[0, 0].invert_xaxis()  # all: the axis is shared
    write_figure(figure, path)


def _seeds(done: Accuracy, variant: str, target: float, stage: str) -> list[float]:
    """Top-1 of every seed that has one."""
    found = [getattr(one, stage) for one in done.seeds if (one.variant, one.target) == (variant, target)]
    return [top1 for top1 in found if top1 is not None]


def _bar(spread: Spread, count: int) -> float:
    """Two seeds have an interval, but one that says more of Student's t than of them."""
    return spread.half_interval or 0.0 if count >= FEWEST_SEEDS else 0.0


STAGES = {"pruned_top1": "no training", "finetuned_top1": "fine-tuned"}


def _plot_variants(done: Accuracy, path: Path) -> None:
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(done.summaries)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = [summary.variant for summary in done.summaries]
    for panel, (stage, title) in zip(panels, STAGES.items(), strict=True):
        for place, summary in enumerate(done.summaries):
            spread = getattr(summary, stage)
            if spread is not None:
                panel.errorbar(
                    spread.mean, place, xerr=spread.half_interval or 0.0, marker="o", capsize=3, color="#0b6e4f"
                )
        panel.set_title(f"{title}, {done.summaries[0].target:g} of the MACs", fontsize=10, loc="left")
        panel.set_xlabel("top-1, percent")
        panel.grid(axis="y", linewidth=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    write_figure(figure, path)


def plot_noise(done: Noise, path: Path) -> None:
    """Top-1 against the strength of the noise, one panel for what is scored; bars are 95% intervals."""
    kinds = list(dict.fromkeys(point.scored for point in done.points))
    figure = Figure(figsize=(4.5 * len(kinds), 3.2), layout="constrained")
    for panel, scored in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for variant in dict.fromkeys(point.variant for point in done.points if point.scored == scored):
            points = [point for point in done.points if point.variant == variant]
            panel.errorbar(
                [point.noise for point in points],
                [point.spread.mean for point in points],
                [point.spread.half_interval or 0.0 for point in points],
                label=variant,
                capsize=3,
                marker="o",
                markersize=4,
            )
        panel.set_title(f"{scored} scored on noisy images, no training", fontsize=10, loc="left")
        panel.set_xlabel("standard deviation of the noise")
        panel.set_ylabel("top-1, percent")
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    write_figure(figure, path)
