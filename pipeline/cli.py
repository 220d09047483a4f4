"""The `lowpass` command: parse, call, print. What the commands do is in `pipeline/commands/`."""

import errno
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pipeline import __version__
from pipeline.allocator import keep_freed_memory
from pipeline.commands import import_vtc, model, serve, ship
from pipeline.errors import InputError, RunError

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
    model.demo,
    model.compress,
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
    """Entry point. Exit codes: 0 done, 2 bad input, 1 failure, 130 interrupted."""
    keep_freed_memory()
    try:
        app(arguments)
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(_why(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; --resume goes on with a search", 130)


def _why(error: OSError) -> str:
    """An operating system's refusal with the file and the remedy."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write {what}; what was written before is whole: make room, then go on (a search: with --resume)"
    return what


def _fail(message: str, code: int) -> None:
    print(f"lowpass: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
