"""Top-1 at matched MACs: `python -m lowpass.benchmarks.accuracy study|noise --help`."""

import typer

from lowpass.benchmarks.accuracy import noise, study
from lowpass.pipeline.base.exits import exit_codes

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)
app.command("study")(study.main)
app.command("noise")(noise.main)

if __name__ == "__main__":
    with exit_codes():
        app()
