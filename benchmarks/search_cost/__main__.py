"""What a search costs: `python -m lowpass.benchmarks.search_cost --help`."""

import typer

from lowpass.benchmarks.search_cost.benchmark import main
from lowpass.pipeline.base.exits import exit_codes

if __name__ == "__main__":
    with exit_codes():
        typer.run(main)
