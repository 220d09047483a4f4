"""What the speed benchmark measured: candidates by batch size, runtime and model."""

from pydantic import BaseModel, ConfigDict

from lowpass.benchmarks.latency.machine import Machine
from lowpass.benchmarks.latency.timing import Latency
from lowpass.export.options import Precision
from lowpass.export.runtimes.registry import RuntimeName

Engine = tuple[RuntimeName, Precision]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Timed(_Frozen):
    """One candidate at one batch size. `speedup` is over dense in the same runtime and precision, round by round; None
    where dense could not be timed."""

    latency: Latency
    speedup: float | None
    speedup_quartiles: tuple[float, float] | None
    efficiency: float | None


class EngineResult(_Frozen):
    """One runtime at one precision: batch -> candidate -> figures. Bytes are of the ONNX file; memory is the peak that
    loading and running at batch 8 adds to a process on a CPU, in MiB; the GPU's clock is read right after a batch size
    was timed, in MHz."""

    runtime: RuntimeName
    precision: Precision
    description: str | None = None
    not_measured: str | None = None
    file_bytes: dict[str, int] = {}
    peak_memory_mib: dict[str, float | None] = {}
    batches: dict[int, dict[str, Timed]] = {}
    sm_clock_mhz: dict[int, int | None] = {}


class ModelResult(_Frozen):
    """One model."""

    macs: dict[str, int]
    engines: list[EngineResult]


class Suite(_Frozen):
    """Everything that was measured so far. `note` says why the figures are none, if they are none."""

    suite: str
    command: str
    seconds: float
    machine: Machine
    models: dict[str, ModelResult]
    note: str | None = None
