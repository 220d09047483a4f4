"""Data sets that are read from one end to the other, in shards: `wds/` and `hfids/`.

A whole split is streamed: no list of its images is kept. In a measured split images come in the order in which they
lie, each once, in the same batches whatever the number of processes. In training the shards are shuffled, and a buffer
of images behind them. Where some images are drawn (to score, to measure, to verify), they are drawn as from any data
set, and one pass finds them.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lowpass.pipeline.base.progress import track
from lowpass.pipeline.data.draws import drawn_by
from lowpass.pipeline.data.samples import Held, IndexedImages, Reading, Sample

BUFFER = 1000  # images, as their files, that a process shuffles in training


class Source(Protocol):
    """A split in shards. `lengths`: samples in each."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Samples in each shard."""

    def samples(self, shard: int) -> Iterator[Sample]:
        """Those of one shard, in the order in which they lie. Raises InputError where they are not `lengths` many."""


class StreamImages(IterableDataset[tuple[Tensor, int]]):
    """A split as it lies, each image once."""

    def __init__(self, source: Source, reading: Reading, batch_size: int = 1) -> None:
        """`batch_size`: of the loader that reads it."""
        self.source, self.reading, self.batch_size = source, reading, batch_size

    def __len__(self) -> int:
        return sum(self.source.lengths)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        # A loader takes a batch of each process in turn: with every nth batch in each, batches come in order.
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        samples = (sample for shard in range(len(self.source.lengths)) for sample in self.source.samples(shard))
        for place, sample in enumerate(samples):
            if place // self.batch_size % every == first:
                yield self.reading.image(sample)

    def in_batches(self, batch_size: int) -> "StreamImages":
        """The same, for a loader of such batches."""
        return StreamImages(self.source, self.reading, batch_size)

    def drawn(self, places: Sequence[int]) -> IndexedImages:
        """The images at some places, in that order, found in one pass over the shards that hold any."""
        wanted, found, start = set(places), dict[int, Sample](), 0
        for shard, length in track(list(enumerate(self.source.lengths)), f"drawing from {self.source.name}"):
            if not wanted.isdisjoint(range(start, start + length)):
                for place, sample in enumerate(self.source.samples(shard), start):
                    if place in wanted:
                        found[place] = sample
            start += length
        return IndexedImages([found[place] for place in places], self.reading)


class ShuffledImages(IterableDataset[tuple[Tensor, int]]):
    """A split in another order each epoch, which the seed draws: that of the shards, which the processes share among
    them, and in each process that of what a buffer holds; and what augmentation draws (see `draws.py`)."""

    def __init__(self, source: Source, reading: Reading, seed: int = 0) -> None:
        self.source, self.reading, self.seed, self.epoch = source, reading, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Before each pass; processes that read get it with the data set."""
        self.epoch = epoch

    def seeded(self, seed: int) -> "ShuffledImages":
        """The same, drawn by another seed."""
        return ShuffledImages(self.source, self.reading, seed)

    def __len__(self) -> int:
        return sum(self.source.lengths)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for place, sample in enumerate(self._shuffled(first, every)):
            with drawn_by(self.seed, self.epoch, first, place):
                image = self.reading.image(sample)
            yield image

    def _shuffled(self, first: int, every: int) -> Iterator[Sample]:
        shards = list(range(len(self.source.lengths)))
        random.Random(f"{self.seed} {self.epoch}").shuffle(shards)  # noqa: S311 - an order, no secret
        draw = random.Random(f"{self.seed} {self.epoch} {first}")  # noqa: S311
        buffer: list[Sample] = []
        for shard in shards[first::every]:
            for sample in self.source.samples(shard):
                # Read as it comes, from one end of the shard to the other: disks and networks are fast that way alone.
                buffer.append(Held(sample.name, *sample.read()))
                if len(buffer) == BUFFER:
                    place = draw.randrange(BUFFER)
                    buffer[place], buffer[-1] = buffer[-1], buffer[place]
                    yield buffer.pop()
        draw.shuffle(buffer)
        yield from buffer
