"""Everything a run can be told, typed and validated; saved beside its result as `recipe.yaml`."""

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_text
from lowpass.pipeline.method.energy import EnergyNorm, TokenCriterion
from lowpass.pipeline.method.sensitivity import ChannelCriterion
from lowpass.pipeline.model.architecture import first_problem
from lowpass.pipeline.search.shaping import AS_PUBLISHED, SHAPINGS, Prune, Shaping, Target

RECIPE_FILE = "recipe.yaml"
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class FinetuneSettings(BaseModel):
    """Distillation after the search. Defaults are for ImageNet, after the paper."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Count = 150
    batch_size: Count = 128
    lr: Annotated[float, Field(gt=0, description="learning rate at 512 images a step; scaled linearly")] = 1e-4
    distill_weight: Annotated[float, Field(ge=0, le=1)] = 0.25
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9998

    @classmethod
    def for_digits(cls) -> Self:
        """A minute or two on two cores."""
        return cls(epochs=40, batch_size=64, lr=4e-3, ema_decay=0.99)


class Recipe(BaseModel):
    """One compression. Exactly one of `target_macs`, `target_latency`, `allowable_drop` and `architecture` says how far
    to go; a run that `lowpass import-vtc` made has `released`, the checkpoint it was made from, instead."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    weights: Path | None = None
    random_weights: bool = False
    data: str | None = None
    target_macs: Fraction | None = None
    allowable_drop: Annotated[float, Field(gt=0, le=100)] | None = None
    target_latency: Annotated[float, Field(gt=0, description="milliseconds of one batch")] | None = None
    runtime: str | None = None
    latency_batch: Count = 1
    latency_precision: str | None = None
    architecture: Path | None = None
    released: Path | None = None
    image_cutoff: Annotated[float, Field(gt=0)] = 0.1
    token_cutoff: Fraction = 0.85
    energy_norm: EnergyNorm = "l2"
    channel_criterion: ChannelCriterion = "lfs"
    token_criterion: TokenCriterion = "lfe-attention"
    order: Literal["bottom-up", "top-down", "one-shot"] = "bottom-up"
    prune: Prune = "both"
    lfs_weight: Annotated[float, Field(ge=0, le=1)] = 0.1
    token_share: Annotated[float, Field(ge=0, le=1)] = 0.56
    shaping: Shaping = SHAPINGS["tensorrt"]
    score_images: Count = 2000
    measure_images: Count = 5000
    batch_size: Count = 64
    recovery: bool = True
    mixed_precision: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    finetune: FinetuneSettings | None = None  # None: what suits the data

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if self.released is not None:
            return self
        goals = [
            goal is not None for goal in (self.target_macs, self.target_latency, self.allowable_drop, self.architecture)
        ]
        if sum(goals) != 1:
            raise ValueError("give exactly one of --target-macs, --target-latency, --allowable-drop and --architecture")
        if (self.target_latency is None) != (self.runtime is None):
            raise ValueError("--target-latency MS and --runtime NAME go together: milliseconds on which runtime?")
        if self.order != "bottom-up" and self.allowable_drop is not None:
            raise ValueError(f"--order {self.order} goes with a target or a table: what is allowed is spent bottom-up")
        if self.data is None and not self.random_weights:
            raise ValueError("give --data: 'digits', an image folder, or a timm reader like hfds/NAME")
        if self.random_weights and self.architecture is None:
            raise ValueError("random weights have no accuracy to search by; give --architecture FILE")
        return self

    def save(self, directory: Path) -> None:
        """Write `recipe.yaml`."""
        write_text(directory / RECIPE_FILE, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    @classmethod
    def load(cls, directory: Path) -> "Recipe":
        """The recipe of a run.

        Raises:
            InputError: it is missing or malformed.
        """
        path = directory / RECIPE_FILE
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; is {directory} a run directory?") from None
        except (ValidationError, yaml.YAMLError) as error:
            reason = first_problem(error) if isinstance(error, ValidationError) else "not YAML"
            raise InputError(f"{path} is not a recipe: {reason}") from None


def read_recipe(path: Path, **given: object) -> Recipe:
    """A recipe file, with options in place of what it says; None changes nothing.

    Raises:
        InputError: it is missing or malformed; the message names the file and the field.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"{path} is not a recipe: not YAML") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a recipe: it should be a table of settings")
    if content.get("released"):
        raise InputError(f"{path} is of an imported run, which `lowpass import-vtc` makes")
    try:
        return Recipe.model_validate(content | {name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error).removeprefix('Value error, ')}") from None


def make_shaping(target: Target, as_published: bool, **changes: object) -> Shaping:
    """The shaping for a runtime (or the paper's own), with what differs; None changes nothing.

    Raises:
        InputError: a value is out of range.
    """
    base = AS_PUBLISHED if as_published else SHAPINGS[target]
    try:
        return Shaping.model_validate(base.model_dump() | {k: v for k, v in changes.items() if v is not None})
    except ValidationError as error:
        raise InputError(first_problem(error)) from None


def make_recipe(**options: object) -> Recipe:
    """A recipe from the command line's options.

    Raises:
        InputError: with the option and what is wrong with it.
    """
    try:
        return Recipe.model_validate(options)
    except ValidationError as error:
        problem = first_problem(error)
        raise InputError(problem.removeprefix("Value error, ")) from None
