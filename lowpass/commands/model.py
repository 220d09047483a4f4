"""A run's slim model, trained further and measured: `finetune` and `evaluate`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lowpass.commands.common import (
    AsJson,
    DataOption,
    Epochs,
    MixedPrecisionOption,
    PrecisionOption,
    RunDirectory,
    Yes,
    answer,
    say,
)
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.launched import is_first


def finetune(
    directory: RunDirectory,
    data: DataOption = None,
    epochs: Epochs = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at 512 images a step; scaled linearly.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time (in each process).")] = None,
    effective_batch: Annotated[
        int | None, typer.Option(min=1, help="Images a step learns from; gradients of several batches are summed.")
    ] = None,
    distill_weight: Annotated[float | None, typer.Option(help="Share of the teacher's label in the loss.")] = None,
    token_distillation: Annotated[
        float | None,
        typer.Option(
            metavar="WEIGHT", help="Weight of the last tokens' distance from the dense model's. Default: 0, off."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Another teacher than the dense model: any model of timm's of the same classes."
        ),
    ] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Checkpoint of --teacher.")] = None,
    mixup: Annotated[float | None, typer.Option(help="timm's mixup alpha; DeiT has 0.8.")] = None,
    cutmix: Annotated[float | None, typer.Option(help="timm's cutmix alpha; DeiT has 1.0.")] = None,
    smoothing: Annotated[float | None, typer.Option(help="Label smoothing; DeiT has 0.1.")] = None,
    drop_path: Annotated[float | None, typer.Option(help="Stochastic depth; DeiT has 0.1.")] = None,
    keep_best: Annotated[
        int | None,
        typer.Option(min=1, help="Measure held-in top-1 every so many epochs, and keep the best. Default: the last."),
    ] = None,
    mixed_precision: Annotated[
        MixedPrecisionOption | None, typer.Option(help="Default: bf16 on a GPU that has it, otherwise no.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The run's own unless given.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted training, if it has not ended.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin from the searched weights, whatever was trained since.")
    ] = False,
    save_minutes: Annotated[
        float, typer.Option(min=0, help="Save the state so often within an epoch; after each it is saved anyway.")
    ] = 10.0,
    track: Annotated[
        Literal["tensorboard", "wandb", "mlflow"] | None,
        typer.Option(help="Show each epoch there, too; tensorboard writes to DIR/tracking."),
    ] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Train the slim model with the dense one as its teacher.

    The result takes its place in the run; the searched weights stay in pruned.safetensors, and training.csv has a row
    an epoch. Several processes: `accelerate launch -m lowpass finetune DIR` or `torchrun -m lowpass finetune DIR`."""
    from lowpass.api import Run

    given = {
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "effective_batch": effective_batch,
        "distill_weight": distill_weight,
        "token_distillation": token_distillation,
        "mixup": mixup,
        "cutmix": cutmix,
        "smoothing": smoothing,
        "teacher": teacher,
        "teacher_weights": teacher_weights,
        "drop_path": drop_path,
        "keep_best": keep_best,
        "mixed_precision": mixed_precision,
    }
    metrics = Run(directory).finetune(
        data,
        seed=seed,
        resume=resume,
        restart=restart,
        save_minutes=save_minutes,
        track=track,
        yes=yes,
        **{name: value for name, value in given.items() if value is not None},
    )
    if is_first():
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
    if runtime is None and precision is not None:
        raise InputError("--precision is of an exported file; name the --runtime it is to run in")
    metrics = Run(directory).evaluate(data) if runtime is None else None
    if not is_first():
        return  # several processes have shared the images so far
    if metrics is not None:
        result = summarise(directory, metrics, None)
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
