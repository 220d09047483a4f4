"""A slim model to and from a hub of models: `push` and `pull`."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from lowpass.commands.common import AsJson, DataOption, RunDirectory, answer, say
from lowpass.commands.given import refuse
from lowpass.pipeline.base.errors import InputError


def push(
    context: typer.Context,
    directory: RunDirectory,
    repo: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where to on the Hugging Face Hub, such as someone/some-model.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write what would be uploaded to a new folder, and no more.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made.")] = False,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Of the source model, such as apache-2.0. Default: what its source says."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload the slim model, its classes' names and a model card made of the run.

    Nothing else of the run goes out. It says what goes where, and asks first."""
    from lowpass.api import Run
    from lowpass.pipeline.model.hub import check_token, checked_repo, upload

    if repo is None and to is None:
        raise InputError("give --repo NAME to upload to, or --to FOLDER to write what would be uploaded")
    if to is not None:
        refuse(context, ("private", "yes"), "{}: for an upload, and --to writes a folder; leave that out")
    name = checked_repo(repo) if repo is not None else ""
    slim = Run(directory).publishable(name, license)
    if to is not None:
        if to.exists() and not (to.is_dir() and not any(to.iterdir())):
            raise InputError(f"{to} is not an empty directory; give another --to")
        slim.save_pretrained(to)
        say({"run": str(directory), "folder": str(to), "files": _sizes(to)}, _listed(f"{to}:", to), as_json)
        return
    check_token()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        slim.save_pretrained(folder)
        if not yes:
            _ask(
                _listed(
                    f"to {name} on the Hugging Face Hub, {'private' if private else 'public'} if it is new:", folder
                )
            )
        files, url = _sizes(folder), upload(folder, name, private)
    say(
        {"run": str(directory), "repo": name, "url": url, "files": files},
        f"uploaded {len(files)} files: {url}",
        as_json,
    )


def pull(
    source: Annotated[
        str, typer.Argument(metavar="NAME", help="On the Hugging Face Hub, such as someone/some-model; or a folder.")
    ],
    out: Annotated[Path, typer.Option(help="Run directory, new or empty.")],
    data: DataOption = None,
    as_json: AsJson = False,
) -> None:
    """Make a run of a slim model that `push` or `save_pretrained` wrote.

    Every other command takes it. It has no dense model: it is fine-tuned on the labels alone, and timed against a dense
    model with random weights. Without --data its exports are verified on noise."""
    from lowpass.pipeline.run.pull import pull as make_run

    answer(out, make_run(source, out, data), None, as_json)


def _ask(what: str) -> None:
    """Show what is about to happen on standard error, and go on if the user says so.

    Raises:
        InputError: the user does not, or there is none.
    """
    print(what, file=sys.stderr)
    if not is_terminal():
        raise InputError("nothing was uploaded: this is no terminal to ask in; give --yes")
    if not typer.confirm("upload?", err=True):
        raise InputError("nothing was uploaded")


def is_terminal() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _listed(head: str, folder: Path) -> str:
    return "\n".join([head, *(f"  {name}: {size:,} bytes" for name, size in _sizes(folder).items())])
