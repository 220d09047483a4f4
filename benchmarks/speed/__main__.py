"""The speed benchmark: lowpass against its rivals at matched MACs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lowpass.benchmarks.rows import RESULTS
from lowpass.benchmarks.speed.candidates import CANDIDATES
from lowpass.benchmarks.speed.measured import Engine
from lowpass.benchmarks.speed.suite import run_suite
from lowpass.export.batch import parse_batches
from lowpass.export.runtimes.registry import (
    SUPPORTED,
)
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.exits import exit_codes

GPU_LIMIT_S = 500.0  # so that it ends within ten minutes


def parse_engines(text: str) -> list[Engine]:
    """`RUNTIME:PRECISION`, separated by commas.

    Raises:
        InputError: one is unknown, or the runtime does not compute in that precision.
    """
    chosen = []
    for part in text.split(","):
        runtime, _, precision = part.strip().partition(":")
        found = [(r, p) for r, all_ in SUPPORTED.items() for p in all_ if (r, p) == (runtime, precision)]
        if not found:
            known = ", ".join(f"{r}:{'|'.join(all_)}" for r, all_ in SUPPORTED.items())
            raise InputError(f"there is no {part.strip()!r}; choose from {known}")
        chosen += found
    return chosen


def _suite(
    suite: Annotated[Literal["paper", "gpu"], typer.Option(help="paper: against the rivals; gpu: all a GPU has.")],
    out: Annotated[Path, typer.Option(help="Folder of speed_SUITE.csv and the plots.")] = RESULTS,
    models: Annotated[
        str, typer.Option(help="Of deit_tiny, deit_small, deit_base.")
    ] = "deit_small,deit_tiny,deit_base",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,32,128",
    engines: Annotated[
        str | None, typer.Option(help="RUNTIME:PRECISION, separated by commas. [default: every one that makes sense]")
    ] = None,
    candidates: Annotated[str, typer.Option(help="Who is compared.")] = ",".join(CANDIDATES),
    seconds: Annotated[float, typer.Option(min=0.05, help="To time each model for, at each batch size.")] = 2.0,
    limit: Annotated[
        float | None, typer.Option(help="Begin nothing later than this many seconds. [default: 500 for gpu]")
    ] = None,
) -> None:
    """The speed benchmark."""
    run_suite(
        suite,
        out,
        [name.strip() for name in models.split(",")],
        parse_batches(batches),
        None if engines is None else parse_engines(engines),
        tuple(name.strip() for name in candidates.split(",")),
        seconds,
        GPU_LIMIT_S if limit is None and suite == "gpu" else limit,
    )


if __name__ == "__main__":
    with exit_codes():
        typer.run(_suite)
