"""Picture files to a served model, and its guesses back: however many files, few are in memory at a time."""

import glob
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform

from lowpass.export.graph.pixels import to_pixels
from lowpass.export.triton.client import Client, Guess, Served
from lowpass.export.triton.split import Split
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.datasets import MODES
from lowpass.pipeline.data.folders import pictures_below
from lowpass.pipeline.data.pictures import EXTENSIONS, UNREADABLE, decode_picture

REQUEST_BYTES = 16 * 2**20  # of the images of one request; Triton takes up to 64 MiB over HTTP
MOST_RESIZED = 50_000_000  # pixels
WAITING_FOR_ANSWERS = 2  # threads beyond a core each: while these wait for the server, the others prepare

Prepare = Callable[[Path], NDArray[Any]]


@dataclass(frozen=True)
class Prediction:
    """A file's best classes, best first; or why it could not be read, and no classes."""

    file: Path
    guesses: tuple[Guess, ...]
    unreadable: str | None = None


def find_pictures(named: Sequence[str]) -> list[Path]:
    """The files that are meant by `named`, each once, in that order.

    A file stands for itself, a folder for all pictures below it, and a pattern, which may hold `**`, for the pictures
    that match it and those below folders that do. Pictures are known by their extension, except where a file is named.

    Raises:
        InputError: a folder holds no picture, or a pattern matches none.
    """
    found: dict[Path, None] = {}
    for name in named:
        if not name:
            raise InputError("an empty name is no picture; '.' is this folder")
        path = Path(name)
        if path.is_dir():
            own = pictures_below(path)
        elif path.exists() or not glob.has_magic(name):
            own = [path]  # one that is not there is told of when its turn comes
        else:
            # A pattern may begin anywhere, which those of Path may not.
            matches = map(Path, sorted(glob.glob(name, recursive=True)))  # noqa: PTH207
            own = [file for match in matches for file in _meant(match)]
        if not own:
            what = "holds no picture" if path.is_dir() else "matches no picture"
            raise InputError(f"{name} {what}; pictures end in {', '.join(sorted(EXTENSIONS))}")
        found |= dict.fromkeys(own)
    return list(found)


def _meant(match: Path) -> list[Path]:
    if match.is_dir():
        return pictures_below(match)
    return [match] if match.suffix.lower() in EXTENSIONS else []


def predict(
    client: Client | Split, files: Sequence[Path], top: int = 5, logits: bool = False, exif: bool = False
) -> Iterator[Prediction]:
    """Files in batches to the model -> the `top` classes of each, in the order of the files.

    A few threads prepare a batch each and send it. Batches ahead of the one whose answer is due are few, so memory does
    not grow with the files.

    Args:
        client: of the model, or of it and its canary.
        files: pictures; one that cannot be read comes back without guesses, and does not stop the rest.
        top: classes of each.
        logits: scores are logits instead of probabilities.
        exif: turn pictures as their cameras were held.

    Raises:
        RunError: the server refuses, is overloaded, does not answer in time, or answers what is no number.
    """
    prepare = preparing(client.served, exif)
    threads = len(os.sched_getaffinity(0)) + WAITING_FOR_ANSWERS
    step = _batch(client.served, len(files), threads)

    def answered(part: Sequence[Path]) -> list[Prediction]:
        images, refused = list[NDArray[Any]](), dict[Path, str]()
        for file in part:
            try:
                images.append(prepare(file))
            except UNREADABLE as error:
                refused[file] = _reason(error)
        sent = [file for file in part if file not in refused]
        found = client.classify(np.stack(images), top, logits, sent) if sent else []
        guesses = dict(zip(sent, found, strict=True))
        return [Prediction(file, tuple(guesses.get(file, ())), refused.get(file)) for file in part]

    with ThreadPoolExecutor(threads) as pool:
        due: deque[Future[list[Prediction]]] = deque()
        try:
            for start in range(0, len(files), step):
                if len(due) == 2 * threads:
                    yield from due.popleft().result()
                due.append(pool.submit(answered, files[start : start + step]))
            while due:
                yield from due.popleft().result()
        finally:
            for future in due:
                future.cancel()


def preparing(served: Served, exif: bool = False) -> Prepare:
    """A function that makes of a file what the model takes: [C, H, W] FP32 normalised, or pixels [H, W, C] uint8. It
    raises one of `UNREADABLE`."""
    prep = served.preprocessing
    transform = create_transform(
        input_size=served.size,
        mean=prep.mean,
        std=prep.std,
        interpolation=prep.interpolation,
        crop_pct=prep.crop_pct,
        crop_mode=prep.crop_mode,
    )

    def prepare(file: Path) -> NDArray[Any]:
        picture = decode_picture(file, MODES[served.size[0]], exif)
        if prep.crop_mode == "center" and _resized_pixels(picture, served) > MOST_RESIZED:
            raise ValueError(f"{picture.width} x {picture.height} pixels, which is too long for its other side")
        image = transform(picture).numpy().astype(np.float32, copy=False)
        return to_pixels(image[None], prep)[0] if served.uint8 else image

    return prepare


def _resized_pixels(picture: Image.Image, served: Served) -> float:
    """Of a picture that was resized until its shorter side fits: those of one row would not fit into memory."""
    _, height, width = served.size
    scale = max(height / picture.height, width / picture.width) / served.preprocessing.crop_pct
    return picture.height * picture.width * scale**2


def _batch(served: Served, files: int, threads: int) -> int:
    """Images of a request: no more than the model takes and a request should hold, and few enough for all threads to
    get some."""
    bytes_each = int(np.prod(served.size)) * (1 if served.uint8 else 4)
    return max(1, min(served.max_batch, REQUEST_BYTES // bytes_each, -(-files // threads)))


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
