"""Figures, as the benchmarks draw them."""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from lowpass.pipeline.base.files import write_bytes

matplotlib.use("Agg")
COLOURS = {
    "dense-exported": "#aab2b8",
    "lowpass": "#0b6e4f",
    "as-published": "#c0392b",
    "no-recovery": "#8e44ad",
    "uniform-width": "#7f8c8d",
    "evit": "#2e86c1",
    "tome": "#d68910",
}


def write_figure(figure: Figure, path: Path) -> None:
    """A figure as PNG, written whole."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_bytes(path, content.getvalue())
