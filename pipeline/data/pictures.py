"""Image files as Pillow images of the mode a model takes."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lowpass.pipeline.base.errors import InputError

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises
# What Pillow reads by itself: no PostScript, which is a program, and no formats that it only knows by name.
EXTENSIONS = frozenset(
    [
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tga",
        ".jp2",
        ".j2k",
        ".avif",
    ]
)


def open_picture(path: Path, mode: str, exif: bool = False) -> Image.Image:
    """A picture in `mode` (`RGB` or `L`): the first frame, deep greys scaled to 8 bits, alpha dropped.

    Args:
        path: of the file.
        mode: Pillow's.
        exif: turn it as its camera was held. timm does not, in training either.

    Raises:
        InputError: it cannot be read; the message names the file.
    """
    return read_picture(path, str(path), mode, exif)


def read_picture(source: Path | BytesIO, name: str, mode: str, exif: bool = False) -> Image.Image:
    """`open_picture` of a file that may be in memory; `name` is for the message."""
    try:
        return decode_picture(source, mode, exif)
    except UNREADABLE as error:
        unknown = isinstance(error, UnidentifiedImageError)
        said = "cannot identify it as a picture" if unknown else error
        raise InputError(
            f"cannot read the image {name}: {said}; mend it, take it away, or leave such images out with "
            "--skip-unreadable"
        ) from None


def decode_picture(source: Path | BytesIO, mode: str, exif: bool = False) -> Image.Image:
    """`open_picture` for who knows better what to say of a picture that cannot be read: what Pillow raises (one of
    `UNREADABLE`) is left as it is."""
    # Of large pictures, which are said as they are opened, and of transparency that goes.
    with warnings.catch_warnings(action="ignore"), Image.open(source) as image:
        image.load()
        return as_mode(ImageOps.exif_transpose(image) if exif else image, mode)


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """A picture in `mode`. Greys of 16 bits are scaled, and so are real numbers up to 1; Pillow's own conversion would
    clip the former at 255, and make the latter black."""
    return _eight_bits(image).convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        if image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values /= 257
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        values = values * 255 if values.max(initial=0) <= 1 else values
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    return image


def is_readable(path: Path, mode: str) -> bool:
    """Whether all of a picture can be read."""
    try:
        open_picture(path, mode)
    except InputError:
        return False
    return True
