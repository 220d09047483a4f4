"""What a model would take on a GPU that is not here, with how wrong that may be. Never a measurement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict

from lowpass.export.forecast.calibration import Calibration, HeldOut, calibration
from lowpass.export.forecast.cost import Flat, Speeds, Times, times
from lowpass.export.forecast.gpus import Gpu
from lowpass.export.forecast.work import Engine, Kernel, Work, kernels, layer_bytes_of, total_kernels

ALL = "all"  # of the errors left out: every GPU


class Share(BaseModel):
    """Milliseconds of a block (None: embedding and head), of its launches, and how many these are."""

    model_config = ConfigDict(frozen=True)

    block: int | None
    ms: float
    kernels: int


class Figures(BaseModel):
    """One model at one batch size: milliseconds a batch, between which nine in ten published latencies that were left
    out would have fallen (`low_ms`, `high_ms`), and what takes the larger part: launches, bytes or arithmetic."""

    model_config = ConfigDict(frozen=True)

    ms: float
    low_ms: float
    high_ms: float
    images_per_s: float
    bound_by: str
    kernels: int
    blocks: tuple[Share, ...]


class Model(BaseModel):
    """A model's forecasts by batch size; `kernels_from` says where its kernels are known from."""

    model_config = ConfigDict(frozen=True)

    name: str
    macs: int
    kernels_from: str
    batches: dict[int, Figures]


class Forecast(BaseModel):
    """Forecasts for one GPU, engine and precision. `efficiency`: speed-up over dense, divided by dense MACs over slim
    MACs. `held_out`: what is known of the errors, the nearest first."""

    model_config = ConfigDict(frozen=True)

    kind: str = "forecast"
    gpu: str
    gpu_source: str
    engine: str
    precision: str
    held_out: dict[str, HeldOut]
    notes: tuple[str, ...]
    run: str | None = None
    dense: Model | None = None
    slim: Model | None = None
    model: Model | None = None
    speedup: dict[int, float] = {}
    efficiency: dict[int, float] = {}


@dataclass(frozen=True)
class Target:
    """What a forecast is for."""

    gpu: Gpu
    engine: Engine
    precision: str
    batches: Sequence[int]


def forecast_of(
    name: str, work: Work, target: Target, known: Mapping[int, Sequence[Kernel]] | None = None, source: str = ""
) -> Model:
    """One model's forecasts.

    Args:
        name: for the reader.
        work: its shape.
        target: where it is to run.
        known: by batch size, kernels of an engine that was built; other sizes are from the shape.
        source: what `known` was read from.

    Raises:
        InputError: the GPU does not compute in the precision.
    """
    fitted = calibration()
    rates = fitted.rates(target.gpu, target.engine, target.precision)
    if target.gpu.kernel_us is not None:
        rates = replace(rates, cost_us=target.gpu.kernel_us)
    error = next(iter(held_out(fitted, target).values())).nine_in_ten
    figures = dict[int, Figures]()
    for batch in target.batches:
        found = list((known or {}).get(batch, ()))
        found = found or list(kernels(work, target.engine, batch, layer_bytes_of(target.precision)))
        taken = times(Flat.of(found), Speeds.of(target.gpu, target.precision), rates)
        ms = 1000 * float(taken.whole.sum())
        figures[batch] = Figures(
            ms=ms,
            low_ms=ms / (1 + error),
            high_ms=ms * (1 + error),
            images_per_s=1000 * batch / ms,
            bound_by=bound_by(taken),
            kernels=total_kernels(found),
            blocks=_blocks(found, taken),
        )
    seen = [str(batch) for batch in target.batches if batch in (known or {})]
    kernels_from = f"{source} (batch {', '.join(seen)})" if seen else "the model's shape"
    return Model(name=name, macs=work.macs(), kernels_from=kernels_from, batches=figures)


def bound_by(taken: Times) -> str:
    """What most of the time goes into."""
    slower = taken.arithmetic > taken.memory
    parts = {
        "launches": float(taken.launch.sum()),
        "arithmetic": float((taken.whole - taken.launch)[slower].sum()),
        "bytes": float((taken.whole - taken.launch)[~slower].sum()),
    }
    return max(parts, key=lambda part: parts[part])


def _blocks(found: Sequence[Kernel], taken: Times) -> tuple[Share, ...]:
    shares = dict[int | None, Share]()
    for kernel, seconds in zip(found, taken.whole.tolist(), strict=True):
        before = shares.get(kernel.block, Share(block=kernel.block, ms=0, kernels=0))
        shares[kernel.block] = Share(
            block=kernel.block, ms=before.ms + 1000 * seconds, kernels=before.kernels + kernel.count
        )
    return tuple(shares.values())


def held_out(fitted: Calibration, target: Target) -> dict[str, HeldOut]:
    """What is known of the errors of such a forecast, the nearest case first."""
    gpu, engine = target.gpu.name, target.engine
    cases = {
        f"leave-one-model-out ({gpu}, {engine})": fitted.models_left_out.get(f"{gpu} {engine}"),
        f"leave-one-GPU-out ({engine})": fitted.gpus_left_out.get(engine),
        f"leave-one-GPU-out ({ALL})": fitted.gpus_left_out[ALL],
    }
    return {name: error for name, error in cases.items() if error is not None}


def notes(target: Target) -> tuple[str, ...]:
    """What published latencies do not tell."""
    fitted, said = calibration(), list[str]()
    least = fitted.least_batch.get(target.engine, 0)
    if min(target.batches) < least:
        said.append(
            f"no {target.engine} latency below batch {least} was published: what a launch costs there is assumed"
        )
    if f"{target.gpu.name} {target.engine}" not in fitted.models_left_out:
        said.append(f"no latency of {target.engine} on {target.gpu.name} was published: rates are those of other GPUs")
    if target.precision == "fp8":
        said.append("no FP8 latency was published: its share of the peak is INT8's")
    return tuple(said)
