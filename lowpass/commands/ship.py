"""From a slim model to a timed engine: `export`, `build`, `benchmark`, `profile`, `doctor`."""

from typing import Annotated, Literal

import typer

from lowpass.commands.common import AsJson, DataOption, PrecisionOption, RunDirectory, answer, say


def export(
    directory: RunDirectory,
    format: Annotated[
        Literal["onnx", "optimum", "torch-export"],
        typer.Option(
            help="optimum: ONNX, and a folder that Hugging Face's Optimum opens. torch-export: a .pt2 in FP32 that "
            "plain PyTorch loads; the other options are for ONNX."
        ),
    ] = "onnx",
    precision: Annotated[
        PrecisionOption,
        typer.Option(help="fp32 or int8 for CPUs, bf16 for CPUs with AMX; fp16, bf16, int8-fp16 or fp8 for TensorRT."),
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
    opset: Annotated[
        int,
        typer.Option(
            metavar="17..23", help="Of ONNX. Older runtimes read older ones; below 23 attention is written out."
        ),
    ] = 23,
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER",
            help="A layer of an FP16 file that stays FP32, such as blocks.3.mlp.fc1; repeatable. Where few layers "
            "overflow, they do so unasked.",
        ),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Export the dense model, for comparison.")] = False,
    data: DataOption = None,
    as_json: AsJson = False,
) -> None:
    """Write DIR/model.<precision>.onnx, or DIR/model.fp32.pt2, verified on real images.

    With --format optimum also the folder DIR/model.<precision>.optimum."""
    from lowpass.export.artefacts import export_run, exported_path
    from lowpass.export.options import export_options

    options = export_options(precision, batch, selection, input, opset, keep_fp32 or (), format)
    done = export_run(directory, options, data, dense)
    path = exported_path(directory, options, dense)
    told: dict[str, object] = {{"torch-export": "program"}.get(format, format): str(path)}
    if format != "torch-export":
        told["opset"] = opset
    what = f"opset {opset}" if format != "torch-export" else "torch.export"
    kept = f"; in FP32: {', '.join(done.kept_fp32)}" if done.kept_fp32 else ""
    kind = "made" if done.made_images else "real"
    say(
        {"run": str(directory)} | told | done.model_dump(mode="json"),
        f"{path}: {what}, on {done.images} {kind} images the largest "
        f"logit difference from PyTorch is {done.largest_difference:.1e} (largest logit {done.largest_logit:.1f}), "
        f"top-1 agrees on {done.same_top1:.2f} %{kept}",
        as_json,
    )


def build(
    directory: RunDirectory,
    precision: Annotated[
        PrecisionOption, typer.Option(help="Of the exported ONNX file; TensorRT keeps to it.")
    ] = "fp16",
    runtime: Annotated[
        Literal["tensorrt", "tensorrt-rtx"] | None,
        typer.Option(help="[default: tensorrt where it is installed, else tensorrt-rtx]"),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Build the dense model, for comparison.")] = False,
    compute_capability: Annotated[
        Literal["75", "80", "86", "89", "120"] | None,
        typer.Option(
            help="Build for such GPUs alone (tensorrt-rtx): 75 Turing (T4), 80 A100, 86 A10 and RTX 30, 89 Ada (L4, "
            "L40S, RTX 40), 120 Blackwell. Default: 80 and newer in one engine, not 75."
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every kernel at the smallest batch.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compile the exported model with TensorRT.

    DIR/model.<precision>.plan, its manifest, and model.<precision>.layers.json, which names every kernel.
    TensorRT-RTX needs no GPU for it."""
    from lowpass.export.tensorrt.layers import table
    from lowpass.export.tensorrt.plan import Manifest, load_layers, manifest_path, trtexec
    from lowpass.export.tensorrt.plan import build as build_engine

    plan = build_engine(directory, precision, runtime, dense, compute_capability)
    manifest = Manifest.model_validate_json(manifest_path(plan).read_bytes())
    layers = load_layers(plan)
    counted = ", ".join(f"{at.whole.kernels} at {at.batch}" for at in layers)
    lines = [
        f"{plan}: {manifest.runtime} {manifest.version}, {precision}, batch {manifest.profile}, {manifest.gpu}"
        + (f", compute capability {compute_capability} alone" if compute_capability else ""),
        f"kernels by batch: {counted or 'not named by ' + manifest.runtime}",
    ]
    command = trtexec(directory, manifest)
    lines.append(f"with TensorRT's own tool: {command}")
    if explain and layers:
        lines.append(table(next(at for at in layers if at.batch == str(manifest.profile.least))))
    kernels = {at.batch: at.whole.model_dump(mode="json", exclude={"block"}) for at in layers}
    built = {"run": str(directory), "plan": str(plan), "manifest": manifest.model_dump(mode="json"), "layers": kernels}
    say(built | {"trtexec": command}, "\n".join(lines), as_json)


def benchmark(
    directory: RunDirectory,
    against: Annotated[str, typer.Option(help="What to compare with, separated by commas; so far: dense.")] = "dense",
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Runtimes, separated by commas. Default: all but pytorch-compile; missing ones are reported."
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
    """Time slim against dense on every runtime that is here.

    In interleaved rounds, so that both meet the same machine."""
    from lowpass.benchmarks.latency.compare import benchmark as measure
    from lowpass.benchmarks.latency.compare import refuse_other_rivals
    from lowpass.export.batch import parse_batches
    from lowpass.export.runtimes.registry import parse_runtimes
    from lowpass.pipeline.run.metrics import Metrics

    refuse_other_rivals(against)
    metrics = Metrics.load(directory)
    measured = measure(directory, parse_runtimes(runtime), parse_batches(batches), precision, seconds)
    answer(directory, metrics, measured, as_json)


def profile(
    model: Annotated[str, typer.Option(help="timm name of the dense model, or digits_deit.")],
    runtime: Annotated[
        str,
        typer.Option(
            help="Where to measure, such as onnxruntime, openvino or tensorrt; or forecast:GPU[:PRECISION[:ENGINE]]."
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 1,
    precision: Annotated[PrecisionOption | None, typer.Option(help="[default: the runtime's own]")] = None,
    token_score: Annotated[
        Literal["full", "cls"], typer.Option(help="How blocks that drop tokens score them, see `compress`.")
    ] = "cls",
    as_json: AsJson = False,
) -> None:
    """Measure what `compress --target-latency` plans by.

    What the parts of a model's blocks take on this machine.
    The table is kept, and measured anew when the model, the runtime's version or the machine changes. With
    forecast:a100 it is what a GPU would take that is not here, see `forecast`."""
    from lowpass.benchmarks.latency.forecast_table import forecast_table
    from lowpass.benchmarks.latency.parts import as_markdown
    from lowpass.benchmarks.latency.target import checked_runtime, latency_table
    from lowpass.export.forecast.target import is_forecast, parse_target
    from lowpass.pipeline.checkpoints.load import load_model
    from lowpass.pipeline.model.slim_vit import SlimViT

    dense = load_model(model, random_weights=model != "digits_deit")  # a latency does not hang on weights
    architecture = SlimViT.from_timm(dense, token_score=token_score).architecture
    if is_forecast(runtime):
        table = forecast_table(architecture, parse_target(runtime, precision, batch), runtime)
    else:
        table = latency_table(architecture, *checked_runtime(runtime, precision), batch)
    say(table.model_dump(mode="json"), as_markdown(table), as_json)


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do.

    CPU and GPU, runtimes and their versions, TensorRT, Triton, and what is wrong with ONNX Runtime's packages."""
    from lowpass.benchmarks.latency.machine import as_text, describe
    from lowpass.export.runtimes.onnx_packages import onnxruntime_problems

    machine, problems = describe(), onnxruntime_problems()
    text = "\n".join([as_text(machine), *(f"problem: {problem}" for problem in problems)])
    say(machine.model_dump(mode="json") | {"problems": problems}, text, as_json)
