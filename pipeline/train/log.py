"""What a training was like, epoch by epoch: `training.csv` of a run, to be plotted."""

import csv
import io
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from lowpass.pipeline.base.files import write_text
from lowpass.pipeline.base.progress import logger

TRAINING_FILE = "training.csv"
LINE_EVERY_S = 30.0  # at most, however short epochs are
T = TypeVar("T")


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean loss of its images, learning rate at its end (of the head: lower layers learn more slowly),
    images trained on, seconds since it began or was taken up, the share of them spent waiting for images, top-1
    (percent) on held-in images, where it was measured, and the mean distance of tokens from the dense model's
    (`token_distance`), where they are distilled."""

    epoch: int
    loss: float
    lr: float
    images: int
    seconds: float
    images_per_s: float
    reading_share: float
    top1: float | None = None
    token_distance: float | None = None


EpochListener = Callable[[Epoch], None]


class Clock:
    """Times of one training."""

    def __init__(self) -> None:
        self.saved = self.began = time.monotonic()
        self.reading = 0.0
        self.images = 0  # trained on since `began`

    def start_epoch(self) -> None:
        """An epoch begins, and a state has just been saved."""
        self.saved = self.began = time.monotonic()
        self.reading, self.images = 0.0, 0

    def minutes_since_saved(self) -> float:
        """Since the last state was saved."""
        return (time.monotonic() - self.saved) / 60

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, timed as they are waited for."""
        iterator, nothing = iter(items), object()
        while True:
            before = time.monotonic()
            item = next(iterator, nothing)
            self.reading += time.monotonic() - before
            if item is nothing:
                return
            yield item  # type: ignore[misc]

    def epoch(
        self,
        number: int,
        loss: float,
        images: float,
        lr: float,
        processes: int,
        top1: float | None,
        distance: float | None,
    ) -> Epoch:
        """Its row. `loss` and `distance`: sums over its `images`, of all processes."""
        seconds = time.monotonic() - self.began
        share = 1 / images if images else float("nan")
        apart = None if distance is None else share * distance
        rate = processes * self.images / seconds
        return Epoch(number, share * loss, lr, round(images), seconds, rate, self.reading / seconds, top1, apart)


class TrainingLog:
    """`training.csv`, a row an epoch; and a line of the log now and then."""

    def __init__(self, directory: Path, epochs: int) -> None:
        self.path, self.epochs, self.told = directory / TRAINING_FILE, epochs, time.monotonic()

    def __call__(self, epoch: Epoch) -> None:
        """Note an epoch. Rows of later ones are of a training before this, or of what a kill undid."""
        rows = csv.DictReader(io.StringIO(self.path.read_text())) if self.path.exists() else []
        kept = [row for row in rows if int(row["epoch"]) < epoch.epoch]
        text = io.StringIO()
        table = csv.DictWriter(text, [field.name for field in fields(Epoch)], lineterminator="\n")
        table.writeheader()
        table.writerows([*kept, asdict(epoch)])
        write_text(self.path, text.getvalue())
        last = epoch.epoch + 1 == self.epochs
        if last or time.monotonic() - self.told >= LINE_EVERY_S:
            self.told = time.monotonic()
            logger.info(
                "epoch %d of %d: loss %.4f, %.0f images/s, %.0f%% of the time waiting for images",
                epoch.epoch + 1,
                self.epochs,
                epoch.loss,
                epoch.images_per_s,
                100 * epoch.reading_share,
            )
