"""From a checkpoint that the authors' code compressed to a run directory: `import-vtc`."""

from pathlib import Path
from typing import Annotated

import typer

from lowpass.commands.common import AsJson, DataOption, answer


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
    as_json: AsJson = False,
) -> None:
    """Make a run of a model that VTC-LFC's released code compressed.

    Every other command takes it. Without --dense it is fine-tuned on the labels alone, and timed against a dense model
    with random weights."""
    from lowpass.pipeline.run.import_released import import_released

    answer(out, import_released(checkpoint, out, qk_scale, cutoff, dense, data), None, as_json)
