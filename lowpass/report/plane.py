"""Shapes in a plane, and axes: what charts are made of.

All charts are as wide as a phone, so that their letters are as large as the text's on any screen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH = 340.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 12.0, 14.0, 40.0  # around what is plotted
PLOT = 170.0  # height of what is plotted
TICKS = 4  # about how many on an axis

Kind = Literal["dense", "slim", "other", "grid", "axis", "muted", "text"]


@dataclass(frozen=True)
class Shape:
    """`rect`: x, y, width, height; `line`: points; `dot`: x, y; `text`: x, y, words. `kind` is what it stands for,
    `hint` what it says when pointed at, `strength` how opaque it is."""

    form: Literal["rect", "line", "dot", "text"]
    kind: Kind
    x: float = 0
    y: float = 0
    width: float = 0
    height: float = 0
    points: str = ""
    words: str = ""
    anchor: Literal["start", "middle", "end"] = "start"
    hint: str = ""
    strength: float = 1


@dataclass(frozen=True)
class Chart:
    """A chart. `alt` says in words what it shows, `legend` which kinds stand for what."""

    title: str
    alt: str
    height: float
    shapes: tuple[Shape, ...]
    legend: tuple[tuple[Kind, str], ...] = ()
    width: float = WIDTH


@dataclass(frozen=True)
class Axis:
    """From values to places between `start` and `end`; `logarithmic` values are above 0."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value lies."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values within."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, max(1, -(-(last - first) // TICKS)))]
        step = round_step((self.high - self.low) / TICKS)
        first = math.ceil(self.low / step - 1e-9)
        return [round(step * n, 10) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def spanning(values: Sequence[float], start: float, end: float, logarithmic: bool = False, least: float = 1e-6) -> Axis:
    """An axis that holds all values, with some room beside them: `least` where they are all the same."""
    low, high = min(values), max(values)
    if logarithmic:
        return Axis(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9), start, end, True)
    room = 0.12 * (high - low) or max(abs(high) * 0.05, least)
    return Axis(low - room, high + room, start, end)


def frame(x: Axis, y: Axis, x_label: str, y_label: str, x_ticks: Sequence[float] | None = None) -> list[Shape]:
    """Grid, ticks and the names of the axes."""
    bottom, shapes = TOP + PLOT, list[Shape]()
    for value in y.ticks():
        shapes.append(line("grid", [(LEFT, y.at(value)), (WIDTH - RIGHT, y.at(value))]))
        shapes.append(Shape("text", "muted", LEFT - 5, y.at(value) + 4, words=short(value), anchor="end"))
    for value in x.ticks() if x_ticks is None else x_ticks:
        shapes.append(Shape("text", "muted", x.at(value), bottom + 15, words=short(value), anchor="middle"))
    shapes.append(line("axis", [(LEFT, bottom), (WIDTH - RIGHT, bottom)]))
    shapes.append(Shape("text", "muted", (LEFT + WIDTH - RIGHT) / 2, bottom + 32, words=x_label, anchor="middle"))
    if y_label:
        shapes.append(Shape("text", "muted", 2, TOP - 3, words=y_label))
    return shapes


def short(value: float) -> str:
    """Of a tick."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:g}"


def line(kind: Kind, points: Sequence[tuple[float, float]], hint: str = "", strength: float = 1) -> Shape:
    return Shape("line", kind, points=" ".join(f"{x:g},{y:g}" for x, y in points), hint=hint, strength=strength)
