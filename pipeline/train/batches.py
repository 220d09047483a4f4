"""The batches of a training, from wherever it stands to its end."""

from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import skip_first_batches
from torch import Tensor

from lowpass.pipeline.train.log import Clock
from lowpass.pipeline.train.state import Progress

Batch = tuple[Tensor, Tensor] | None  # images [B, C, H, W] and labels; None: none of them can be read


def batches_from(progress: Progress, loader: Any, epochs: int, clock: Clock) -> Iterator[tuple[int, int, Batch, bool]]:
    """Epoch, place in it, the batch, and whether it is the epoch's last.

    Args:
        progress: what has been trained on already is passed over, unread where it can be.
        loader: accelerate's, of a data set that is told the epoch: it draws by that.
        epochs: in all.
        clock: times the waiting.
    """
    images = loader.dataset
    for epoch in range(progress.epoch, epochs):
        first = progress.step if epoch == progress.epoch else 0
        images.set_epoch(epoch)
        loader.set_epoch(epoch)
        rest = skip_first_batches(loader, first) if first else loader
        for index, batch in enumerate(clock.waiting(rest), first):
            yield epoch, index, batch, rest.end_of_dataloader
