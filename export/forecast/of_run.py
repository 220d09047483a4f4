"""Forecasts of a run's dense and slim model, by the kernels of their engine where one was built."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from lowpass.export.batch import BatchProfile
from lowpass.export.forecast.calibration import calibration
from lowpass.export.forecast.forecast import Forecast, Target, forecast_of, held_out, notes
from lowpass.export.forecast.work import TILE, Kernel, work_of, work_of_name
from lowpass.export.options import Precision
from lowpass.export.runtimes.engine import installed_flavours
from lowpass.export.tensorrt.layers import Kernel as BuiltKernel
from lowpass.export.tensorrt.layers import Layers
from lowpass.export.tensorrt.plan import current_plan, layers_path, load_layers
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.slim_vit import SlimViT


def forecast_run(directory: Path, target: Target) -> Forecast:
    """Dense against slim.

    Raises:
        InputError: there is no run, or the GPU does not compute in the precision.
    """
    slim = SlimViT.load(directory).architecture
    whole = slim.model_copy(update={"blocks": slim.dense.blocks()})
    plan = _built_plan(directory, target)
    known = {} if plan is None else built(plan, target.batches)
    dense_model = forecast_of(slim.dense.name, work_of(whole, as_timm_exports=True), target)
    slim_model = forecast_of("slim", work_of(slim), target, known, "" if plan is None else layers_path(plan).name)
    saved = dense_model.macs / slim_model.macs
    speedup = {batch: dense_model.batches[batch].ms / slim_model.batches[batch].ms for batch in target.batches}
    return _about(target).model_copy(
        update={
            "run": str(directory),
            "dense": dense_model,
            "slim": slim_model,
            "speedup": speedup,
            "efficiency": {batch: gained / saved for batch, gained in speedup.items()},
        }
    )


def forecast_name(name: str, img_size: int | None, target: Target) -> Forecast:
    """A dense model that timm has by name.

    Raises:
        InputError: timm has none, or the GPU does not compute in the precision.
    """
    return _about(target).model_copy(update={"model": forecast_of(name, work_of_name(name, img_size), target)})


def _about(target: Target) -> Forecast:
    return Forecast(
        gpu=target.gpu.name,
        gpu_source=target.gpu.source,
        engine=target.engine,
        precision=target.precision,
        held_out=held_out(calibration(), target),
        notes=notes(target),
    )


def _built_plan(directory: Path, target: Target) -> Path | None:
    """The run's engine, if it fits the model as it is now."""
    if target.engine != "tensorrt" or "tensorrt-rtx" not in installed_flavours():
        return None
    try:
        return current_plan(directory, cast(Precision, target.precision), "tensorrt-rtx")[0]
    except InputError:
        return None


def built(plan: Path, batches: Sequence[int]) -> dict[int, list[Kernel]]:
    """Kernels of an engine by batch size, where it has a profile of that size alone."""
    found = {}
    for layers in load_layers(plan):
        profile = BatchProfile.parse(layers.batch)
        if profile.least == profile.most and profile.most in batches and layers.whole.macs is not None:
            found[profile.most] = kernels_of(layers)
    return found


def kernels_of(layers: Layers) -> list[Kernel]:
    """Kernels of an engine at one batch size."""
    return [_kernel(kernel) for kernel in layers.kernels]


def _kernel(kernel: BuiltKernel) -> Kernel:
    moved = cast(int, kernel.bytes_read) + cast(int, kernel.bytes_written)
    if kernel.is_attention:
        return Kernel("attention", 2.0 * (kernel.macs or 0), moved, block=kernel.block)
    if not kernel.macs:
        return Kernel("other", 0.0, moved, block=kernel.block)
    *rows, columns = kernel.outputs[0].shape
    tiles = 1
    for size in rows:
        tiles *= size
    return Kernel("gemm", 2.0 * kernel.macs, moved, -(-tiles // TILE) * -(-columns // TILE), block=kernel.block)
