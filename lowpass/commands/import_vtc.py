"""From a checkpoint that the authors' code compressed to a run directory: `import-vtc`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lowpass.commands.common import (
    AsJson,
    ClassesOption,
    ClassOrderOption,
    DataOption,
    ExifOption,
    InputKey,
    SkipUnreadable,
    TargetKey,
    Workers,
    Yes,
    answer,
    numbers,
)


def import_vtc(
    checkpoint: Annotated[
        Path, typer.Argument(help="What VTC-LFC's released code saved: model, dim_cfg and token_cfg, or a dense model.")
    ],
    out: Annotated[Path, typer.Option(help="Run directory, new or empty.")],
    qk_scale: Annotated[
        float, typer.Option(help="What queries are multiplied by: the dense model's head size to the power of -0.5.")
    ] = 0.125,
    cutoff: Annotated[float, typer.Option(help="Low-pass along the tokens for LFE.")] = 0.85,
    dense: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="The dense model it was cut out of: needed to distil and to compare."),
    ] = None,
    data: DataOption = None,
    mean: Annotated[str | None, typer.Option(metavar="R,G,B", help="Of the pixels. Default: ImageNet's.")] = None,
    std: Annotated[str | None, typer.Option(metavar="R,G,B", help="Of the pixels, likewise.")] = None,
    crop_pct: Annotated[
        float | None, typer.Option(help="Share of the picture's shorter side that is seen. Default: DeiT's 0.9.")
    ] = None,
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic", "lanczos"] | None, typer.Option(help="Of resizing. Default: bicubic.")
    ] = None,
    classes: ClassesOption = None,
    class_order: ClassOrderOption = "natural",
    exif: ExifOption = False,
    skip_unreadable: SkipUnreadable = False,
    input_key: InputKey = None,
    target_key: TargetKey = None,
    workers: Workers = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Make a run of a model that VTC-LFC's released code compressed.

    Every other command takes it. Without --dense it is fine-tuned on the labels alone, and timed against a dense model
    with random weights."""
    from lowpass.pipeline.run.import_released import import_released

    pixels = {
        "mean": numbers("--mean", mean),
        "std": numbers("--std", std),
        "crop_pct": crop_pct,
        "interpolation": interpolation,
    }
    given = {name: value for name, value in pixels.items() if value is not None}
    reading = {
        "classes": classes,
        "class_order": class_order,
        "exif": exif,
        "skip_unreadable": skip_unreadable,
        "input_key": input_key,
        "target_key": target_key,
        "workers": workers,
    }
    made = import_released(checkpoint, out, qk_scale, cutoff, dense, data, given, reading, check=not yes)
    answer(out, made, None, as_json)
