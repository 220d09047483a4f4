"""What the study of noisy images found."""

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from lowpass.benchmarks.accuracy.table import Spread, as_text
from lowpass.benchmarks.latency.machine import Machine, in_a_line
from lowpass.benchmarks.rows import Row


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NoisePoint(_Frozen):
    """One criterion at one strength: top-1 in percent, seed by seed."""

    scored: str
    variant: str
    noise: float
    top1: tuple[float, ...]
    spread: Spread


class Noise(_Frozen):
    """Everything there is."""

    title: str
    command: str
    seconds: float
    machine: Machine
    points: tuple[NoisePoint, ...]


def as_markdown(done: Noise) -> str:
    """The table, with what it was measured by."""
    lines = [
        f"# {done.title}",
        "",
        f"`{done.command}`, {done.seconds / 60:.1f} minutes on {in_a_line(done.machine)}",
        "",
        "Top-1 in percent on clean images, no training: mean ± half of the 95% interval of the mean over the seeds "
        "(sample standard deviation).",
        "",
        "| scored on noisy images | by | noise | seeds | top-1 | each seed |",
        "|---|---|--:|--:|--:|---|",
    ]
    for point in done.points:
        each = ", ".join(f"{value:.1f}" for value in point.top1)
        lines.append(
            f"| {point.scored} | {point.variant} | {point.noise:g} | {len(point.top1)} | {as_text(point.spread)} "
            f"| {each} |"
        )
    return "\n".join(lines) + "\n"


def rows(done: Noise) -> Iterator[Row]:
    """Every seed's top-1."""
    for point in done.points:
        for seed, measured in enumerate(point.top1):
            of = {"scored": point.scored, "variant": point.variant, "noise": point.noise, "seed": seed}
            yield Row(of, "top1_no_training", measured)
