"""`forecast`: what a GPU that is not here would take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowpass.commands.common import AsJson, numbers, say
from lowpass.pipeline.base.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from lowpass.export.forecast.forecast import Forecast, Model


def forecast(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A run: its dense and its slim model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Instead of a run: a dense model that timm has by name.")] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="Of --model; its own unless given.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="t4, l4, a10, a10g, a100, h100, rtx3090, rtx4090, rtx5090 or orin.")
    ] = None,
    gpu_spec: Annotated[
        str | None,
        typer.Option(
            metavar="tflops=T,gbs=B[,kernel_us=K]",
            help="Instead of --gpu. T: dense FP16 of the tensor cores with FP32 accumulation. B: gigabytes a second. "
            "K: microseconds that each kernel costs.",
        ),
    ] = None,
    engine: Annotated[
        Literal["tensorrt", "pytorch-compiled", "pytorch-eager"], typer.Option(help="What runs it.")
    ] = "tensorrt",
    precision: Annotated[str, typer.Option(help="fp16, bf16, int8-fp16 (or int8) or fp8.")] = "fp16",
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between them.")] = "1,8,32",
    blocks: Annotated[bool, typer.Option("--blocks", help="Block by block, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a model would take on a GPU that is not here, and how wrong that may be.

    A forecast, not a measurement: rates are fitted to published latencies of dense ViTs. For a run whose engine was
    built by TensorRT-RTX its own kernels are taken."""
    from lowpass.export.forecast.forecast import Target
    from lowpass.export.forecast.gpus import find_gpu
    from lowpass.export.forecast.of_run import forecast_name, forecast_run

    sizes = numbers("--batch", batch) or ()
    if not sizes or any(size < 1 or size != int(size) for size in sizes):
        raise InputError(f"--batch takes whole numbers above 0 with commas between them, such as 1,8,32; not {batch!r}")
    target = Target(find_gpu(gpu, gpu_spec), engine, precision, [int(size) for size in sizes])
    if engine != "tensorrt" and precision not in ("fp16", "bf16"):
        raise InputError(f"{engine} runs fp16 or bf16, not {precision}; 8 bits are for --engine tensorrt")
    if (directory is None) == (model is None):
        raise InputError("give a run directory, or the name of a dense model with --model")
    if directory is not None and img_size is not None:
        raise InputError("--img-size is for --model; a run has its own")
    if model is not None:
        found = forecast_name(model, img_size, target)
    else:
        assert directory is not None
        found = forecast_run(directory, target)
    say(found, _as_text(found, blocks), as_json)


def _as_text(found: "Forecast", blocks: bool) -> object:
    from rich.console import Group

    error = next(iter(found.held_out.items()))
    lines = [
        f"forecast, not measured: {found.gpu} ({found.gpu_source}), {found.engine}, {found.precision}",
        f"error of such forecasts on published latencies left out, {error[0]}: median {100 * error[1].median:.0f}%, "
        f"nine in ten below {100 * error[1].nine_in_ten:.0f}% ({error[1].rows} rows)",
        *(f"note: {note}" for note in found.notes),
    ]
    models = [model for model in (found.model, found.dense, found.slim) if model is not None]
    lines += [f"kernels of {model.name} from {model.kernels_from}" for model in models]
    if found.dense is not None:
        lines.append("dense is as timm exports it")
    for batch, gained in found.speedup.items():
        lines.append(f"batch {batch}: {gained:.2f}x the speed of dense, efficiency {found.efficiency[batch]:.2f}")
    parts: list[object] = ["\n".join(lines), _batches(models)]
    if blocks:
        parts += [_of_blocks(model) for model in models]
    return Group(*parts)  # type: ignore[arg-type]


def _batches(models: "list[Model]") -> "Table":
    from rich.table import Table

    columns = ("batch", "model", "ms", "low", "high", "images/s", "bound by", "kernels")
    table = Table(*columns, title="forecast, milliseconds a batch")
    for batch in models[0].batches:
        for model in models:
            at = model.batches[batch]
            times = (f"{ms:.2f}" for ms in (at.ms, at.low_ms, at.high_ms))
            table.add_row(str(batch), model.name, *times, f"{at.images_per_s:.0f}", at.bound_by, str(at.kernels))
        table.add_section()
    return table


def _of_blocks(model: "Model") -> "Table":
    from rich.table import Table

    sizes = list(model.batches)
    table = Table("block", *(f"ms, batch {size}" for size in sizes), "kernels", title=f"{model.name} (forecast)")
    for place, share in enumerate(model.batches[sizes[0]].blocks):
        name = "ends" if share.block is None else str(share.block)
        table.add_row(name, *(f"{model.batches[size].blocks[place].ms:.3f}" for size in sizes), str(share.kernels))
    return table
