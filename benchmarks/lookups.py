"""Figures of a study, looked up among its rows."""

from collections.abc import Iterable
from pathlib import Path

from lowpass.benchmarks.accuracy.table import spread
from lowpass.benchmarks.rows import read_rows

Rows = list[dict[str, str]]


def study(results: Path, name: str, **of: str) -> Rows:
    """The rows of a study that are of these things.

    Raises:
        InputError: there is no such study.
    """
    rows = read_rows(results / f"{name}.csv")
    return [row for row in rows if all(row.get(key) == value for key, value in of.items())]


def different(rows: Iterable[dict[str, str]], *keys: str) -> list[tuple[str, ...]]:
    """What there is of these keys, in the order of the rows."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def one(rows: Rows, figure: str, **of: str) -> dict[str, str] | None:
    """The row of a figure."""
    found = [row for row in rows if row["figure"] == figure and all(row[key] == value for key, value in of.items())]
    return found[-1] if found else None


def number(row: dict[str, str] | None, form: str) -> str:
    """Its value, or a dash."""
    return "-" if row is None else form.format(float(row["value"]))


def over_seeds(rows: Rows, figure: str, **of: str) -> str:
    """Mean, and half of the 95% interval of the mean (Student's t) where there are seeds enough for one."""
    values = [
        float(row["value"]) for row in rows if row["figure"] == figure and all(row[k] == v for k, v in of.items())
    ]
    if not values:
        return "-"
    all_ = spread(values)
    return f"{all_.mean:.2f}" if all_.half_interval is None else f"{all_.mean:.2f} ± {all_.half_interval:.2f}"
