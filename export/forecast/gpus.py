"""What GPUs can do by their makers' word: peaks, bandwidths, multiprocessors.

Peaks are dense (no sparsity) and of tensor cores with FP32 accumulation; GeForce cards do half as much so as with FP16
accumulation. Boost clocks are the makers'; cards of few watts (T4, L4) do not hold them.
"""

import math
from dataclasses import dataclass

from lowpass.pipeline.base.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """One GPU. `tflops` of FP16 and BF16, `tops` of INT8, `fp8_tflops` of FP8 (None: it has none), `gbs` gigabytes a
    second of its memory, `sms` multiprocessors. `kernel_us`, where the user says it, is what each kernel costs."""

    name: str
    tflops: float
    tops: float
    fp8_tflops: float | None
    gbs: float
    sms: int
    source: str
    kernel_us: float | None = None

    def peak(self, precision: str) -> float:
        """Operations a second of linear layers in a precision (a multiplication and an addition are two).

        Raises:
            InputError: it has no such units, or nothing is known of the precision.
        """
        peaks = {
            "fp16": self.tflops,
            "bf16": self.tflops,
            "int8": self.tops,
            "int8-fp16": self.tops,
            "fp8": self.fp8_tflops,
        }
        if precision not in peaks:
            raise InputError(f"there is no forecast for {precision}; choose from {', '.join(peaks)}")
        peak = None if precision == "bf16" and self.name == "t4" else peaks[precision]
        if peak is None:
            raise InputError(f"{self.name} has no tensor cores for {precision}; choose fp16 or int8-fp16")
        return peak * 1e12


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", 65, 130, None, 320, 40, "NVIDIA T4 datasheet"),
        Gpu("l4", 121, 242, 242, 300, 58, "NVIDIA L4 datasheet"),
        Gpu("a10", 125, 250, None, 600, 72, "NVIDIA A10 datasheet"),
        Gpu("a10g", 70, 140, None, 600, 80, "NVIDIA A10G, of Amazon EC2 G5 (EC2 G5 documentation)"),
        Gpu("a100", 312, 624, None, 1555, 108, "NVIDIA A100 datasheet, 40 GB"),
        Gpu("h100", 989, 1979, 1979, 3350, 132, "NVIDIA H100 datasheet, SXM"),
        Gpu("rtx3090", 71, 284, None, 936, 82, "NVIDIA Ampere GA102 whitepaper"),
        Gpu("rtx4090", 165.2, 660.6, 330.3, 1008, 128, "NVIDIA Ada whitepaper"),
        Gpu("rtx5090", 209.5, 838, 419, 1792, 170, "NVIDIA RTX Blackwell whitepaper"),
        Gpu("orin", 42.5, 85, None, 204.8, 16, "NVIDIA Jetson AGX Orin technical brief, 64 GB; INT8 without its DLAs"),
    )
}
TFLOPS_A_SM = 2.0  # in the middle of the table (0.9 to 7.5): how a described GPU is split into multiprocessors


def find_gpu(name: str | None, spec: str | None) -> Gpu:
    """A GPU of the table, or one that is described.

    Args:
        name: such as `a100`.
        spec: such as `tflops=312,gbs=1555` or `tflops=312,gbs=1555,kernel_us=4`; INT8 is taken for twice as fast.

    Raises:
        InputError: neither or both are given, the name is unknown, or the description is none.
    """
    if (name is None) == (spec is None):
        raise InputError("name a GPU with --gpu, or describe one with --gpu-spec tflops=T,gbs=B")
    if name is not None:
        found = GPUS.get(name.lower().replace(" ", "").replace("-", ""))
        if found is None:
            raise InputError(
                f"{name!r} is not in the table of GPUs ({', '.join(GPUS)}); describe it: --gpu-spec tflops=T,gbs=B"
            )
        return found
    assert spec is not None
    figures: dict[str, float] = {}
    for part in spec.split(","):
        key, _, text = part.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if key.strip() not in ("tflops", "gbs", "kernel_us") or not (math.isfinite(value) and value > 0):
            raise InputError(
                f"--gpu-spec takes tflops=T,gbs=B[,kernel_us=K], numbers above 0; not {part.strip()!r} (T: dense FP16 "
                "of the tensor cores with FP32 accumulation; B: gigabytes a second)"
            )
        figures[key.strip()] = value
    if not {"tflops", "gbs"} <= set(figures):
        raise InputError(f"--gpu-spec {spec} lacks tflops= or gbs=")
    tflops = figures["tflops"]
    sms = max(1, round(tflops / TFLOPS_A_SM))
    return Gpu("described", tflops, 2 * tflops, 2 * tflops, figures["gbs"], sms, "--gpu-spec", figures.get("kernel_us"))
