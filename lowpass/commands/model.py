"""A run's slim model, trained further and measured: `finetune` and `evaluate`."""

from typing import Annotated, Any

import typer

from lowpass.commands.common import AsJson, DataOption, Epochs, PrecisionOption, RunDirectory, answer, say
from lowpass.pipeline.base.errors import InputError


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


def evaluate(
    directory: RunDirectory,
    data: DataOption = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="Measure the exported slim model in this runtime instead, such as onnxruntime or openvino."),
    ] = None,
    precision: Annotated[PrecisionOption | None, typer.Option(help="Of the exported file; with --runtime.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure top-1 of the dense and the slim model on the test split.

    Engines that can run here are measured, too."""
    from lowpass.api import Run
    from lowpass.benchmarks.latency.summary import as_table, summarise
    from lowpass.export.evaluate import evaluate_deployed, runnable_engines
    from lowpass.export.runtimes.registry import parse_runtimes

    found: dict[str, Any] = {"run": str(directory)}
    if runtime is None:
        if precision is not None:
            raise InputError("--precision is of an exported file; name the --runtime it is to run in")
        result = summarise(directory, Run(directory).evaluate(data), None)
        found |= result.model_dump(mode="json")
        measured = [evaluate_deployed(directory, *engine, data) for engine in runnable_engines(directory)]
    else:
        result = None
        measured = [evaluate_deployed(directory, name, precision, data) for name in parse_runtimes(runtime)]
    if as_json:
        say(found | {"deployed": [one.model_dump(mode="json") for one in measured]}, "", as_json)
        return
    if result is not None:
        say(result, as_table(result), as_json)
    for one in measured:
        print(f"{one.runtime} {one.precision}: top-1 {one.top1:.2f} % of {one.images} images")
    print(f"run directory: {directory}")
