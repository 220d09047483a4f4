"""A training's epochs in somebody's tracker, through accelerate's."""

from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.train.log import Epoch, EpochListener
from lowpass.pipeline.train.settings import FinetuneSettings, Tracker

FOLDER = "tracking"  # of a run, for trackers that write files


def tracker(kind: Tracker, directory: Path, settings: FinetuneSettings) -> "Tracked":
    """A tracker with a training's settings.

    Args:
        kind: what tracks.
        directory: the run; its name is the tracker's, and what is written to files goes to `tracking/` in it.
        settings: of the training.

    Raises:
        InputError: it is not installed.
    """
    if kind not in {str(one) for one in get_available_trackers()}:
        raise InputError(f"--track {kind}: it is not installed; pip install {kind}")
    made = LOGGER_TYPE_TO_CLASS[kind]
    place = {"logging_dir": directory / FOLDER} if made.requires_logging_directory else {}
    one = made(directory.absolute().name, **place)
    one.start()
    one.store_init_configuration({name: _plain(value) for name, value in settings.model_dump().items()})
    return Tracked(one)


class Tracked:
    """Tells a tracker of each epoch; `finish` when there are no more."""

    def __init__(self, one: Any) -> None:
        self._one = one

    def __call__(self, epoch: Epoch) -> None:
        """Log an epoch's figures at its number."""
        figures = {name: value for name, value in vars(epoch).items() if name != "epoch" and value is not None}
        self._one.log(figures, step=epoch.epoch)

    def finish(self) -> None:
        """Write what is left."""
        self._one.finish()


def both(first: EpochListener, second: EpochListener) -> EpochListener:
    """Two listeners as one."""

    def listen(epoch: Epoch) -> None:
        first(epoch)
        second(epoch)

    return listen


def _plain(value: object) -> object:
    """What trackers take as a setting."""
    return value if isinstance(value, str | int | float) else str(value)
