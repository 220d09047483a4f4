"""Dense against slim behind one Triton server: `python -m lowpass.benchmarks.serving --help`."""

import typer

from lowpass.benchmarks.serving.benchmark import main
from lowpass.pipeline.base.exits import exit_codes

if __name__ == "__main__":
    with exit_codes():
        typer.run(main)
