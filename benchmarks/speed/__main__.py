"""The speed benchmark: lowpass against its rivals at matched MACs."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from lowpass.benchmarks.rows import RESULTS
from lowpass.benchmarks.speed.measured import Engine
from lowpass.benchmarks.speed.plans import Plan, dry_run, gpu, paper
from lowpass.benchmarks.speed.suite import run_suite
from lowpass.export.batch import parse_batches
from lowpass.export.runtimes.registry import SUPPORTED
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.exits import exit_codes

DRY_RUNS = Path("runs/dry-run")


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


def plan_of(suite: Literal["paper", "gpu"], device: Literal["gpu", "cpu"] | None) -> tuple[str, Plan]:
    """The name of a suite's results, and its plan.

    Raises:
        InputError: the GPU suite is to run without a GPU, or a device is given for another.
    """
    if suite == "paper":
        if device is not None:
            raise InputError("--device is for --suite gpu; the paper's suite takes every runtime that is here")
        return suite, paper()
    if device == "cpu":
        return "gpu_dry_run", dry_run()
    if not torch.cuda.is_available():
        raise InputError(
            f"the gpu suite needs an NVIDIA GPU, and torch {torch.__version__} sees none; "
            "--device cpu tries its steps without one"
        )
    return suite, gpu()


def _suite(
    suite: Annotated[Literal["paper", "gpu"], typer.Option(help="paper: against the rivals; gpu: all a GPU has.")],
    device: Annotated[
        Literal["gpu", "cpu"] | None,
        typer.Option(help="Of --suite gpu. cpu: a short dry run, whose figures say nothing of a GPU. [default: gpu]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help=f"Folder of speed_SUITE.csv and the plots. [default: {RESULTS}; of a dry run {DRY_RUNS}]"),
    ] = None,
    models: Annotated[str | None, typer.Option(help="Of deit_tiny, deit_small, deit_base. [default: all]")] = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes. [default: 1,8,32,128]")] = None,
    engines: Annotated[
        str | None, typer.Option(help="RUNTIME:PRECISION, separated by commas. [default: every one that makes sense]")
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Who is compared. [default: paper: all; gpu: all whose shapes are a rival's]")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.05, help="To time each model for, at each batch size. [default: 2]")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="Begin nothing later than this many seconds. [default: 500 for gpu]")
    ] = None,
) -> None:
    """The speed benchmark."""
    name, plan = plan_of(suite, device)
    told: dict[str, Any] = {
        "models": None if models is None else _names(models),
        "batches": None if batches is None else tuple(parse_batches(batches)),
        "engines": None if engines is None else tuple(parse_engines(engines)),
        "names": None if candidates is None else _names(candidates),
        "seconds": seconds,
        "limit_s": limit,
    }
    plan = replace(plan, **{field: value for field, value in told.items() if value is not None})
    run_suite(name, out or (RESULTS if plan.note is None else DRY_RUNS), plan)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


if __name__ == "__main__":
    with exit_codes():
        typer.run(_suite)
