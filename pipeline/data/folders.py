"""Image folders in the ImageNet layout, read by timm."""

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lowpass.pipeline.base.errors import InputError

TEST_FOLDERS = ("val", "validation", "test")
HELD_OUT = 0.2  # of a folder without a train/val split
PROBED = 256  # images opened before anything is run
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises


@dataclass(frozen=True)
class Split:
    """Images to train on (augmented), the same ones plain, those to test on, and the classes in the order of labels."""

    train: Dataset[tuple[Tensor, int]]
    calibration: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]


class FolderImages(Dataset[tuple[Tensor, int]]):
    """timm's list of the images below `root` and of their classes. An image that cannot be read is refused by name:
    timm's own data set puts its neighbour in its place, without a word."""

    def __init__(self, root: Path, transform: Any, mode: str) -> None:
        """List the images, and open some of them.

        Raises:
            InputError: there are none in class folders, or one of them cannot be read.
        """
        try:
            listed: Any = create_dataset("", str(root), search_split=False, input_img_mode=mode)
        except (RuntimeError, OSError) as error:
            raise InputError(f"{root} holds no images in class folders ({error})") from None
        self.transform, self.mode = transform, mode
        self.names = [Path(name) for name in listed.filenames(absolute=True)]
        self.labels = [label for _, label in listed.reader.samples]
        index: dict[str, int] = listed.reader.class_to_idx
        self.classes = tuple(sorted(index, key=lambda name: index[name]))
        loose = [name for name in self.names if name.parent in (root.absolute(), root)]
        if loose:
            raise InputError(f"{loose[0]} lies outside any class folder; images belong in {root}/CLASS/")
        if not self.names:
            raise InputError(f"{root} holds no images in class folders")
        for name in self.names[:: max(1, len(self.names) // PROBED)]:
            self._open(name)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self._open(self.names[index])), self.labels[index]

    def _open(self, name: Path) -> Image.Image:
        try:
            with Image.open(name) as image:
                return image.convert(self.mode)
        except UNREADABLE as error:
            raise InputError(f"cannot read the image {name}: {error}; mend it or take it away") from None


def read_folders(spec: str, augment: Any, plain: Any, mode: str, seed: int) -> Split:
    """`train/CLASS/...` and `val/CLASS/...`, or `CLASS/...` alone, of which a fifth is held out by `seed`.

    Raises:
        InputError: there is no such folder, it holds no images, or its two splits hold different classes.
    """
    root = Path(spec)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; --data takes 'digits', a folder or a timm reader like hfds/NAME")
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test_root is not None:
        train = FolderImages(root / "train", augment, mode)
        test = FolderImages(test_root, plain, mode)
        if sorted(train.classes) != sorted(test.classes):
            odd = sorted(set(train.classes) ^ set(test.classes))[:3]
            raise InputError(f"{root / 'train'} and {test_root} hold different classes, such as {', '.join(odd)}")
        return Split(train, FolderImages(root / "train", plain, mode), test, train.classes)
    whole, whole_plain = FolderImages(root, augment, mode), FolderImages(root, plain, mode)
    order = torch.randperm(len(cast(Sized, whole)), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, round(HELD_OUT * len(order)))
    if held_out == len(order):
        raise InputError(f"{root} holds a single image; some must be held out for testing")
    test_part, rest = Subset(whole_plain, order[:held_out]), order[held_out:]
    return Split(Subset(whole, rest), Subset(whole_plain, rest), test_part, whole.classes)
