"""A run's slim model, trained further and measured: `finetune` and `evaluate`."""

from typing import Annotated

import typer

from lowpass.commands.common import AsJson, DataOption, Epochs, RunDirectory, answer


def finetune(
    directory: RunDirectory,
    data: DataOption = None,
    epochs: Epochs = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at 512 images a step; scaled linearly.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step (on each device).")] = None,
    distill_weight: Annotated[float | None, typer.Option(help="Share of the dense model's label in the loss.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The run's own unless given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train the slim model with the dense one as its teacher.

    The result takes its place in the run."""
    from lowpass.api import Run

    given = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "distill_weight": distill_weight}
    metrics = Run(directory).finetune(data, seed=seed, **{k: v for k, v in given.items() if v is not None})
    answer(directory, metrics, None, as_json)


def evaluate(directory: RunDirectory, data: DataOption = None, as_json: AsJson = False) -> None:
    """Measure top-1 of the dense and the slim model on the test split."""
    from lowpass.api import Run

    answer(directory, Run(directory).evaluate(data), None, as_json)
