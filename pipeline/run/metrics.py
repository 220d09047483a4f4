"""What a run has come to: `metrics.json`."""

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_json
from lowpass.pipeline.model.slim_vit import WEIGHTS_FILE, SlimViT

METRICS_FILE = "metrics.json"


class Figures(BaseModel):
    """One model: top-1 on the test split in percent (None: no data), MACs of an image, parameters, bytes of weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    top1: float | None
    macs: int
    parameters: int
    bytes: int


class Metrics(BaseModel):
    """What a run has come to. `pruned_top1` is the slim model's before any fine-tuning, `data` the images that every
    top-1 here was measured on, `test_images` how many these are (None: none, or a run of before they were counted)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense: Figures
    slim: Figures
    pruned_top1: float | None
    finetuned_epochs: int = 0
    data: str | None = None
    test_images: int | None = None

    @classmethod
    def load(cls, directory: Path) -> "Metrics":
        """The metrics of a finished run.

        Raises:
            InputError: they are missing or malformed.
        """
        path = directory / METRICS_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; is {directory} a finished run?") from None
        except ValidationError:
            raise InputError(f"{path} is damaged; run `lowpass evaluate {directory}` to measure anew") from None

    def save(self, directory: Path) -> None:
        """Write `metrics.json`."""
        write_json(directory / METRICS_FILE, self.model_dump(mode="json"))


def count_parameters(model: torch.nn.Module) -> int:
    """Trained numbers in a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def slim_figures(slim: SlimViT, accuracy: float | None, directory: Path) -> Figures:
    """The figures of a slim model as it lies in `directory`."""
    return Figures(
        top1=accuracy,
        macs=slim.architecture.macs(),
        parameters=count_parameters(slim),
        bytes=(directory / WEIGHTS_FILE).stat().st_size,
    )
