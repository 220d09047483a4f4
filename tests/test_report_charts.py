"""The charts of the report: nothing covers anything, and axes end at round numbers."""

import re

import pytest
import torch

from lowpass.report.charts import Point, pareto, unbeaten
from lowpass.report.patches import _outline
from lowpass.report.plane import Axis, spanning


def test_dropped_patches_are_outlined() -> None:
    dropped = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    painted = torch.zeros_like(dropped)
    for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", _outline(dropped)):
        painted[int(y), int(x) : int(x) + int(width)] = True
    assert torch.equal(painted, dropped)


def test_no_run_beats_those_on_the_line() -> None:
    points = [
        Point(name, x, y, False) for name, x, y in (("a", 1, 5), ("b", 2, 4), ("c", 3, 9), ("d", 1, 6), ("e", 4, 9))
    ]
    assert [point.name for point in unbeaten(points)] == ["d", "c"]
    drawn = pareto("title", points, "x", "y")
    labels = [shape for shape in drawn.shapes if shape.kind == "text"]
    assert len({(label.x, label.y) for label in labels}) == len(points)
    assert "None beats d, c." in drawn.alt


@pytest.mark.parametrize(
    ("low", "high", "wanted"), [(0, 1, [0, 0.5, 1]), (0, 384, [0, 100, 200, 300]), (3, 3.4, [3, 3.1, 3.2, 3.3, 3.4])]
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert Axis(low, high, 0, 1).ticks() == pytest.approx(wanted)


def test_ticks_of_a_logarithmic_axis() -> None:
    axis = spanning([3e-6, 0.02], 0, 100, logarithmic=True)
    assert (axis.low, axis.high) == pytest.approx((1e-6, 0.1)) and axis.ticks() == pytest.approx([1e-6, 1e-4, 1e-2])
    assert axis.at(1e-6) == 0 and axis.at(0.1) == 100
