"""`python -m lowpass.benchmarks.training arithmetic|recipes|throughput|week`."""

import typer

from lowpass.benchmarks.training import arithmetic, recipes, throughput, week
from lowpass.pipeline.base.exits import exit_codes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command("arithmetic")(arithmetic.main)
app.command("recipes")(recipes.main)
app.command("throughput")(throughput.main)
app.command("week")(week.main)

if __name__ == "__main__":  # `week` starts processes, which read this file again
    with exit_codes():
        app()
