"""The `lowpass` command: parse, call, print. Heavy imports wait until a command runs, so that `--help` is quick."""

import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel
from rich.console import Console

from pipeline import __version__
from pipeline.errors import InputError, RunError
from pipeline.progress import console

if TYPE_CHECKING:
    from benchmarks.latency import Benchmark
    from pipeline.recipe import Recipe
    from pipeline.run import Metrics

app = typer.Typer(
    help="""Make a trained DeiT small, and fast where it is deployed (VTC-LFC, NeurIPS 2022).

    A first run, nothing downloaded: lowpass demo

    Your own model: lowpass compress --model deit_small_patch16_224 --weights deit_small.pth --data imagenet/
    --target-macs 0.46, then lowpass finetune, export, build and benchmark on the run directory it made.

    Progress and the log go to standard error, the answer to standard output. Exit codes: 0 done, 1 something failed,
    2 the input cannot be used.""",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)

PrecisionOption = Literal["fp32", "fp16", "bf16", "int8"]
Run = Annotated[Path, typer.Argument(metavar="DIR", help="Run directory, as made by `lowpass compress`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, alone, on standard output.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="'digits'; a folder with train/CLASS/... and val/CLASS/... (or CLASS/... alone); "
        "or a timm reader such as hfds/NAME. For a run: its own unless given."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything drawn at random.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Of fine-tuning; 40 for the digits, 150 otherwise.")]
Resume = Annotated[bool, typer.Option(help="Go on with an interrupted run; the outcome is the same.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lowpass {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory, new or empty.")] = Path("runs/demo"),
    target_macs: Annotated[float, typer.Option(help="Share of the dense MACs that stays.")] = 0.5,
    seed: Seed = 0,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Compress, fine-tune, export, build and time the embedded digits model: all of it, in minutes, on any machine."""
    from pipeline.recipe import make_recipe

    recipe = make_recipe(model="digits_deit", data="digits", target_macs=target_macs, seed=seed)
    _compress(recipe, out, resume, ship=True, epochs=None, as_json=as_json)


@app.command()
def compress(
    model: Annotated[str, typer.Option(help="timm name of the dense model, or digits_deit.")],
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
    from pipeline.recipe import make_recipe, make_shaping

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
    _compress(recipe, out or Path("runs") / model, resume, ship, epochs, as_json, memory_budget)


@app.command()
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
    from pipeline.run import finetune_run

    given = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "distill_weight": distill_weight}
    metrics = finetune_run(directory, data, {k: v for k, v in given.items() if v is not None}, seed)
    _answer(directory, metrics, None, as_json)


@app.command()
def evaluate(directory: Run, data: DataOption = None, as_json: AsJson = False) -> None:
    """Measure top-1 of the dense and the slim model on the test split."""
    from pipeline.run import evaluate_run

    _answer(directory, evaluate_run(directory, data), None, as_json)


@app.command()
def export(
    directory: Run,
    precision: Annotated[
        PrecisionOption,
        typer.Option(help="FP32 or INT8 for CPUs, BF16 for CPUs with AMX, FP16, BF16 or INT8 for TensorRT."),
    ] = "fp32",
    batch: Annotated[
        str, typer.Option(metavar="MIN:OPT:MAX", help="Batch sizes an engine will be built for; ONNX takes any.")
    ] = "1:8:32",
    selection: Annotated[
        Literal["gather", "onehot"],
        typer.Option(
            help="How token selection is lowered: TopK and a row gather, or comparisons and a one-hot MatMul."
        ),
    ] = "gather",
    input: Annotated[
        Literal["float32", "uint8"],
        typer.Option(help="float32: normalised images [B, C, H, W]; uint8: pixels [B, H, W, C], normalised inside."),
    ] = "float32",
    dense: Annotated[bool, typer.Option("--dense", help="Export the dense model, for comparison.")] = False,
    data: DataOption = None,
    as_json: AsJson = False,
) -> None:
    """Write DIR/model.<precision>.onnx, once it agrees with PyTorch on real images."""
    from export.batch import BatchProfile
    from export.options import ExportOptions
    from export.quantize import quantization_of
    from export.to_onnx import onnx_path
    from export.verify import export as export_verified
    from pipeline.run import verification_batches

    options = ExportOptions(precision=precision, profile=BatchProfile.parse(batch), selection=selection, input=input)
    batches, made = verification_batches(directory, data)
    done = export_verified(directory, options, batches, made, dense, quantization_of(directory, precision, data))
    _say(
        {"run": str(directory), "onnx": str(onnx_path(directory, precision, dense))} | done.model_dump(mode="json"),
        f"{onnx_path(directory, precision, dense)}: on {done.images} {'made' if made else 'real'} images the largest "
        f"logit difference from PyTorch is {done.largest_difference:.1e} (largest logit {done.largest_logit:.1f}), "
        f"top-1 agrees on {done.same_top1:.2f} %",
        as_json,
    )


@app.command()
def build(
    directory: Run,
    precision: Annotated[
        PrecisionOption, typer.Option(help="Of the exported ONNX file; TensorRT keeps to it.")
    ] = "fp16",
    runtime: Annotated[
        Literal["tensorrt", "tensorrt-rtx"] | None,
        typer.Option(help="[default: tensorrt where it is installed, else tensorrt-rtx]"),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Build the dense model, for comparison.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compile the exported model: DIR/model.<precision>.plan and its manifest. TensorRT-RTX needs no GPU for it."""
    from export.to_tensorrt import Manifest, manifest_path
    from export.to_tensorrt import build as build_engine

    plan = build_engine(directory, precision, runtime, dense)
    manifest = Manifest.model_validate_json(manifest_path(plan).read_bytes())
    _say(
        {"run": str(directory), "plan": str(plan), "manifest": manifest.model_dump(mode="json")},
        f"{plan}: {manifest.runtime} {manifest.version}, {precision}, batch {manifest.profile}, {manifest.gpu}",
        as_json,
    )


@app.command()
def benchmark(
    directory: Run,
    against: Annotated[str, typer.Option(help="What to compare with, separated by commas; so far: dense.")] = "dense",
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Runtimes, separated by commas. [default: all but pytorch-compile; missing ones are reported]"
        ),
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,32",
    precision: Annotated[
        PrecisionOption | None,
        typer.Option(help="[default: fp16 on a GPU; fp32 on a CPU, in OpenVINO bf16 where it has AMX]"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.05, help="About how long to time each model at each batch.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Time slim against dense in interleaved rounds, on every runtime of this machine."""
    from benchmarks.latency import benchmark as measure
    from benchmarks.latency import parse_batches, parse_runtimes, refuse_other_rivals
    from pipeline.run import Metrics

    refuse_other_rivals(against)
    metrics = Metrics.load(directory)
    measured = measure(directory, parse_runtimes(runtime), parse_batches(batches), precision, seconds)
    _answer(directory, metrics, measured, as_json)


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="timm name of the dense model, or digits_deit.")],
    runtime: Annotated[str, typer.Option(help="Where to measure, such as onnxruntime, openvino or tensorrt.")],
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 1,
    precision: Annotated[PrecisionOption | None, typer.Option(help="[default: the runtime's own]")] = None,
    token_score: Annotated[
        Literal["full", "cls"], typer.Option(help="How blocks that drop tokens score them, see `compress`.")
    ] = "cls",
    as_json: AsJson = False,
) -> None:
    """Measure what the parts of a model's blocks take on this machine: what `compress --target-latency` plans by.

    The table is kept, and measured anew when the model, the runtime's version or the machine changes."""
    from benchmarks.profile import as_markdown, latency_table
    from pipeline.dense import load_dense
    from pipeline.slim import SlimViT

    dense = load_dense(model, random_weights=model != "digits_deit")  # a latency does not hang on weights
    architecture = SlimViT.from_timm(dense, token_score=token_score).architecture
    table = latency_table(architecture, *_place(runtime, precision), batch)
    _say(table.model_dump(mode="json"), as_markdown(table), as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do: CPU and GPU, runtimes and their versions, TensorRT, Triton."""
    from benchmarks.machine import as_text, describe

    machine = describe()
    _say(machine.model_dump(mode="json"), as_text(machine), as_json)


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
    from pipeline.run import compress as run_compress
    from pipeline.run import finetune_run

    goal_of = None
    if recipe.target_latency is not None:
        from functools import partial

        from benchmarks.profile import latency_goal

        runtime, precision = _place(recipe.runtime, recipe.latency_precision)
        goal_of = partial(
            latency_goal,
            target_ms=recipe.target_latency,
            runtime=runtime,
            precision=precision,
            batch=recipe.latency_batch,
        )
    metrics = run_compress(recipe, out, resume, goal_of, memory_budget)
    measured = None
    if ship:
        if recipe.data is not None and not metrics.finetuned_epochs:
            metrics = finetune_run(out, None, {} if epochs is None else {"epochs": epochs}, None)
        _export_and_build(out)
        from benchmarks.latency import benchmark as measure

        measured = measure(out)
    _answer(out, metrics, measured, as_json)


def _place(runtime: str | None, precision: str | None) -> tuple[Any, Any]:
    """A runtime by name, and a precision it computes in: the one asked for, or its own."""
    from benchmarks.latency import parse_runtimes
    from export.runtimes import check_precision, default_precision, missing

    name = parse_runtimes(runtime)[0]
    if reason := missing(name):
        raise InputError(f"cannot measure latencies on {name}: {reason}")
    chosen: Any = precision or default_precision(name)
    check_precision(name, chosen)
    return name, chosen


def _export_and_build(out: Path) -> None:
    """Both models in every precision, verified, and the engine where TensorRT is installed."""
    from export.options import PRECISIONS, ExportOptions
    from export.quantize import quantization_of
    from export.to_tensorrt import build as build_engine
    from export.to_tensorrt import installed_flavours
    from export.verify import export as export_verified
    from pipeline.run import verification_batches

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


def _answer(directory: Path, metrics: "Metrics", measured: "Benchmark | None", as_json: bool) -> None:
    """The result as JSON or as a table."""
    from benchmarks.summary import as_table, summarise

    result = summarise(directory, metrics, measured)
    _say(result.model_dump(mode="json"), as_table(result), as_json)
    if not as_json:
        print(f"run directory: {directory}")


def _say(value: dict[str, Any] | BaseModel, text: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(value))
    else:
        Console(highlight=False, markup=False).print(text, soft_wrap=isinstance(text, str))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 bad input, 1 failure, 130 interrupted."""
    try:
        app(arguments)
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(_why(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; --resume goes on with a search", 130)


def _why(error: OSError) -> str:
    """An operating system's refusal with the file and the remedy."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write {what}; what was written before is whole: make room, then go on (a search: with --resume)"
    return what


def _fail(message: str, code: int) -> None:
    print(f"lowpass: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
