"""How long kernels take: arithmetic or memory, whichever is slower, and a cost of each launch.

    seconds = sum over kernels of ((flops / (u peak))^4 + (bytes / (w bandwidth))^4)^(1/4) + cost

The fourth powers stand for the larger of the two, with overlap that is not perfect. A product of few tiles leaves
multiprocessors idle: u = u0 tiles / (tiles + fill * multiprocessors).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowpass.export.forecast.gpus import Gpu
from lowpass.export.forecast.work import Kernel

POWER = 4
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rates:
    """What is fitted, each one number or one a kernel. `gemm` and `attention` are shares of the peak, `memory` of the
    bandwidth; `cost_us` of a launch; `fill` as above."""

    gemm: float | Floats
    attention: float | Floats
    memory: float | Floats
    cost_us: float | Floats
    fill: float | Floats


@dataclass(frozen=True)
class Speeds:
    """What is known, each one number or one a kernel: operations a second of linear layers and of attention, which
    computes in FP16 in every precision; bytes a second; multiprocessors."""

    linear: float | Floats
    attention: float | Floats
    memory: float | Floats
    sms: float | Floats

    @classmethod
    def of(cls, gpu: Gpu, precision: str) -> "Speeds":
        """By the makers' word."""
        return cls(gpu.peak(precision), gpu.peak("fp16"), gpu.gbs * 1e9, gpu.sms)


@dataclass(frozen=True)
class Flat:
    """Kernels as arrays, an element a kernel."""

    flops: Floats
    bytes: Floats
    tiles: Floats
    count: Floats
    is_attention: NDArray[np.bool_]

    @classmethod
    def of(cls, kernels: Iterable[Kernel]) -> "Flat":
        """From a list."""
        rows = [(k.flops, k.bytes, k.tiles, k.count, k.kind == "attention") for k in kernels]
        flops, moved, tiles, count, attention = np.array(rows, float).reshape(-1, 5).T
        return cls(flops, moved, tiles, count, attention > 0)

    @classmethod
    def joined(cls, parts: "Sequence[Flat]") -> "Flat":
        """One after the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__match_args__))


@dataclass(frozen=True)
class Times:
    """Seconds of each kernel's launches: as arithmetic alone, as memory traffic alone, as launches alone, together."""

    arithmetic: Floats
    memory: Floats
    launch: Floats
    whole: Floats


def times(flat: Flat, speeds: Speeds, rates: Rates) -> Times:
    """Of every kernel."""
    used = rates.gemm * flat.tiles / (flat.tiles + rates.fill * speeds.sms)
    arithmetic_speed = np.where(flat.is_attention, rates.attention * speeds.attention, used * speeds.linear)
    arithmetic = flat.count * flat.flops / arithmetic_speed
    memory = flat.count * flat.bytes / (rates.memory * speeds.memory)
    launch = flat.count * rates.cost_us * 1e-6
    return Times(arithmetic, memory, launch, (arithmetic**POWER + memory**POWER) ** (1 / POWER) + launch)
