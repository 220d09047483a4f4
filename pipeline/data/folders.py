"""Image folders: `train/CLASS/...` beside `val/CLASS/...`, or `CLASS/...` alone, of which a fifth is held out."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger, track
from lowpass.pipeline.data.classes import spelled
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.data.pictures import EXTENSIONS, is_readable, open_picture

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "valid", "validation", "dev", "eval", "test")  # the first that is there
HELD_OUT = 0.2  # of a folder without splits
PROBED = 256  # images opened before anything is run
NO_CLASSES = ("__macosx",)  # folders of archives, in lower case
READING_THREADS = 8


@dataclass(frozen=True)
class Listed:
    """The images of one folder of classes, by plain order of their names: each a path and the name of its class."""

    root: Path
    files: tuple[tuple[Path, str], ...]

    @property
    def classes(self) -> set[str]:
        """Names of the classes that have images."""
        return {name for _, name in self.files}


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Image files with labels, read as they are asked for. One that cannot be read is refused by name; in training
    (`skips`) it is None, which `skipping` leaves out of the batch: nothing takes its place."""

    def __init__(
        self, files: Sequence[tuple[Path, int]], transform: Any, mode: str, exif: bool = False, skips: bool = False
    ) -> None:
        self.files, self.transform, self.mode, self.exif, self.skips = tuple(files), transform, mode, exif, skips

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            return self.transform(open_picture(path, self.mode, self.exif)), label
        except InputError:
            if self.skips:
                return None  # type: ignore[return-value]
            raise


def read_splits(spec: str, mode: str, seed: int, options: DataOptions) -> tuple[Listed, Listed]:
    """The images to train and to test on.

    Raises:
        InputError: there is no such folder, it holds no images or cannot be read, its splits are not understood or hold
            different classes, or one of the images that are opened to see cannot be read.
    """
    try:
        return _read_splits(Path(spec), mode, seed, options)
    except PermissionError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None


def _read_splits(root: Path, mode: str, seed: int, options: DataOptions) -> tuple[Listed, Listed]:
    if not root.is_dir():
        raise InputError(
            f"there is no folder {root}; --data takes 'digits', a folder, hfds/NAME, hfids/NAME or wds/FOLDER"
        )
    folders = _splits(root)
    if folders is None:
        whole = _readable(list_images(root), mode, options)
        if len(whole.files) < 2:
            raise InputError(f"{root} holds a single image; some must be held out for testing")
        return _held_out(whole, seed)
    train, test = (_readable(list_images(folder), mode, options) for folder in folders)
    if test.classes - train.classes:
        odd = sorted(train.classes ^ test.classes)[:3]
        raise InputError(f"{train.root} and {test.root} hold different classes, such as {', '.join(odd)}")
    if untested := sorted(train.classes - test.classes):
        logger.info("%s has no images of %d classes, such as %s", test.root, len(untested), ", ".join(untested[:3]))
    return train, test


def _splits(root: Path) -> tuple[Path, Path] | None:
    """The folders of the two splits; None: the folders are classes.

    Raises:
        InputError: they look like splits, but not like these.
    """
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not _is_hidden(entry.name)]
    by_name: dict[str, list[Path]] = {}
    for folder in folders:
        by_name.setdefault(folder.name.lower(), []).append(folder)
    found = list[Path | None]()
    for names in (TRAIN_NAMES, TEST_NAMES):
        there: list[str] = [name for name in names if name in by_name]
        if there and len(by_name[there[0]]) > 1:
            raise InputError(f"{root} has both {' and '.join(f.name for f in by_name[there[0]])}; leave one")
        found.append(by_name[there[0]][0] if there else None)
    train, test = found
    if train is not None and test is not None:
        return train, test
    own = [folder.name for folder in folders]
    # Vehicles are classes: `train` among several others, and it holds pictures.
    is_class = train is not None and len(own) > 2 and not any(entry.is_dir() for entry in train.iterdir())
    if (train is not None and not is_class) or (own and _are_splits(own)):
        raise InputError(
            f"{root} holds {', '.join(own)}: that looks like splits, of which one must be called train and another "
            f"{', '.join(TEST_NAMES[:-1])} or {TEST_NAMES[-1]}; give the folder of classes itself to have a fifth held "
            "out"
        )
    return None


def _are_splits(names: Sequence[str]) -> bool:
    """Whether each of these names one of a split, such as `training_set` and `test_set`, and no class."""
    words = [set(re.split(r"[^a-z]+", name.lower())) for name in names]
    exact = all(name.lower() in (*TRAIN_NAMES, *TEST_NAMES) for name in names)
    both = all(any(seen.intersection(kind) for seen in words) for kind in (TRAIN_NAMES, (*TEST_NAMES, "testing")))
    return exact or (both and all(seen.intersection((*TRAIN_NAMES, *TEST_NAMES, "testing")) for seen in words))


def list_images(root: Path) -> Listed:
    """Every image below the class folders of `root`; what is passed over is counted and said.

    Raises:
        InputError: there are none, or one lies outside any class folder.
    """
    files: list[tuple[Path, str]] = []
    passed: Counter[str] = Counter()
    for path in _walk(root, frozenset(), passed):
        if path.suffix.lower() not in EXTENSIONS:
            passed[f"*{path.suffix}" if path.suffix else path.name] += 1
            continue
        parts = path.relative_to(root).parts
        if len(parts) == 1:
            raise InputError(f"{path} lies outside any class folder; images belong in {root}/CLASS/")
        files.append((path, spelled(parts[0])))
    if passed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in passed.most_common(5))
        logger.info("%s: passed over %d entries that are no images (%s)", root, sum(passed.values()), kinds)
    if not files:
        raise InputError(f"{root} holds no images in class folders")
    return Listed(root, tuple(sorted(files, key=lambda file: file[0].as_posix())))


def pictures_below(folder: Path) -> list[Path]:
    """Every picture below a folder, known by its extension, in the order of their paths."""
    files = (path for path in _walk(folder, frozenset(), Counter()) if path.suffix.lower() in EXTENSIONS)
    return sorted(files, key=lambda path: path.as_posix())


def _walk(folder: Path, above: frozenset[tuple[int, int]], passed: Counter[str]) -> Iterator[Path]:
    """Files below a folder; links are followed, but never to a folder that they lie in."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        passed["link back"] += 1
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if _is_hidden(entry.name):
            passed["hidden"] += 1
        elif entry.is_dir():
            yield from _walk(Path(entry.path), above | {here}, passed)
        elif entry.is_file():
            yield Path(entry.path)
        else:
            passed["broken link"] += 1


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in NO_CLASSES


def _readable(listed: Listed, mode: str, options: DataOptions) -> Listed:
    """The images that can be read, where others are to be left out; otherwise some are opened to see.

    Raises:
        InputError: one of these cannot be read, or none is left.
    """
    if not options.skip_unreadable:
        for path, _ in listed.files[:: max(1, len(listed.files) // PROBED)]:
            open_picture(path, mode)
        return listed
    with ThreadPoolExecutor(READING_THREADS) as threads:
        sound = threads.map(lambda file: is_readable(file[0], mode), listed.files)
        watched = track(zip(listed.files, sound, strict=True), f"opening {listed.root.name}", len(listed.files))
        kept = [file for file, is_sound in watched if is_sound]
    if left_out := len(listed.files) - len(kept):
        logger.info("%s: left out %d of %d images that cannot be read", listed.root, left_out, len(listed.files))
    if not kept:
        raise InputError(f"{listed.root} holds no image that can be read")
    return Listed(listed.root, tuple(kept))


def _held_out(whole: Listed, seed: int) -> tuple[Listed, Listed]:
    """A fifth of each class, drawn by a hash of each file's name: another file moves none. A class of two or more has
    at least one image on either side."""
    train, test = list[tuple[Path, str]](), list[tuple[Path, str]]()
    for name in sorted(whole.classes):
        files = [file for file in whole.files if file[1] == name]
        drawn = {file: _share(file[0].relative_to(whole.root), seed) for file in files}
        by_share = sorted(files, key=lambda file: drawn[file])
        count = sum(share < HELD_OUT for share in drawn.values())
        count = min(max(count, 1), len(files) - 1)
        test += by_share[:count]
        train += by_share[count:]
    if not test:  # no class has two
        train.sort(key=lambda file: _share(file[0].relative_to(whole.root), seed))
        test.append(train.pop(0))
    return Listed(whole.root, tuple(sorted(train))), Listed(whole.root, tuple(sorted(test)))


def _share(name: Path, seed: int) -> float:
    """A number in [0, 1) that a file's name and the seed alone decide."""
    digest = hashlib.sha256(f"{seed}/{name.as_posix()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
