"""A latency target on a GPU that is not here: planned by the forecast, part by part, and corrected by the forecast of
an engine that is built of the plan."""

from dataclasses import replace
from functools import cache
from typing import get_args

import torch

from lowpass.export.batch import BatchProfile
from lowpass.export.forecast.calibration import calibration
from lowpass.export.forecast.cost import Flat, Speeds, times
from lowpass.export.forecast.forecast import Target, forecast_of, held_out
from lowpass.export.forecast.gpus import find_gpu
from lowpass.export.forecast.of_run import kernels_of
from lowpass.export.forecast.work import (
    ENGINES,
    Engine,
    Kernel,
    attention_kernels,
    block_of,
    end_kernels,
    layer_bytes_of,
    mlp_kernels,
    selection_kernels,
    work_of,
)
from lowpass.export.graph.deployable import deployable
from lowpass.export.onnx.trace import trace
from lowpass.export.options import Precision
from lowpass.export.runtimes.engine import compile_engine, installed_flavours
from lowpass.export.tensorrt.layers import read_layers
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.target import CostTarget

PREFIX = "forecast:"
HALVES = ("fp16", "bf16")


def is_forecast(runtime: str | None) -> bool:
    """Whether a runtime is the forecast of one."""
    return runtime is not None and runtime.startswith(PREFIX)


def parse_target(runtime: str, precision: str | None, batch: int) -> Target:
    """What `forecast:GPU[:PRECISION[:ENGINE]]` names; GPU may be a description, as `--gpu-spec` takes it.

    Args:
        runtime: see above.
        precision: where `runtime` names none; None: fp16.
        batch: images at once.

    Raises:
        InputError: it names no GPU, precision or engine that there is a forecast for.
    """
    gpu, _, rest = runtime.removeprefix(PREFIX).partition(":")
    named, _, engine = rest.partition(":")
    if named and precision and named != precision:
        raise InputError(f"--runtime {runtime} and --precision {precision} name two precisions")
    chosen = named or precision or "fp16"
    if (engine or ENGINES[0]) not in get_args(Engine):
        raise InputError(f"--runtime {runtime}: there is no forecast for {engine!r}; choose from {', '.join(ENGINES)}")
    kind: Engine = next(one for one in ENGINES if one == (engine or ENGINES[0]))
    if kind != "tensorrt" and chosen not in HALVES:
        raise InputError(f"--runtime {runtime}: {kind} runs fp16 or bf16, not {chosen}; 8 bits are for tensorrt")
    found = find_gpu(None, gpu) if "=" in gpu else find_gpu(gpu, None)
    found.peak(chosen)
    return Target(found, kind, chosen, [batch])


class ForecastCosts:
    """Milliseconds of the parts of a model's blocks by the forecast. They add up to the forecast of its shape."""

    def __init__(self, architecture: Architecture, target: Target) -> None:
        self.architecture, self.dense, self.target = architecture, architecture.dense, target
        self._rates = calibration().rates(target.gpu, target.engine, target.precision)
        if target.gpu.kernel_us is not None:
            self._rates = replace(self._rates, cost_us=target.gpu.kernel_us)
        (self._batch,) = target.batches
        self._bytes = layer_bytes_of(target.precision)
        self._part = cache(self._of_part)

    def ends(self) -> float:
        """See `Costs`."""
        return self._ms(list(end_kernels(work_of(self.architecture), self._batch)))

    def attention(self, tokens: int, shape: BlockShape, last: bool) -> float:
        """See `Costs`."""
        return self._part("attention", tokens, (shape.heads, shape.qk_dim, shape.v_dim), last)

    def mlp(self, tokens: int, hidden: int, last: bool) -> float:
        """See `Costs`."""
        return self._part("mlp", tokens, (hidden,), last)

    def selection(self, image_tokens: int, last: bool) -> float:
        """See `Costs`."""
        return self._part("selection", image_tokens + self.dense.num_prefix_tokens, (), last)

    def _of_part(self, part: str, tokens: int, sizes: tuple[int, ...], last: bool) -> float:
        image_tokens = tokens - self.dense.num_prefix_tokens
        heads, qk_dim, v_dim = sizes if part == "attention" else (1, 1, 1)
        hidden = sizes[0] if part == "mlp" else 1
        keep = image_tokens - (part == "selection")  # one less, or nothing would be selected
        shape = BlockShape(heads=heads, qk_dim=qk_dim, v_dim=v_dim, hidden=hidden, keep=max(keep, 1))
        block = block_of(self.dense, shape, image_tokens, last)
        if part == "attention":
            return self._ms(list(attention_kernels(block, self.target.engine, self._batch, self._bytes)))
        if part == "mlp":
            return self._ms(list(mlp_kernels(block, self.target.engine, self._batch, self._bytes)))
        return self._ms(list(selection_kernels(block, self._batch)))

    def _ms(self, found: list[Kernel]) -> float:
        if not found:
            return 0.0
        speeds = Speeds.of(self.target.gpu, self.target.precision)
        return 1000 * float(times(Flat.of(found), speeds, self._rates).whole.sum())


def forecast_target(architecture: Architecture, target_ms: float, target: Target, say: bool = True) -> CostTarget:
    """A target in forecast milliseconds of one batch.

    Where TensorRT-RTX is installed and the engine is TensorRT's in FP16 or BF16, a plan's engine is built, which takes
    no GPU, and forecast from its own kernels; else the forecast is that of the plan's shape.

    Args:
        architecture: of the dense model, with the token score it will be searched with.
        target_ms: of one batch.
        target: where.
        say: in the log, how wrong such forecasts are.

    Raises:
        InputError: the GPU does not compute in the precision.
    """
    if say:
        error = next(iter(held_out(calibration(), target).items()))
        logger.info(
            f"the target is a forecast for {target.gpu.name}, not measured: of published latencies left out "
            f"({error[0]}) nine in ten are within {100 * error[1].nine_in_ten:.0f}%"
        )
    builds = target.engine == "tensorrt" and target.precision in HALVES and "tensorrt-rtx" in installed_flavours()

    def measure(slim: Architecture) -> float:
        (batch,) = target.batches
        known = {batch: engine_kernels(slim, target.precision, batch)} if builds else {}
        return forecast_of("slim", work_of(slim), target, known, "its engine").batches[batch].ms

    source = "forecast from the engine" if builds else "forecast"
    return CostTarget(
        target_ms, ForecastCosts(architecture, target), "ms (forecast)", measure, source, target.batches[0]
    )


def engine_kernels(architecture: Architecture, precision: str, batch: int) -> list[Kernel]:
    """The kernels that TensorRT-RTX makes of a model; its weights do not matter."""
    half: Precision = "bf16" if precision == "bf16" else "fp16"
    dense = architecture.dense
    with torch.random.fork_rng(devices=[]):
        module = deployable(SlimViT(architecture), half)
    model = trace(module, torch.zeros(2, dense.in_chans, *dense.img_size))
    profile = BatchProfile(least=batch, best=batch, most=batch)
    compiled = compile_engine("tensorrt-rtx", model.SerializeToString(), profile)
    (layers,) = read_layers(compiled.log, model, profile)
    return kernels_of(layers)
