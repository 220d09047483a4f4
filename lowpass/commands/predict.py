"""`predict`: what a served model sees on pictures."""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowpass.commands.common import AsJson
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import replacing
from lowpass.pipeline.base.progress import logger, track

if TYPE_CHECKING:
    from lowpass.export.triton.predict import Prediction
    from lowpass.export.triton.split import Comparison

COLUMNS = ("path", "rank", "index", "label", "score")
NAMED = 3  # unreadable files that the last line repeats


def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="Files, folders (all pictures below), or patterns in quotes such as 'photos/**/*.jpg'.",
        ),
    ],
    model: Annotated[str, typer.Option(help="The name it was deployed under.")],
    url: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:8000",
    protocol: Annotated[Literal["http", "grpc"], typer.Option(help="gRPC listens on 8001 by default.")] = "http",
    top: Annotated[int, typer.Option(min=1, help="Classes to print of each image.")] = 5,
    logits: Annotated[bool, typer.Option("--logits", help="Logits instead of probabilities.")] = False,
    exif: Annotated[
        bool, typer.Option("--exif", help="Turn pictures as their cameras were held. Training, as timm's, does not.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help=f"Write a table too: {', '.join(COLUMNS)}.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a served model what is on some images.

    An image that cannot be read is named and left out; the exit code is 1 then. Where the model has a canary, that
    answers its share, and both are compared."""
    from lowpass.export.triton.client import Client
    from lowpass.export.triton.predict import find_pictures
    from lowpass.export.triton.predict import predict as ask
    from lowpass.export.triton.split import Split

    files = find_pictures(images)
    # JSON already: of many files, the answers as objects would be ten times as large.
    answers, unreadable = dict[str, str](), dict[str, str]()
    with closing(Client(url, model, protocol)) as client, _table(table) as write:
        split = Split.find(client)
        for found in track(ask(split or client, files, top, logits, exif), f"asking {model}", len(files)):
            if found.unreadable is not None:
                unreadable[_shown(found.file)] = found.unreadable
                logger.warning("%s cannot be read as an image: %s", _shown(found.file), found.unreadable)
                continue
            if write is not None:
                write.writerows(
                    (found.file, rank, guess.index, guess.label, guess.score)
                    for rank, guess in enumerate(found.guesses, start=1)
                )
            if as_json:
                answers[str(found.file)] = json.dumps([asdict(guess) for guess in found.guesses])
            else:
                print(_line(found, logits), flush=True)
    compared = None if split is None else split.comparison()
    if compared is not None:
        logger.info("%s", _told(model, compared))
    if as_json:
        about = {"url": url, "model": model, "scores": "logits" if logits else "probabilities"}
        fields = {key: json.dumps(value) for key, value in about.items()}
        if compared is not None:
            fields["canary"] = json.dumps(asdict(compared))
        print(_object(fields | {"unreadable": json.dumps(unreadable), "predictions": _object(answers)}))
    if unreadable:
        named = "; ".join(f"{file}: {reason}" for file, reason in list(unreadable.items())[:NAMED])
        more = "; ..." if len(unreadable) > NAMED else ""
        count = f"{len(unreadable)} of {len(files)} pictures could not be read"
        raise RunError(f"{count}: {named}{more}")


def _told(model: str, compared: "Comparison") -> str:
    """How a canary does."""
    text = f"the canary of {model}, version {compared.version}, is to answer {compared.share:.15g} % of the requests: "
    if compared.agreement is None:
        text += "none yet, so few there were"
    else:
        text += (
            f"it did so in {compared.requests} with {compared.images} images; top-1 is the same on "
            f"{compared.agreement:.2f} %, and it took {compared.canary_ms:.1f} ms where {model} took "
            f"{compared.stable_ms:.1f} (medians of a request)"
        )
    return text + (f"; it FAILED in {compared.failures}, where {model} answered" if compared.failures else "")


@contextmanager
def _table(path: Path | None) -> Iterator[Any]:
    """A writer of rows to `path`, which appears whole once all are written; None where no table is wanted."""
    if path is None:
        yield None
        return
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():
        raise InputError(f"--csv {path} is no regular file; a table is made whole, and then put in the place of one")
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"--csv {path}: {path.parent} is no folder")
    with replacing(path) as file:
        # A name that is no text is written byte by byte, as it is.
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        yield writer
        text.detach()  # written, and `file` left open


def _object(fields: dict[str, str]) -> str:
    """A JSON object of fields that are JSON already."""
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in fields.items()) + "}"


def _line(found: "Prediction", logits: bool) -> str:
    scores = (
        f"{_printable(guess.label)} {guess.score:.2f}" if logits else f"{_printable(guess.label)} {guess.score:.1%}"
        for guess in found.guesses
    )
    return f"{_shown(found.file)}: {', '.join(scores)}"


def _shown(file: Path) -> str:
    """A name that any terminal can print, also where it is no text, or more than a line."""
    return _printable(str(file).encode(errors="surrogateescape").decode(errors="backslashreplace"))


def _printable(text: str) -> str:
    """Without what moves a terminal's cursor, or ends a line."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
