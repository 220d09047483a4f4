"""From a dense model to a slim one: `demo`, `compress`, `finetune`, `evaluate`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowpass.commands.common import AsJson, DataOption, Epochs, PrecisionOption, Resume, Run, Seed, answer, say
from lowpass.commands.ship import place
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import console

if TYPE_CHECKING:
    from lowpass.pipeline.run.recipe import Recipe

# What `compress --recipe` takes beside the file.
BESIDE_RECIPE = (
    "recipe_file", "weights", "data", "out", "resume", "ship", "dry_run", "epochs", "memory_budget", "as_json",
)  # fmt: skip


def demo(
    out: Annotated[Path, typer.Option(help="Run directory, new or empty.")] = Path("runs/demo"),
    target_macs: Annotated[float, typer.Option(help="Share of the dense MACs that stays.")] = 0.5,
    seed: Seed = 0,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Compress, fine-tune, export, build and time the embedded digits model: all of it, in minutes, on any machine."""
    from lowpass.pipeline.run.recipe import make_recipe

    recipe = make_recipe(model="digits_deit", data="digits", target_macs=target_macs, seed=seed)
    _compress(recipe, out, resume, ship=True, epochs=None, as_json=as_json)


def compress(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="timm name of the dense model, or digits_deit.")] = None,
    recipe_file: Annotated[
        Path | None,
        typer.Option(
            "--recipe", metavar="FILE", help="Everything below but --weights and --data from a file, see recipes/."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Its checkpoint: .safetensors or .pth, timm's or DeiT's own keys.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Untrained, to study speed; needs --architecture.")
    ] = False,
    data: DataOption = None,
    target_macs: Annotated[float | None, typer.Option(help="Share of the dense MACs that stays, such as 0.46.")] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(metavar="MS", help="Milliseconds of one batch on --runtime of this machine (see `profile`)."),
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="Of --target-latency, such as onnxruntime, openvino or tensorrt.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in the batch of --target-latency.")] = 1,
    precision: Annotated[
        PrecisionOption | None, typer.Option(help="Of --target-latency. [default: the runtime's own]")
    ] = None,
    allowable_drop: Annotated[
        float | None,
        typer.Option(help="Points of top-1 the search may cost before fine-tuning (the paper's way: 9.5)."),
    ] = None,
    architecture: Annotated[
        Path | None,
        typer.Option(help="Skip the search: apply this architecture.json, its channels chosen by LFS."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory, new or empty. [default: runs/MODEL]")] = None,
    resume: Resume = False,
    ship: Annotated[
        bool, typer.Option("--ship", help="Then fine-tune, export, verify, build and benchmark, too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every input and say what it would cost; nothing is written.")
    ] = False,
    epochs: Epochs = None,
    seed: Seed = 0,
    tune_for: Annotated[
        Literal["onnxruntime", "openvino", "tensorrt"],
        typer.Option(help="The runtime whose liking the next four options default to."),
    ] = "tensorrt",
    align: Annotated[int | None, typer.Option(help="Hidden widths are multiples of it (tokens: of an eighth).")] = None,
    whole_heads: Annotated[
        bool | None,
        typer.Option("--whole-heads/--thin-heads", help="Drop heads whole, or thin them as the paper does."),
    ] = None,
    token_stages: Annotated[
        int | None, typer.Option(help="How many blocks may drop tokens, evenly spread; 0: every block.")
    ] = None,
    token_score: Annotated[
        Literal["full", "cls"] | None,
        typer.Option(help="What LFE is multiplied by: the paper's attention score, or its CLS row, which fuses."),
    ] = None,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="The paper's own shapes: for comparison; slow to deploy.")
    ] = False,
    image_cutoff: Annotated[float, typer.Option(help="Low-pass of the images LFS sees, in cycles per pixel.")] = 0.1,
    token_cutoff: Annotated[float, typer.Option(help="Low-pass along the tokens for LFE.")] = 0.85,
    energy_norm: Annotated[
        Literal["l2", "l1"], typer.Option(help="LFE norm: l2 is the paper's, l1 the released code's.")
    ] = "l2",
    channel_criterion: Annotated[
        Literal["lfs", "taylor", "magnitude", "random"],
        typer.Option(help="What channels are scored by: LFS, the method, or a rival to compare it with."),
    ] = "lfs",
    token_criterion: Annotated[
        Literal["lfe-attention", "attention", "lfe", "random"],
        typer.Option(help="What tokens are scored by: LFE times attention, the method, or a rival."),
    ] = "lfe-attention",
    order: Annotated[
        Literal["bottom-up", "top-down", "one-shot"],
        typer.Option(help="On which model a block's channels are scored: all below it cut, all above it, or none."),
    ] = "bottom-up",
    prune: Annotated[
        Literal["both", "channels", "tokens"], typer.Option(help="Drop channels and tokens, or one of them.")
    ] = "both",
    lfs_weight: Annotated[float, typer.Option(help="Share of the cross-entropy in LFS.")] = 0.1,
    token_share: Annotated[float, typer.Option(help="Share of a block's allowance that tokens may spend.")] = 0.56,
    score_images: Annotated[int, typer.Option(help="Training images for LFS.")] = 2000,
    measure_images: Annotated[int, typer.Option(help="Training images on which a step's top-1 is measured.")] = 5000,
    batch_size: Annotated[int, typer.Option(help="Images at a time in the search.")] = 64,
    recovery: Annotated[
        bool, typer.Option(help="Refit what reads removed channels, in closed form, as part of every trial.")
    ] = True,
    mixed_precision: Annotated[
        bool, typer.Option("--mixed-precision", help="Trials in FP16 on a GPU (BF16 on a CPU); LFS stays FP32.")
    ] = False,
    memory_budget: Annotated[
        float,
        typer.Option(metavar="GIB", help="For the search's activations; past it they are files in the run directory."),
    ] = 8.0,
    as_json: AsJson = False,
) -> None:
    """Search a slim model (or apply a given table), and save it in a run directory."""
    from lowpass.pipeline.run.recipe import make_recipe, read_recipe
    from lowpass.pipeline.search.shaping import make_shaping

    if recipe_file is not None:
        _refuse_beside_recipe(context)
        recipe = read_recipe(recipe_file, weights=weights, data=data)
        _start(recipe, out, resume, ship, epochs, as_json, memory_budget, dry_run)
        return
    if model is None:
        raise InputError("give --model NAME, or --recipe FILE")
    shaping = make_shaping(
        tune_for,
        as_published,
        align=align,
        whole_heads=whole_heads,
        token_stages=token_stages,
        token_score=token_score,
    )
    recipe = make_recipe(
        model=model,
        weights=weights,
        random_weights=random_weights,
        data=data,
        target_macs=target_macs,
        allowable_drop=allowable_drop,
        architecture=architecture,
        image_cutoff=image_cutoff,
        token_cutoff=token_cutoff,
        energy_norm=energy_norm,
        channel_criterion=channel_criterion,
        token_criterion=token_criterion,
        order=order,
        prune=prune,
        lfs_weight=lfs_weight,
        token_share=token_share,
        shaping=shaping,
        score_images=score_images,
        measure_images=measure_images,
        batch_size=batch_size,
        recovery=recovery,
        mixed_precision=mixed_precision,
        seed=seed,
        target_latency=target_latency,
        runtime=runtime,
        latency_batch=batch,
        latency_precision=precision,
    )
    _start(recipe, out, resume, ship, epochs, as_json, memory_budget, dry_run)


def finetune(
    directory: Run,
    data: DataOption = None,
    epochs: Epochs = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at 512 images a step; scaled linearly.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step (on each device).")] = None,
    distill_weight: Annotated[float | None, typer.Option(help="Share of the dense model's label in the loss.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The run's own unless given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train the slim model with the dense one as its teacher; the result takes its place in the run."""
    from lowpass.pipeline.run.finetune import finetune_run

    given = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "distill_weight": distill_weight}
    metrics = finetune_run(directory, data, {k: v for k, v in given.items() if v is not None}, seed)
    answer(directory, metrics, None, as_json)


def evaluate(directory: Run, data: DataOption = None, as_json: AsJson = False) -> None:
    """Measure top-1 of the dense and the slim model on the test split."""
    from lowpass.pipeline.run.evaluate import evaluate_run

    answer(directory, evaluate_run(directory, data), None, as_json)


def _refuse_beside_recipe(context: typer.Context) -> None:
    """Refuse what a recipe file settles, given as an option, too."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in BESIDE_RECIPE:
            raise InputError(f"--recipe settles {parameter.opts[0]}: leave it out, or change the file")


def _start(
    recipe: "Recipe",
    out: Path | None,
    resume: bool,
    ship: bool,
    epochs: int | None,
    as_json: bool,
    memory_budget: float,
    dry_run: bool,
) -> None:
    """Compress, or say what that would take."""
    out = out or Path("runs") / recipe.model
    if not dry_run:
        _compress(recipe, out, resume, ship, epochs, as_json, memory_budget)
        return
    from lowpass.pipeline.run.dry_run import dry_run as estimate_run
    from lowpass.pipeline.run.estimate import as_table

    if recipe.target_latency is not None:
        place(recipe.runtime, recipe.latency_precision)  # refuses a runtime that is not here
    forecast = estimate_run(recipe, out, resume, epochs)
    say(forecast.model_dump(mode="json"), as_table(forecast), as_json)


def _compress(
    recipe: "Recipe",
    out: Path,
    resume: bool,
    ship: bool,
    epochs: int | None,
    as_json: bool,
    memory_budget: float = 8.0,
) -> None:
    """Compress; with `ship` take the result all the way to timed engines."""
    from lowpass.pipeline.run.compress import compress as run_compress
    from lowpass.pipeline.run.finetune import finetune_run

    cost_target_of = None
    if recipe.target_latency is not None:
        from lowpass.benchmarks.latency.target import latency_goal

        runtime, precision = place(recipe.runtime, recipe.latency_precision)
        cost_target_of = partial(
            latency_goal,
            target_ms=recipe.target_latency,
            runtime=runtime,
            precision=precision,
            batch=recipe.latency_batch,
        )
    metrics = run_compress(recipe, out, resume, cost_target_of, memory_budget)
    measured = None
    if ship:
        if recipe.data is not None and not metrics.finetuned_epochs:
            metrics = finetune_run(out, None, {} if epochs is None else {"epochs": epochs}, None)
        _export_and_build(out)
        from lowpass.benchmarks.latency.compare import benchmark as measure

        measured = measure(out)
    answer(out, metrics, measured, as_json)


def _export_and_build(out: Path) -> None:
    """Both models in every precision, verified, and the engine where TensorRT is installed."""
    from lowpass.export.onnx.quantize import quantization_of
    from lowpass.export.onnx.verify import export as export_verified
    from lowpass.export.options import PRECISIONS, ExportOptions
    from lowpass.export.tensorrt.build import build as build_engine
    from lowpass.export.tensorrt.build import installed_flavours
    from lowpass.pipeline.run.images import verification_batches

    batches, made = verification_batches(out, None)
    for precision in PRECISIONS:
        calibration = quantization_of(out, precision)
        for dense in (True, False):
            done = export_verified(out, ExportOptions(precision=precision), batches, made, dense, calibration)
            console.print(
                f"exported {done.file}: top-1 agrees with PyTorch on {done.same_top1:.2f} % of {done.images} images, "
                f"largest logit difference {done.largest_difference:.1e}",
                soft_wrap=True,
            )
    if installed_flavours():
        console.print(f"built {build_engine(out)}", soft_wrap=True)
    else:
        console.print("no engine: no TensorRT is installed (pip install 'lowpass-vit[tensorrt-rtx]')")
