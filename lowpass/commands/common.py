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
MixedPrecisionOption = Literal["no", "bf16", "fp16"]
RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="Run directory, as made by `lowpass compress`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, alone, on standard output.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="'digits'; a folder with train/CLASS/... and val/CLASS/... (or CLASS/... alone); "
        "hfds/NAME, hfids/NAME or wds/FOLDER. For a run: its own unless given."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything drawn at random.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Of fine-tuning; 40 for the digits, 150 otherwise.")]
Resume = Annotated[bool, typer.Option(help="Go on with an interrupted run; the outcome is the same.")]
DATA, RUN, MACHINE = "Data", "Run", "Machine"  # panels of the help of commands with many options
ClassesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Names of the model's classes, a line each, by its logits.", rich_help_panel=DATA
    ),
]
ClassOrderOption = Annotated[
    Literal["natural", "plain"],
    typer.Option(help="How folders are numbered: as timm does, or torchvision.", rich_help_panel=DATA),
]
ExifOption = Annotated[
    bool, typer.Option("--exif", help="Turn pictures as their cameras were held.", rich_help_panel=DATA)
]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read.", rich_help_panel=DATA)
]
InputKey = Annotated[
    str | None, typer.Option(help="Column of the pictures; wds: their extension.", rich_help_panel=DATA)
]
TargetKey = Annotated[
    str | None, typer.Option(help="Column of the classes; wds: extension or JSON field.", rich_help_panel=DATA)
]
Yes = Annotated[bool, typer.Option("--yes", help="Go on with a model that is suspiciously bad.", rich_help_panel=RUN)]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Processes that read images. Default: a core each.", rich_help_panel=MACHINE),
]


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
        print(json.dumps(value.model_dump(mode="json") if isinstance(value, BaseModel) else value))
    else:
        Console(highlight=False, markup=False).print(text, soft_wrap=isinstance(text, str))
