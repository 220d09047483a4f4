"""Kernels of every candidate's engine: `python -m lowpass.benchmarks.kernels --help`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from lowpass.benchmarks.kernels.benchmark import PRECISIONS, count_kernels
from lowpass.benchmarks.rows import RESULTS
from lowpass.benchmarks.speed.candidates import MODELS
from lowpass.pipeline.base.exits import exit_codes


def main(
    out: Annotated[Path, typer.Option(help="Results, as .csv and .png of this name.")] = RESULTS / "kernels",
    models: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = ",".join(MODELS),
    precisions: Annotated[str, typer.Option(help=f"Of {', '.join(PRECISIONS)}.")] = ",".join(PRECISIONS),
) -> None:
    """Build every candidate with TensorRT-RTX, which names each kernel and needs no GPU.

    Batch 1, and in FP16 batch 32 as well. What is there already from the same commit is not built again.
    """
    command = shlex.join(["python", "-m", "lowpass.benchmarks.kernels", *sys.argv[1:]])
    count_kernels(out, [name.strip() for name in models.split(",")], precisions.split(","), command)


if __name__ == "__main__":
    with exit_codes():
        typer.run(main)
