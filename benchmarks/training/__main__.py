"""`python -m lowpass.benchmarks.training`, see `arithmetic.py`."""

import typer

from lowpass.benchmarks.training.arithmetic import main
from lowpass.pipeline.base.exits import exit_codes

with exit_codes():
    typer.run(main)
