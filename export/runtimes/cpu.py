"""What the CPU says of itself."""

from functools import cache
from pathlib import Path

MATRIX_UNITS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni")


@cache
def cpu_info() -> dict[str, str]:
    """The first processor of `/proc/cpuinfo`; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def matrix_units() -> tuple[str, ...]:
    """Matrix and low-precision units, as the kernel names them."""
    return tuple(flag for flag in MATRIX_UNITS if flag in cpu_info().get("flags", "").split())
