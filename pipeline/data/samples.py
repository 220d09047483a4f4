"""Pictures that lie within other files, each with the number of its class: rows of a table, members of a shard."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.pictures import read_picture


class Sample(Protocol):
    """A picture with the number of its class, not decoded yet."""

    @property
    def name(self) -> str:
        """Where it lies, for messages."""

    def read(self) -> tuple[bytes, int]:
        """The picture's file and the class number."""


@dataclass(frozen=True)
class Held:
    """A sample in memory."""

    name: str
    content: bytes
    number: int

    def read(self) -> tuple[bytes, int]:
        """The picture's file and the class number."""
        return self.content, self.number


@dataclass(frozen=True)
class Reading:
    """How a sample becomes an image [C, H, W] and a label.

    `labels`: the label of each class number. `skips`: one that cannot be read is None, which `skipping` leaves out of
    the batch.
    """

    transform: Any
    mode: str
    exif: bool
    labels: Sequence[int]
    skips: bool

    def image(self, sample: Sample) -> tuple[Tensor, int]:
        """The image and its label.

        Raises:
            InputError: it cannot be read, or has a class that there is not; the message names it.
        """
        content, number = sample.read()
        if not 0 <= number < len(self.labels):
            raise InputError(
                f"{sample.name} has the class number {number}, but there are {len(self.labels)} classes, 0 and up; "
                "give the data the model was trained on"
            )
        try:
            picture = read_picture(BytesIO(content), sample.name, self.mode, self.exif)
        except InputError:
            if self.skips:
                return None  # type: ignore[return-value]
            raise
        return self.transform(picture), self.labels[number]


class IndexedImages(Dataset[tuple[Tensor, int]]):
    """The images of samples that can be had in any order."""

    def __init__(self, samples: Sequence[Sample], reading: Reading) -> None:
        self.samples, self.reading = samples, reading

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.reading.image(self.samples[index])
