"""Charts as shapes: the template draws them as SVG, the page's style colours them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowpass.report.plane import (
    BOTTOM,
    LEFT,
    PLOT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Chart,
    Kind,
    Shape,
    frame,
    line,
    short,
    spanning,
)

BOTH: tuple[tuple[Kind, str], ...] = (("slim", "slim"), ("dense", "dense"))  # what colours stand for
ROW = 38.0  # height of a row of a chart of rows
DIGIT = 7.0  # width of a character
POINT = 1.0  # of top-1
Box = tuple[float, float, float, float]  # left, right, top, bottom
EDGE: Box = (WIDTH, math.inf, -math.inf, math.inf)  # what lies right of a chart
BESIDE: tuple[tuple[Literal["start", "end"], float], ...] = (("start", 8), ("end", -8))  # a point


def columns(title: str, values: Sequence[int], dense: int, unit: str) -> Chart:
    """One column a block, in front of the dense model's."""
    y = Axis(0, dense, TOP + PLOT, TOP + 10)
    room = (WIDTH - LEFT - RIGHT) / len(values)
    x = Axis(0, len(values), LEFT, WIDTH - RIGHT)
    named = [i for i in range(len(values)) if i % -(-len(values) // 12) == 0]
    shapes = frame(x, y, "block", "", [])
    wide = room >= DIGIT * (len(str(dense)) + 0.8)  # the last: between two numbers
    for block, value in enumerate(values):
        left, width = round(x.at(block) + 0.12 * room, 1), round(0.76 * room, 1)
        hint = f"block {block}: {value} of {dense} {unit}"
        shapes.append(Shape("rect", "dense", left, y.at(dense), width, round(y.at(0) - y.at(dense), 1), hint=hint))
        shapes.append(Shape("rect", "slim", left, y.at(value), width, round(y.at(0) - y.at(value), 1), hint=hint))
        middle = round(left + width / 2, 1)
        if block in named:
            shapes.append(Shape("text", "muted", middle, TOP + PLOT + 15, words=str(block), anchor="middle"))
        if wide:
            shapes.append(Shape("text", "text", middle, round(y.at(value) - 4, 1), words=str(value), anchor="middle"))
    listed = ", ".join(map(str, values))
    return Chart(
        title,
        f"{title} by block from the bottom: {listed}; dense {dense}.",
        TOP + PLOT + BOTTOM,
        tuple(shapes),
        BOTH,
    )


@dataclass(frozen=True)
class Row:
    """One row: its name, the slim value, the dense one (None: there is none), and what is written behind."""

    name: str
    slim: float
    dense: float | None
    words: str


def bars(title: str, rows: Sequence[Row], legend: Sequence[tuple[Kind, str]], mark: float | None = None) -> Chart:
    """One bar a row, from 0; `mark` is drawn through all of them, the rows' dense values as a line across their own."""
    ends = [value for row in rows for value in (row.slim, row.dense, mark) if value is not None]
    x = Axis(0, max(ends) or 1, 2, WIDTH - 96)
    shapes = list[Shape]()
    for index, row in enumerate(rows):
        top = TOP + index * ROW
        shapes.append(Shape("text", "text", 2, top + 10, words=clipped(row.name, 46), hint=row.name))
        hint = f"{row.name}: {row.words}"
        shapes.append(Shape("rect", "slim", 2, top + 15, round(max(x.at(row.slim) - 2, 0.5), 1), 13, hint=hint))
        if row.dense is not None:
            shapes.append(line("dense", [(x.at(row.dense), top + 12), (x.at(row.dense), top + 31)], hint))
        end = max(x.at(row.slim), 2 if row.dense is None else x.at(row.dense))
        if mark is not None and end < x.at(mark) <= end + 6 + DIGIT * len(row.words):
            end = x.at(mark)  # or it would be struck through
        shapes.append(Shape("text", "muted", end + 6, top + 26, words=row.words))
    height = TOP + len(rows) * ROW
    if mark is not None:
        shapes.insert(0, line("other", [(x.at(mark), TOP), (x.at(mark), height - 4)], f"{mark:.2f}"))
    alt = f"{title}: " + "; ".join(f"{row.name} {row.words}" for row in rows) + "."
    return Chart(title, alt, height, tuple(shapes), tuple(legend))


def pairs(title: str, rows: Sequence[Row]) -> Chart:
    """Two dots a row, dense and slim, on one scale of percent."""
    ends = [value for row in rows for value in (row.slim, row.dense) if value is not None]
    x = spanning(ends, 8, WIDTH - 120, least=POINT)
    shapes = list[Shape]()
    for index, row in enumerate(rows):
        top = TOP + index * ROW
        shapes.append(Shape("text", "text", 2, top + 10, words=clipped(row.name, 46), hint=row.name))
        shapes.append(line("grid", [(8, top + 21), (WIDTH - 120, top + 21)]))
        if row.dense is not None:
            shapes.append(Shape("dot", "dense", x.at(row.dense), top + 21, width=7, hint=f"dense {row.dense:.2f} %"))
        shapes.append(Shape("dot", "slim", x.at(row.slim), top + 21, width=4, hint=f"slim {row.slim:.2f} %"))
        shapes.append(Shape("text", "muted", WIDTH - 108, top + 25, words=row.words))
    bottom = TOP + len(rows) * ROW
    for value in (tick for tick in x.ticks() if 0 <= tick <= 100):
        shapes.insert(0, line("grid", [(x.at(value), TOP), (x.at(value), bottom)]))
        shapes.append(Shape("text", "muted", x.at(value), bottom + 14, words=short(value), anchor="middle"))
    alt = f"{title}: " + "; ".join(f"{row.name} {row.words}" for row in rows) + "."
    return Chart(
        title, alt, bottom + 18, tuple(shapes), BOTH if any(row.dense is not None for row in rows) else BOTH[:1]
    )


def clipped(text: str, length: int) -> str:
    """Short enough to stand in a chart."""
    return text if len(text) <= length else text[: length - 1] + "…"


def curves(title: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], x_label: str) -> Chart | None:
    """One line a block, light at the bottom and dark at the top, over a logarithmic scale; None: nothing is above 0."""
    shown = [(name, [(x, y) for x, y in points if y > 0]) for name, points in lines]
    every = [point for _, points in shown for point in points]
    if not every:
        return None
    x = Axis(0, max(x for x, _ in every), LEFT, WIDTH - RIGHT)
    y = spanning([y for _, y in every], TOP + PLOT, TOP, logarithmic=True)
    whole = all(value == int(value) for value, _ in every) and x.high <= 12
    ticks = [float(n) for n in range(int(x.high) + 1)] if whole else None
    shapes = frame(x, y, x_label, "", ticks)
    for index, (name, points) in enumerate(shown):
        strength = round(0.35 + 0.65 * (index + 1) / len(shown), 2)
        places = [(x.at(a), y.at(b)) for a, b in points]
        if len(places) > 1:
            shapes.append(line("slim", places, name, strength))
        shapes += [
            Shape("dot", "slim", *place, hint=f"{name}: {b:.3g} at {a:g}", strength=strength, width=2.5)
            for place, (a, b) in zip(places, points, strict=True)
        ]
    losses = [loss for _, loss in every]
    alt = f"{title}, one line a block: from {min(losses):.3g} to {max(losses):.3g}. The tables below tell every one."
    return Chart(title, alt, TOP + PLOT + BOTTOM, tuple(shapes))


@dataclass(frozen=True)
class Point:
    """One model in a plane, with the letters it goes by."""

    name: str
    x: float
    y: float
    dense: bool


def pareto(title: str, points: Sequence[Point], x_label: str, y_label: str) -> Chart:
    """Models in a plane where less is better along x and more along y; a line joins those that none beats."""
    x = spanning([0.0, *(point.x for point in points)], LEFT, WIDTH - RIGHT)
    y = spanning([point.y for point in points], TOP + PLOT, TOP + 8, least=POINT)
    x = Axis(0, x.high, x.start, x.end)
    shapes = frame(x, y, x_label, y_label)
    best = unbeaten(points)
    shapes.append(line("axis", [(x.at(point.x), y.at(point.y)) for point in best]))
    labels = list[Shape]()
    for point in points:
        hint = f"{point.name}: {point.x:.4g} {x_label}, {point.y:.2f} {y_label}"
        place = x.at(point.x), y.at(point.y)
        shapes.append(Shape("dot", "dense" if point.dense else "slim", *place, hint=hint, width=5))
        labels.append(_beside(place, point.name, labels))
    shapes += labels
    listed = "; ".join(f"{point.name} {point.x:.4g}, {point.y:.2f}" for point in points)
    alt = f"{title}, as {x_label} and {y_label}: {listed}. None beats {', '.join(point.name for point in best)}."
    return Chart(title, alt, TOP + PLOT + BOTTOM, tuple(shapes), BOTH)


def _beside(place: tuple[float, float], words: str, others: Sequence[Shape]) -> Shape:
    """A label at a point, where it covers no other and stays within; if it can."""
    tried = [
        Shape("text", "text", place[0] + aside, place[1] + down, words=words, anchor=anchor)
        for down in (-6, 15, -20, 29)
        for anchor, aside in BESIDE
    ]
    taken = [_box(other) for other in others] + [EDGE]
    return next((label for label in tried if not any(_overlap(_box(label), box) for box in taken)), tried[0])


def _box(label: Shape) -> Box:
    width = DIGIT * len(label.words)
    left = label.x if label.anchor == "start" else label.x - width
    return left, left + width, label.y - 11, label.y


def _overlap(one: Box, two: Box) -> bool:
    return one[0] < two[1] and two[0] < one[1] and one[2] < two[3] and two[2] < one[3]


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats, by x."""
    best = list[Point]()
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best
