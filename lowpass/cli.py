"""The `lowpass` command: parse, call, print. What the commands do is in `lowpass/commands/`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import typer

from lowpass.commands import (
    compress,
    deploy,
    forecast,
    import_vtc,
    model,
    predict,
    publish,
    report,
    serve,
    ship,
)
from lowpass.commands.given import Command
from lowpass.pipeline.base.allocator import keep_freed_memory
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.exits import exit_codes
from lowpass.pipeline.base.launched import started_together
from lowpass.pipeline.base.version import __version__

app = typer.Typer(
    help="""Take a trained vision transformer and ship it small and fast (VTC-LFC, NeurIPS 2022).

    A first run, nothing downloaded: lowpass demo

    Progress goes to standard error, the answer to standard output. Exit codes: 0 done, 1 failed, 2 bad input.""",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Make a model small": (
        compress.demo,
        compress.compress,
        import_vtc.import_vtc,
        model.finetune,
        model.evaluate,
    ),
    "Make it fast": (ship.export, ship.build, ship.benchmark, ship.profile, forecast.forecast),
    "Look at it": (report.report,),
    "Serve it": (deploy.deploy, serve.serve, predict.predict),
    "Publish it": (publish.push, publish.pull),
    "This machine": (ship.doctor,),
}
SHARED = ("compress", "finetune", "evaluate")  # by several processes that were started together
for panel, commands in PANELS.items():
    for command in commands:
        app.command(cls=Command, rich_help_panel=panel)(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lowpass {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    if started_together() > 1 and context.invoked_subcommand not in SHARED:
        from lowpass.pipeline.base.processes import agreed

        agreed(partial(_refuse_several, context.invoked_subcommand))


def _refuse_several(command: str | None) -> None:
    raise InputError(
        f"{started_together()} processes were started, each of which would do all of `lowpass {command}`: start one; "
        f"{', '.join(SHARED)} alone are shared"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exit codes as in `lowpass.pipeline.base.exits`."""
    keep_freed_memory()
    with exit_codes():
        app(arguments)


if __name__ == "__main__":
    main()
