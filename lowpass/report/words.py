"""Figures in words, as the page shows them. What was not measured says so."""

NOT_MEASURED = "not measured"
SPACE = "\N{NO-BREAK SPACE}"  # between a figure and its unit


def percent(value: float | None) -> str:
    """Of a share in percent."""
    return NOT_MEASURED if value is None else f"{value:.2f}{SPACE}%"


def points(change: float | None) -> str:
    """Of a change between two percentages, without its unit."""
    return "–" if change is None else f"{change:+.2f}".replace("-", "−")


def count(value: int | None) -> str:
    """Of a whole number."""
    return NOT_MEASURED if value is None else f"{value:,}"


def scaled(value: float, unit: str = "") -> str:
    """Of a large number: 4.61 G, 24.02 M, 1.51 MB."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f}{SPACE}{prefix}{unit}"
    return f"{value:g}{SPACE}{unit}".rstrip()


def change(before: float, after: float) -> str:
    """Of a size, in percent of what it was."""
    return f"{100 * after / before - 100:+.1f}{SPACE}%".replace("-", "−")


def small(value: float | None) -> str:
    """Of an error or a loss."""
    return "–" if value is None else f"{value:.3g}"


def milliseconds(value: float) -> str:
    """With three digits that say something."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def batches(profile: str) -> str:
    """Of the batch sizes that an engine's kernels are for: `1:8:32`, or one size."""
    sizes = profile.split(":")
    return profile if len(set(sizes)) == 1 else f"any from {sizes[0]} to {sizes[-1]}"
