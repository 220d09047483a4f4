"""The `lowpass` command: parse, call, print. What the commands do is in `lowpass/commands/`."""

from collections.abc import Sequence
from typing import Annotated

import typer

from lowpass.commands import compress, import_vtc, model, serve, ship
from lowpass.pipeline.base.allocator import keep_freed_memory
from lowpass.pipeline.base.exits import exit_codes
from lowpass.pipeline.base.version import __version__

app = typer.Typer(
    help="""Make a trained DeiT small, and fast where it is deployed (VTC-LFC, NeurIPS 2022).

    A first run, nothing downloaded: lowpass demo

    Your own model: lowpass compress --model deit_small_patch16_224 --weights deit_small.pth --data imagenet/
    --target-macs 0.46, then lowpass finetune, export, build and benchmark on the run directory it made.

    Progress and the log go to standard error, the answer to standard output. Exit codes: 0 done, 1 something failed,
    2 the input cannot be used.""",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
for command in (
    compress.demo,
    compress.compress,
    import_vtc.import_vtc,
    model.finetune,
    model.evaluate,
    ship.export,
    ship.build,
    ship.benchmark,
    ship.profile,
    serve.deploy,
    serve.serve,
    serve.predict,
    ship.doctor,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lowpass {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exit codes as in `lowpass.pipeline.base.exits`."""
    keep_freed_memory()
    with exit_codes():
        app(arguments)


if __name__ == "__main__":
    main()
