"""The picture of the README, drawn from the results: `python -m lowpass.benchmarks.headline`."""

from pathlib import Path

from matplotlib.figure import Figure

from lowpass.benchmarks.figures import COLOURS, write_figure
from lowpass.benchmarks.lookups import one, study
from lowpass.benchmarks.rows import RESULTS
from lowpass.pipeline.base.exits import exit_codes

SHOWN = {"lowpass": "lowpass", "as-published": "VTC-LFC as published", "evit": "EViT", "tome": "ToMe"}
RUNTIMES = {("onnxruntime", "fp32"): "ONNX Runtime, FP32", ("openvino", "bf16"): "OpenVINO, BF16"}
BATCHES = ("1", "8", "32")


def draw(results: Path) -> Figure:
    """Speed-up over dense DeiT-Small at equal MACs; the line is what the MACs promise. Bars carry quartiles."""
    figure = Figure(figsize=(8.5, 3.0), layout="constrained")
    for panel, ((runtime, precision), title) in zip(figure.subplots(1, 2, sharey=True), RUNTIMES.items(), strict=True):
        rows = study(results, "speed_paper", model="deit_small")
        dense, slim = (one(rows, "macs", candidate=name) for name in ("dense", "lowpass"))
        assert dense is not None and slim is not None
        saved = float(dense["value"]) / float(slim["value"])
        for position, (candidate, label) in enumerate(SHOWN.items()):
            for place, batch in enumerate(BATCHES):
                at = {"runtime": runtime, "precision": precision, "batch": batch, "candidate": candidate}
                row = one(rows, "speedup", **at)
                if row is None:
                    continue
                value, low, high = (float(row[key]) for key in ("value", "low", "high"))
                panel.bar(
                    place + (position - 1.5) * 0.2,
                    value,
                    0.19,
                    color=COLOURS[candidate],
                    yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                    error_kw={"elinewidth": 0.8},
                    label=label if place == 0 else None,
                )
        panel.axhline(saved, color="black", linewidth=0.9, linestyle="--", label=f"MACs saved: {saved:.2f}x")
        panel.set_xticks(range(len(BATCHES)), [f"batch {batch}" for batch in BATCHES])
        panel.set_title(title, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("times faster than dense")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=5, fontsize=8, frameon=False, loc="outside lower center")
    figure.suptitle("DeiT-Small at the same MACs, two CPU cores", fontsize=11, x=0.01, ha="left")
    return figure


if __name__ == "__main__":
    with exit_codes():
        write_figure(draw(RESULTS), RESULTS / "headline.png")
