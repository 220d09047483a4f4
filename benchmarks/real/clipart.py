"""The Open Clip Art Library (public domain) as image folders: drawings in colour, by the top of its tree."""

import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.data.pictures import UNREADABLE, open_picture

FOLDER = Path("usr/share/openclipart/png")
NO_KIND = ("special", "unsorted")  # categories that say nothing of what is drawn
SIDE = 256  # pixels of what is written
LARGEST = 2**23  # pixels that are decoded; some have a hundred million, for a drawing of a chip
TESTED = 0.25  # of the pictures


@dataclass(frozen=True)
class Drawing:
    """A file, and the SHA-256 of its content in hexadecimal."""

    path: Path
    digest: str

    @property
    def split(self) -> str:
        """Decided by the content alone: no other picture's coming or going moves it."""
        return "val" if int(self.digest[:8], 16) < TESTED * 2**32 else "train"


def write_clipart(tree: Path, out: Path, least: int, most: int) -> dict[str, int]:
    """Write `out`/train/CATEGORY/NAME.png and `out`/val/CATEGORY/NAME.png, drawn on white, square, `SIDE` pixels.

    A drawing that is there twice is taken once. Large categories are thinned by hash, so that none outweighs the rest.

    Args:
        tree: where the package was unpacked.
        out: an empty folder.
        least: pictures that a category must have to be taken.
        most: pictures that are taken of a category.

    Returns:
        How many pictures `train` and `val` hold, and how many were passed over as `unreadable`: damaged, or of more
        than `LARGEST` pixels.

    Raises:
        InputError: no category has enough pictures.
    """
    counts = {"train": 0, "val": 0, "unreadable": 0}
    categories = {name: found for name, found in drawings(tree / FOLDER).items() if len(found) >= least}
    if not categories:
        raise InputError(f"{tree / FOLDER} holds no category of {least} pictures; remove {tree} to unpack it anew")
    for name, found in track(categories.items(), "writing drawings", len(categories)):
        taken = 0
        # The split goes by the digest's beginning, the order by its end: each share is thinned alike.
        for drawing in sorted(found, key=lambda each: each.digest[::-1]):
            if taken == most:
                break
            picture = _opened(drawing.path)
            if picture is None:
                counts["unreadable"] += 1
                continue
            folder = out / drawing.split / name
            folder.mkdir(parents=True, exist_ok=True)
            on_white(picture).save(folder / f"{drawing.digest[:16]}.png")
            counts[drawing.split] += 1
            taken += 1
    return counts


def drawings(root: Path) -> dict[str, list[Drawing]]:
    """Category -> its files; links and what was there before under another name are passed over."""
    found: dict[str, list[Drawing]] = {}
    seen = set[str]()
    for path in _files(root):
        category = path.relative_to(root).parts[0]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest not in seen:
            found.setdefault(category, []).append(Drawing(path, digest))
        seen.add(digest)
    return found


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.png")):
        parts = path.relative_to(root).parts
        if len(parts) > 1 and parts[0] not in NO_KIND and path.is_file() and not path.is_symlink():
            yield path


def _opened(path: Path) -> Image.Image | None:
    """A drawing as RGBA; None: it cannot be read, or is too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of those that are not decoded
            with Image.open(path) as header:
                too_large = math.prod(header.size) > LARGEST
    except UNREADABLE:
        return None
    try:
        return None if too_large else open_picture(path, "RGBA")
    except InputError:
        return None


def on_white(drawing: Image.Image) -> Image.Image:
    """An RGBA drawing whole, in the middle of a white square of `SIDE` pixels, as RGB."""
    page = Image.new("RGBA", drawing.size, "white")
    page.alpha_composite(drawing)
    return ImageOps.pad(page.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS, color="white")
