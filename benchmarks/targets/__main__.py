"""How near searches come to their targets: `python -m lowpass.benchmarks.targets --help`."""

import typer

from lowpass.benchmarks.targets.benchmark import main
from lowpass.pipeline.base.exits import exit_codes

if __name__ == "__main__":
    with exit_codes():
        typer.run(main)
