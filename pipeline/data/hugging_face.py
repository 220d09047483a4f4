"""Data sets of Hugging Face's `datasets` library: `hfds/NAME`, or `hfds/FOLDER` for one saved to disk."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.folders import HELD_OUT, TEST_NAMES, TRAIN_NAMES
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.data.pictures import UNREADABLE, as_mode

SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
LABELS = ("label", "labels", "target", "fine_label", "class")


class TableImages(Dataset[tuple[Tensor, int]]):
    """Rows of a table of pictures and class numbers, through a transform."""

    def __init__(
        self,
        table: Any,
        keys: tuple[str, str],
        labels: Sequence[int] | None,
        transform: Any,
        mode: str,
        name: str,
        skips: bool = False,
    ) -> None:
        """`labels`: the label of each of the data's class numbers; None: they are the labels."""
        self.table, self.keys, self.labels, self.transform = table, keys, labels, transform
        self.mode, self.name, self.skips = mode, name, skips

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image_key, label_key = self.keys
        try:
            row = self.table[index]
            image = as_mode(row[image_key], self.mode)
        except UNREADABLE as error:
            if self.skips:
                return None  # type: ignore[return-value]
            raise InputError(f"cannot read image {index} of {self.name}: {error}") from None
        label = int(row[label_key])
        return self.transform(image), label if self.labels is None else self.labels[label]


def read_tables(spec: str, options: DataOptions, seed: int) -> tuple[Any, Any, tuple[str, str], tuple[str, ...] | None]:
    """The tables to train and to test on, the columns of pictures and classes, and the names of the classes, if any.

    Raises:
        InputError: the library is missing, or there is no such data set, split or column.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise InputError(f"{spec} needs the package datasets; pip install 'lowpass-vit[data]'") from None
    name = spec.partition("/")[2]
    try:
        if any((Path(name) / file).exists() for file in SAVED):
            whole = datasets.load_from_disk(name)
        else:
            whole = datasets.load_dataset(name)
    except Exception as error:  # whatever a third party's reader raises: the spec is the user's
        raise InputError(f"datasets cannot read {name}: {_first_line(error)}") from None
    if not isinstance(whole, dict):
        whole = {"train": whole}
    train = next((whole[split] for split in TRAIN_NAMES if split in whole), None)
    test = next((whole[split] for split in TEST_NAMES if split in whole), None)
    if train is None:
        raise InputError(f"{spec} has no split {TRAIN_NAMES[0]!r}; it has {', '.join(whole)}")
    keys = (
        _column(spec, train, options.input_key, "--input-key", "Image", ()),
        _column(spec, train, options.target_key, "--target-key", "ClassLabel", LABELS),
    )
    if test is None:
        parts = train.train_test_split(HELD_OUT, seed=seed)
        train, test = parts["train"], parts["test"]
    names = getattr(train.features[keys[1]], "names", None)
    return train, test, keys, None if names is None else tuple(names)


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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
