"""Data sets of Hugging Face's `datasets` library: `hfds/NAME`, or `hfds/FOLDER` for one saved to disk."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowpass.pipeline.base.errors import InputError, first_line
from lowpass.pipeline.data.classes import spelled
from lowpass.pipeline.data.folders import HELD_OUT, TEST_NAMES, TRAIN_NAMES
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.data.samples import Held, Sample

SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
LABELS = ("label", "labels", "target", "fine_label", "class")


class Rows(Sequence[Sample]):
    """Rows of a table whose pictures are left as files."""

    def __init__(self, name: str, table: Any, keys: tuple[str, str]) -> None:
        self.name, self.table, self.keys = name, table, keys

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        image_key, label_key = self.keys
        row = self.table[int(index)]
        return held(f"image {index} of {self.name}", row[image_key], row[label_key])


def held(name: str, picture: Any, number: Any) -> Held:
    """A row as a sample.

    Args:
        name: for messages.
        picture: a table of `bytes`, or the `path` they lie at.
        number: of its class.

    Raises:
        InputError: there is no picture, its file cannot be read, or the class is no number.
    """
    if isinstance(number, str):
        raise InputError(
            f"{name} has no class number but {number!r}; name its column with --target-key, or number the names by "
            "datasets' class_encode_column"
        )
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError(f"{name} has no class number but {number!r}; name its column with --target-key")
    content, path = (picture.get(key) if isinstance(picture, dict) else None for key in ("bytes", "path"))
    if content is None and path is None:
        raise InputError(f"{name} has no picture; name its column with --input-key")
    try:
        if content is None:
            with importlib.import_module("fsspec").open(path, "rb") as file:
                content = file.read()
    except OSError as error:
        raise InputError(f"cannot read {name}, {path}: {first_line(error)}") from None
    return Held(name, content, number)


def read_tables(spec: str, options: DataOptions, seed: int) -> tuple[Rows, Rows, tuple[str, ...] | None]:
    """The rows to train and to test on, and the names of the classes by number, if anybody says.

    Raises:
        InputError: the library is missing, or there is no such data set, split or column.
    """
    datasets, name = library(spec), spec.partition("/")[2]
    try:
        whole = datasets.load_from_disk(name) if is_saved(name) else datasets.load_dataset(name)
    except Exception as error:  # whatever a third party's reader raises: the spec is the user's
        raise InputError(f"datasets cannot read {name}: {first_line(error)}") from None
    if not isinstance(whole, dict):
        whole = {"train": whole}
    train_name, test_name = split_names(spec, whole)
    train = whole[train_name]
    keys = columns(spec, train, options)
    if test_name is None:
        parts = train.train_test_split(HELD_OUT, seed=seed)
        train, test = parts["train"], parts["test"]
    else:
        test = whole[test_name]
    as_files = datasets.Image(decode=False)  # `datasets` would turn pictures as their cameras were held
    rows = [
        Rows(f"{spec} ({name})", table.cast_column(keys[0], as_files), keys)
        for name, table in ((train_name, train), (test_name or "held out", test))
    ]
    return rows[0], rows[1], agreed_names(spec, train, test, keys[1])


def library(spec: str) -> Any:
    """Hugging Face's `datasets`.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise InputError(f"{spec} needs the package datasets; pip install 'lowpass-vit[data]'") from None


def is_saved(name: str) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((Path(name) / file).exists() for file in SAVED)


def split_names(spec: str, splits: Mapping[str, Any]) -> tuple[str, str | None]:
    """What the splits to train and to test on are called.

    Raises:
        InputError: there is none to train on.
    """
    train = next((split for split in TRAIN_NAMES if split in splits), None)
    if train is None:
        raise InputError(f"{spec} has no split {TRAIN_NAMES[0]!r}; it has {', '.join(splits)}")
    return train, next((split for split in TEST_NAMES if split in splits), None)


def columns(spec: str, table: Any, options: DataOptions) -> tuple[str, str]:
    """The columns of pictures and of class numbers.

    Raises:
        InputError: nobody can tell which they are.
    """
    image_key = _column(spec, table, options.input_key, "--input-key", "Image", ())
    label_key = _column(spec, table, options.target_key, "--target-key", "ClassLabel", LABELS)
    if image_key == label_key:
        raise InputError(f"{spec}: {image_key} holds either pictures or classes; mend --input-key or --target-key")
    return image_key, label_key


def class_names(table: Any, label_key: str) -> tuple[str, ...] | None:
    """By number; None: the column is of plain numbers."""
    names = getattr(table.features[label_key], "names", None)
    return None if names is None else tuple(map(spelled, names))


def agreed_names(spec: str, train: Any, test: Any, label_key: str) -> tuple[str, ...] | None:
    """The names of the classes by number, of both splits; None: the columns are of plain numbers.

    Raises:
        InputError: a number is one class in the one split, and another in the other.
    """
    names, tested = (class_names(table, label_key) for table in (train, test))
    for number, (one, other) in enumerate(zip(names or (), tested or (), strict=False)):
        if one != other:
            raise InputError(
                f"{spec} numbers its classes in two ways: {number} is {one} to train on, and {other} to test on; cast "
                f"{label_key} of both to one ClassLabel"
            )
    return names


def _column(spec: str, table: Any, asked: str | None, option: str, kind: str, usual: tuple[str, ...]) -> str:
    """The column asked for, or else the only one of a kind, or one that is usually called so."""
    names = list(table.features)
    if asked is not None:
        if asked not in names:
            raise InputError(f"{spec} has no column {asked!r} ({option}); it has {', '.join(names)}")
        return asked
    of_kind = [name for name in names if type(table.features[name]).__name__ == kind]
    found = of_kind or [name for name in usual if name in names]
    if len(of_kind) > 1 or not found:
        raise InputError(f"{spec} has the columns {', '.join(names)}; name one with {option}")
    return found[0]
