"""How fine-tuning is done."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowpass.pipeline.base.errors import InputError, first_problem
from lowpass.pipeline.method.block_shape import Positive

MixedPrecision = Literal["no", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]


class FinetuneSettings(BaseModel):
    """Distillation after the search. Defaults are for ImageNet, after the paper."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Positive = 150
    batch_size: Positive = 128
    lr: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="learning rate at 512 images a step; scaled linearly")
    ] = 1e-4
    distill_weight: Annotated[float, Field(ge=0, le=1)] = 0.25
    token_distillation: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="weight of the distance from the dense model's last tokens")
    ] = 0.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9998
    effective_batch: Positive | None = Field(
        None, description="images that a step learns from, gradients of several batches summed; None: a batch"
    )
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_path: Annotated[float, Field(ge=0, lt=1, description="stochastic depth, of the last block")] = 0.0
    teacher: str | None = Field(None, description="whose answers are distilled; None: the dense model's")
    teacher_weights: Path | None = None
    keep_best: Positive | None = Field(
        None, description="every so many epochs measure top-1 on held-in images, and keep the best; None: the last"
    )
    mixed_precision: MixedPrecision | None = Field(
        None, description="no, bf16 or fp16; None: bf16 on a GPU that has it, otherwise no"
    )

    @model_validator(mode="after")
    def _of_one_teacher(self) -> Self:
        if self.teacher_weights is not None and self.teacher is None:
            raise ValueError("teacher_weights are of a teacher: name it with --teacher")
        if self.token_distillation and self.teacher is not None:
            raise ValueError(
                f"token_distillation {self.token_distillation:g} is of the dense model's own tokens, and the teacher "
                f"{self.teacher} has others; leave one of them out"
            )
        return self

    @property
    def distils(self) -> bool:
        """Whether a teacher sees the images, too."""
        return bool(self.distill_weight or self.token_distillation)

    @classmethod
    def for_digits(cls) -> Self:
        """A minute or two on two cores."""
        return cls(epochs=40, batch_size=64, lr=4e-3, ema_decay=0.99)


def finetune_settings(data: str, changes: dict[str, Any], given: FinetuneSettings | None = None) -> FinetuneSettings:
    """A recipe's settings, or else those that suit a data set, with changes.

    Raises:
        InputError: one of them is out of range.
    """
    defaults = given or (FinetuneSettings.for_digits() if data == "digits" else FinetuneSettings())
    try:
        return FinetuneSettings.model_validate(defaults.model_dump() | changes)
    except ValidationError as error:
        raise InputError(f"fine-tuning: {first_problem(error)}") from None
