"""The GPU's driver, clocks and limits, as `nvidia-smi` tells them."""

import shutil
import subprocess

import torch
from pydantic import BaseModel, ConfigDict

QUERY = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
PATIENCE_S = 10


class GpuState(BaseModel):
    """Of the GPU that torch computes on, now; None for what cannot be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    driver: str | None = None
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None


def gpu_state() -> GpuState:
    """Ask `nvidia-smi`; where there is none, or it fails, nothing is known."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return GpuState()
    command = [program, f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader,nounits"]
    if torch.cuda.is_available():
        command.append(f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)  # noqa: S603 - a list, no shell
    except (OSError, subprocess.SubprocessError):
        return GpuState()
    return parsed(done.stdout)


def parsed(answer: str) -> GpuState:
    """The first line of an answer to `QUERY`; what is `[N/A]` or no number is None."""
    lines = answer.strip().splitlines()
    cells = [cell.strip() for cell in lines[0].split(",")] if lines else []
    if len(cells) != len(QUERY):
        return GpuState()
    told: dict[str, str | float | None] = {}
    for field, cell in zip(QUERY, cells, strict=True):
        if field == "driver":
            told[field] = None if cell.startswith("[") else cell
            continue
        try:
            told[field] = float(cell)
        except ValueError:
            told[field] = None
    return GpuState.model_validate(told)
