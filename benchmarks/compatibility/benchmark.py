"""Which runtime reads which opset, and how near it comes to PyTorch.

    python -m lowpass.benchmarks.compatibility runs/digits --out benchmarks/results/compatibility

Each version gets an environment of its own, made by pip once and kept; the newest are those installed here. Every file
runs in a process of its own, on real images.
"""

import importlib.metadata
import shlex
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from lowpass.benchmarks.compatibility import loader
from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.rows import Row, write_rows
from lowpass.export.onnx.file import serialise
from lowpass.export.onnx.quantize import Quantization
from lowpass.export.options import USUAL, ExportOptions, Opset, Precision
from lowpass.export.runtimes.session import Images
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.progress import console, track
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.images import quantization_batches, verification_batches

# The oldest that are worth a try, what is just below the floors, and the floors. ONNX Runtime reads `Attention` since
# 1.23, and INT8 at opset 23 since 1.24. OpenVINO reads `Attention` since 2026.1, and computes that of rows right since
# 2026.3.
OLDER = (
    "onnxruntime==1.20.1",
    "onnxruntime==1.22.1",
    "onnxruntime==1.23.2",
    "onnxruntime==1.24.1",
    "openvino==2024.6.0",
    "openvino==2026.0.0",
    "openvino==2026.2.1",
    "openvino==2026.3.0",
)
OPSETS: tuple[Opset, ...] = (17, 20, 21, 23)
LONGEST_REASON = 300  # letters: OpenVINO's go on for pages


def interpreter(requirement: str, environments: Path) -> Path:
    """A Python that has this version of a runtime, such as `onnxruntime==1.20.1`.

    Raises:
        RunError: pip finds no such version for this Python.
    """
    name, _, version = requirement.partition("==")
    if importlib.metadata.version(name) == version:
        return Path(sys.executable)
    home = environments / requirement.replace("==", "-")
    python = home / "bin" / "python"
    if not (home / "made").exists():
        venv.create(home, with_pip=True, clear=True, symlinks=True)
        install = [str(python), "-m", "pip", "install", "--quiet", requirement, "numpy"]
        done = subprocess.run(install, capture_output=True, text=True, check=False)  # noqa: S603 - a list, no shell
        if done.returncode:
            raise RunError(f"pip could not install {requirement}: {done.stderr.strip().splitlines()[-1]}")
        (home / "made").touch()
    return python


def files(run: Path, folder: Path) -> Iterator[tuple[Precision, Opset, Path]]:
    """The run's slim model in every precision and opset."""
    calibration = Quantization(quantization_batches(run, None)[0])
    for precision in USUAL:
        for opset in OPSETS:
            file = folder / f"{precision}.{opset}.onnx"
            file.write_bytes(serialise(run, ExportOptions(precision=precision, opset=opset), calibration=calibration))
            yield precision, opset, file


def answer(python: Path, runtime: str, precision: Precision, file: Path, images: Path) -> Images | str:
    """The logits that a runtime gives, or why it does not."""
    logits = file.with_suffix(".npy")
    command = [str(python), str(loader.__file__), runtime, precision, str(file), str(images), str(logits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a list, no shell
    if done.returncode == 0:
        found: Images = np.load(logits)
        return found
    said = done.stderr.strip().splitlines()
    return said[-1][:LONGEST_REASON] if said and done.returncode == 1 else f"the process ended with {done.returncode}"


def rows(run: Path, requirements: list[str], environments: Path) -> Iterator[Row]:
    """Every file in every runtime.

    Raises:
        InputError: `run` holds no model.
        RunError: a runtime cannot be installed.
    """
    pythons = {requirement: interpreter(requirement, environments) for requirement in requirements}
    batches, _ = verification_batches(run, None)
    batch, _ = batches[0]
    with torch.inference_mode():
        wanted = SlimViT.load(run)(batch).numpy()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "images.npy"
        np.save(images, batch.numpy())
        made = list(files(run, folder))
        for requirement, python in pythons.items():
            runtime, _, version = requirement.partition("==")
            for precision, opset, file in track(made, requirement):
                of = {"runtime": runtime, "version": version, "precision": precision, "opset": opset}
                got = answer(python, runtime, precision, file, images)
                if isinstance(got, str):
                    yield Row(of, "not_read", got)
                    continue
                yield Row(of, "largest_difference", float(np.abs(got - wanted).max()))
                yield Row(of, "same_top1", 100 * float((got.argmax(-1) == wanted.argmax(-1)).mean()))


def main(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Run directory, as made by `lowpass compress`.")],
    out: Annotated[Path, typer.Option(help="Where OUT.csv goes.")],
    runtimes: Annotated[str, typer.Option(help="Beside those installed here.")] = ",".join(OLDER),
    environments: Annotated[Path, typer.Option(help="Where their environments are kept.")] = Path(
        ".venv-compatibility"
    ),
) -> None:
    """Which runtime reads which opset."""
    newest = [f"{name}=={importlib.metadata.version(name)}" for name in ("onnxruntime", "openvino")]
    wanted = sorted({*newest, *(part.strip() for part in runtimes.split(","))}, key=_in_order)
    found = list(rows(run, wanted, environments))
    command = shlex.join(["python", "-m", "lowpass.benchmarks.compatibility", *sys.argv[1:]])
    write_rows(out.with_suffix(".csv"), found, describe(), command)
    read = sum(row.figure == "largest_difference" for row in found)
    console.print(f"{read} of {len(wanted) * len(USUAL) * len(OPSETS)} files were read; {out.with_suffix('.csv')}")


def _in_order(requirement: str) -> tuple[str, tuple[int, ...]]:
    name, _, version = requirement.partition("==")
    if name not in ("onnxruntime", "openvino") or not version.replace(".", "").isdecimal():
        raise InputError(f"--runtimes takes onnxruntime==X and openvino==X with commas between, not {requirement!r}")
    return name, tuple(map(int, version.split(".")))
