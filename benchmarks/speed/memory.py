"""Peak memory of one model in one runtime, measured in a process of its own.

python -m lowpass.benchmarks.speed.memory FILE RUNTIME PRECISION BATCH CHANNELS HEIGHT WIDTH      prints MiB
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

import numpy as np

from lowpass.export.options import Precision
from lowpass.export.runtimes.registry import RuntimeName, onnx_session
from lowpass.export.runtimes.session import logits_of

ON_CPU: tuple[RuntimeName, ...] = ("onnxruntime", "openvino")
LIMIT_S = 120


def peak_memory(
    content: bytes, runtime: RuntimeName, precision: Precision, batch: int, image: tuple[int, int, int]
) -> float | None:
    """MiB that loading an ONNX file and running it at one batch size add to a fresh process. None where it cannot be
    told: on a GPU, where the figure would be the context's and cost seconds, and when the child fails."""
    if runtime not in ON_CPU:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(content)
        command = [sys.executable, "-m", "lowpass.benchmarks.speed.memory", str(file), runtime, precision, str(batch)]
        try:
            done = subprocess.run(  # noqa: S603 - our own module with our own arguments
                [*command, *map(str, image)], capture_output=True, text=True, timeout=LIMIT_S, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return None
    return float(done.stdout.split()[-1])


def _used(line: str) -> float:
    """MiB by a line of this process's status: `VmRSS` in use now, `VmHWM` the peak so far."""
    status = dict(entry.split(":", 1) for entry in Path("/proc/self/status").read_text().splitlines())
    return int(status[line].split()[0]) / 1024


def main(file: str, runtime: str, precision: str, batch: str, *image: str) -> None:
    """Load, run twice, print what that added."""
    content = Path(file).read_bytes()
    images = np.zeros((int(batch), *map(int, image)), np.float32)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, not from what imports needed
    before = _used("VmRSS")
    session = onnx_session(cast(RuntimeName, runtime), content, cast(Precision, precision), Path(file).parent)
    for _ in range(2):
        logits_of(session, images)
    print(f"{_used('VmHWM') - before:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
