"""Options that several commands take, and how an answer is given."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel
from rich.console import Console

from lowpass.pipeline.base.errors import InputError

if TYPE_CHECKING:
    from lowpass.benchmarks.latency.compare import Benchmark
    from lowpass.pipeline.run.metrics import Metrics

PrecisionOption = Literal["fp32", "fp16", "bf16", "int8", "int8-fp16", "fp8"]
RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="Run directory, as made by `lowpass compress`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, alone, on standard output.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="'digits'; a folder with train/CLASS/... and val/CLASS/... (or CLASS/... alone); "
        "or hfds/NAME. For a run: its own unless given."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything drawn at random.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Of fine-tuning; 40 for the digits, 150 otherwise.")]
Resume = Annotated[bool, typer.Option(help="Go on with an interrupted run; the outcome is the same.")]


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers with commas between them; None: nothing was given.

    Raises:
        InputError: they are none.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{option} takes numbers with commas between them, such as 0.5,0.5,0.5; not {text!r}"
        ) from None


def answer(directory: Path, metrics: "Metrics", measured: "Benchmark | None", as_json: bool) -> None:
    """The result as JSON or as a table."""
    from lowpass.benchmarks.latency.summary import as_table, summarise

    result = summarise(directory, metrics, measured)
    say(result.model_dump(mode="json"), as_table(result), as_json)
    if not as_json:
        print(f"run directory: {directory}")


def say(value: dict[str, Any] | BaseModel, text: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(value))
    else:
        Console(highlight=False, markup=False).print(text, soft_wrap=isinstance(text, str))
