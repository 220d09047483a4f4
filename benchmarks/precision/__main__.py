"""What a precision costs and gains: `python -m lowpass.benchmarks.precision agreement|gains --help`."""

import typer

from lowpass.benchmarks.precision import agreement, gains
from lowpass.pipeline.base.exits import exit_codes

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)
app.command("agreement")(agreement.main)
app.command("gains")(gains.main)

if __name__ == "__main__":
    with exit_codes():
        app()
