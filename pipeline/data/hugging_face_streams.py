"""Streams of Hugging Face's `datasets` library: `hfids/NAME`, or `hfids/FOLDER` of files or of one saved to disk.

What `hfds/` reads, but nothing is converted or copied first: files are read from one end to the other.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lowpass.pipeline.base.errors import InputError, first_line
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.data.hugging_face import (
    agreed_names,
    columns,
    held,
    is_saved,
    library,
    split_names,
)
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.data.samples import Held

AT_ONCE = 16  # rows
SAVED_SHARDS = 64  # that one saved to disk is read as


@dataclass(frozen=True)
class HubStream:
    """One split: an `IterableDataset` whose pictures are left as files, and the Parquet files it is read from, if it
    is."""

    name: str
    stream: Any
    keys: tuple[str, str]
    parquet: tuple[str, ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows in each shard: as the Parquet files say, or counted."""
        count = self.stream.num_shards
        if len(self.parquet) == count:
            return tuple(map(_rows, self.parquet))
        labels = self.stream.select_columns([self.keys[1]])
        return tuple(
            sum(len(rows[self.keys[1]]) for rows in _read(labels, shard, self.name))
            for shard in track(range(count), f"counting {self.name}")
        )

    def samples(self, shard: int) -> Iterator[Held]:
        """Those of one shard, in the order in which they lie.

        Raises:
            InputError: `datasets` cannot read them, or a class is no number.
        """
        image_key, label_key = self.keys
        place = sum(self.lengths[:shard])
        for rows in _read(self.stream, shard, self.name):
            for picture, number in zip(rows[image_key], rows[label_key], strict=True):
                yield held(f"image {place} of {self.name}", picture, number)
                place += 1
        if place != sum(self.lengths[: shard + 1]):
            raise InputError(f"{self.name} holds other images than a moment ago: {place} up to shard {shard}")


def _rows(path: str) -> int:
    """Of a Parquet file, as its last bytes say."""
    try:
        with importlib.import_module("fsspec").open(path, "rb") as file:
            return importlib.import_module("pyarrow.parquet").ParquetFile(file).metadata.num_rows
    except (OSError, ValueError) as error:  # pyarrow's are among them
        raise InputError(f"datasets cannot read {path}: {first_line(error)}; copy it anew") from None


def _read(stream: Any, shard: int, name: str) -> Iterator[Any]:
    """Rows of one shard. `iter`, unlike a plain loop, does not share them out among a loader's processes, some of which
    it would leave without any."""
    rows = stream.shard(stream.num_shards, shard).iter(AT_ONCE)
    while True:
        try:
            some = next(rows, None)
        except Exception as error:  # whatever a third party's reader raises
            raise InputError(f"datasets cannot read {name}: {first_line(error)}") from None
        if some is None:
            return
        yield some


def read_streams(spec: str, options: DataOptions) -> tuple[HubStream, HubStream, tuple[str, ...] | None]:
    """The streams to train and to test on, and the names of the classes by number, if anybody says.

    Raises:
        InputError: the library is missing, or there is no such data set, split or column.
    """
    datasets, name = library(spec), spec.partition("/")[2]
    parquet: dict[str, tuple[str, ...]] = {}
    try:
        if is_saved(name):
            whole = datasets.load_from_disk(name)
            if isinstance(whole, dict):
                shards = {split: max(1, min(SAVED_SHARDS, len(table))) for split, table in whole.items()}
                whole = {split: table.to_iterable_dataset(shards[split]) for split, table in whole.items()}
        else:
            whole = datasets.load_dataset(name, streaming=True)
            files = datasets.load_dataset_builder(name).config.data_files or {}
            parquet = {split: tuple(map(str, paths)) for split, paths in files.items()}
    except Exception as error:  # whatever a third party's reader raises: the spec is the user's
        raise InputError(f"datasets cannot read {name}: {first_line(error)}") from None
    train, test = split_names(spec, whole if isinstance(whole, dict) else {"train": whole})
    if test is None:
        raise InputError(
            f"{spec} has no split to test on, such as 'validation' or 'test', and none can be drawn from a stream; "
            f"hfds/{name} holds a fifth out"
        )
    if not whole[train].features:
        raise InputError(f"{spec} does not say what its columns hold; read it as hfds/{name}")
    keys = columns(spec, whole[train], options)

    def split(which: str) -> HubStream:
        stream = whole[which].select_columns(list(keys)).cast_column(keys[0], datasets.Image(decode=False))
        files = parquet.get(which, ())
        return HubStream(f"{spec} ({which})", stream, keys, files if _are_parquet(files) else ())

    return split(train), split(test), agreed_names(spec, whole[train], whole[test], keys[1])


def _are_parquet(files: tuple[str, ...]) -> bool:
    return all(file.endswith(".parquet") for file in files)
