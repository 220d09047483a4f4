"""Where a training stands, on disk: `training/`, from its first step until its result is in the run.

    training/begun.json                     what was asked for
    training/epoch-0003-step-000120/        accelerate's own: weights, optimiser, moving average; and `progress.json`

A state is written beside, flushed, and then renamed: a kill leaves the one before or the new one, never a part. All
that is drawn is drawn by seed, epoch and step (`data/draws.py`), so that a state needs no generators.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from timm.utils import ModelEmaV3
from torch import Tensor

from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import PART, write_json
from lowpass.pipeline.base.progress import logger

FOLDER, BEGUN, PROGRESS = "training", "begun.json", "progress.json"
DAMAGE = (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError, ValidationError)


class Progress(BaseModel):
    """How far a training is: `step` batches into `epoch`. Of this epoch the sums of losses and of token distances over
    its images, and how many these are; of all, the images that could not be read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    distance: float = 0.0
    images: int = 0
    unreadable: int = 0


class EmaState:
    """A moving average, as accelerate saves what it does not know."""

    def __init__(self, ema: ModelEmaV3) -> None:
        self.ema = ema

    def state_dict(self) -> dict[str, Any]:
        """Its weights."""
        state: dict[str, Any] = self.ema.module.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take weights up."""
        self.ema.module.load_state_dict(state)


class Best:
    """The moving average of the best epoch so far, and its top-1."""

    def __init__(self) -> None:
        self.top1: float | None = None
        self.weights: dict[str, Tensor] = {}

    def consider(self, top1: float, ema: ModelEmaV3) -> None:
        """Keep the average as it is now, if it is better."""
        if self.top1 is None or top1 > self.top1:
            self.top1 = top1
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in ema.module.state_dict().items()}

    def restore(self, ema: ModelEmaV3) -> None:
        """Make the average that of the best epoch, where one was measured."""
        if self.top1 is not None:
            ema.module.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """As accelerate saves it."""
        return {"top1": self.top1, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up."""
        self.top1, self.weights = state["top1"], dict(state["weights"])


class TrainingState:
    """The states of one training below a run's directory."""

    def __init__(self, directory: Path) -> None:
        self.folder = directory / FOLDER

    @property
    def begun(self) -> bool:
        """Whether a training was begun and its result is not in the run yet."""
        return (self.folder / BEGUN).exists()

    def begin(self, asked: BaseModel) -> None:
        """Note what is asked for. Whatever was there goes."""
        self.remove()
        self.folder.mkdir(parents=True)
        write_json(self.folder / BEGUN, asked.model_dump(mode="json"))

    def asked(self) -> bytes:
        """What `begin` was told, as JSON."""
        return (self.folder / BEGUN).read_bytes()

    def remove(self) -> None:
        """The result is in the run: nothing is left to go on with. What says that there is goes first."""
        (self.folder / BEGUN).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, accelerator: Accelerator, progress: Progress) -> None:
        """Save a state; the one before goes once it is whole. Every process calls it.

        Raises:
            RunError: it cannot be written; the one before is as it was.
        """
        final = self.folder / f"epoch-{progress.epoch:04d}-step-{progress.step:06d}"
        part = self.folder / f".{final.name}{PART}"
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(part))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_json(part / PROGRESS, progress.model_dump())
                for file in part.iterdir():
                    _flush(file)
                shutil.rmtree(final, ignore_errors=True)
                part.rename(final)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            there = self.last()
            kept = f"the state in {there} is as it was" if there else "none was saved before"
            raise RunError(f"cannot save the training's state in {self.folder}: {error}; {kept}") from error
        if accelerator.is_main_process:
            for other in self.folder.glob("epoch-*"):
                if other != final:
                    shutil.rmtree(other, ignore_errors=True)

    def last(self) -> Path | None:
        """The folder of the last state."""
        return max(self.folder.glob("epoch-*-step-*"), default=None)

    def load(self, accelerator: Accelerator) -> Progress:
        """Take the last state up, or none if a kill came before the first was saved.

        Raises:
            InputError: it is damaged.
        """
        last = self.last()
        if last is None:
            return Progress()
        try:
            progress = Progress.model_validate_json((last / PROGRESS).read_bytes())
            accelerator.load_state(str(last))
        except DAMAGE as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{last} is damaged ({reason}); `lowpass finetune --restart` begins anew") from error
        logger.info("going on from epoch %d, step %d", progress.epoch, progress.step)
        return progress


def _flush(path: Path) -> None:
    """To the disk itself, so that the rename is not there before what it names."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
