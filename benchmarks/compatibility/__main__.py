"""Which runtime reads which opset: `python -m lowpass.benchmarks.compatibility --help`."""

import typer

from lowpass.benchmarks.compatibility.benchmark import main
from lowpass.pipeline.base.exits import exit_codes

if __name__ == "__main__":
    with exit_codes():
        typer.run(main)
