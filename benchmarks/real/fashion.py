"""Fashion-MNIST (Xiao et al., 2017; MIT) as image folders: 28x28 grey pictures of ten kinds of clothing."""

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import track

FOLDER = Path("usr/share/datasets/fashion-mnist")
SPLITS = {"train": "train", "val": "t10k"}  # of an image folder -> of the files
# By the numbers of the labels, as the authors call them; no slash, for they are folders.
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
UNSIGNED_BYTES = 0x08  # the one type of IDX files that is read


def write_fashion(tree: Path, out: Path, most: dict[str, int | None]) -> dict[str, int]:
    """Write `out`/train/CLASS/NUMBER.png and `out`/val/CLASS/NUMBER.png.

    Args:
        tree: where the package was unpacked.
        out: an empty folder.
        most: split -> pictures of each class, the first in the files; None: all.

    Returns:
        Split -> how many pictures there are.

    Raises:
        InputError: the files are missing or no IDX files of pictures and labels.
    """
    counts = {}
    for split, prefix in SPLITS.items():
        pictures = read_idx(tree / FOLDER / f"{prefix}-images-idx3-ubyte.gz", 3)
        labels = read_idx(tree / FOLDER / f"{prefix}-labels-idx1-ubyte.gz", 1)
        if len(pictures) != len(labels) or labels.max(initial=0) >= len(CLASSES):
            raise InputError(f"{tree / FOLDER}: the labels of {prefix} do not belong to its pictures")
        chosen = {number: np.flatnonzero(labels == number)[: most[split]] for number in range(len(CLASSES))}
        counts[split] = sum(map(len, chosen.values()))
        for number, rows in track(chosen.items(), f"writing {split}", len(chosen)):
            folder = out / split / CLASSES[number]
            folder.mkdir(parents=True)
            for row in rows:
                Image.fromarray(pictures[row]).save(folder / f"{row:05}.png")
    return counts


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """A gzipped IDX file of bytes: two of zero, the type, the number of dimensions, each one's size, the values.

    Raises:
        InputError: it is missing, truncated or of another kind.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}; remove the folder of the package to unpack it anew") from None
    start = 4 + 4 * dimensions
    if content[:4] == bytes([0, 0, UNSIGNED_BYTES, dimensions]) and len(content) >= start:
        shape = struct.unpack(f">{dimensions}I", content[4:start])
        values = np.frombuffer(content, np.uint8, offset=start)
        if values.size == np.prod(shape):
            return values.reshape(shape)
    raise InputError(f"{path} is no whole IDX file of bytes in {dimensions} dimensions")
