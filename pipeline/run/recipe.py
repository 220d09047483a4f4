"""Everything a run can be told, typed and validated; saved beside its result as `recipe.yaml`."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from lowpass.pipeline.base.errors import InputError, first_problem
from lowpass.pipeline.base.files import write_text
from lowpass.pipeline.checkpoints.origin import LEAST_CROP
from lowpass.pipeline.data.options import DataOptions, ReadingOptions
from lowpass.pipeline.search.settings import Count, SearchSettings
from lowpass.pipeline.search.shaping import SHAPINGS
from lowpass.pipeline.train.settings import FinetuneSettings

Finite = Annotated[float, Field(allow_inf_nan=False)]
RECIPE_FILE = "recipe.yaml"
IN_MEMORY = "(in memory)"  # the `data` of a run whose images a program gave


class Recipe(SearchSettings, ReadingOptions):
    """One compression: a model, its images, and the settings of the search and of fine-tuning.

    Exactly one of `target_macs`, `target_latency`, `target_throughput`, `allowable_drop` and `architecture` says how
    far to go; a run that `lowpass import-vtc` or `lowpass pull` made has `released` or `pulled`, what it was made from,
    instead.
    """

    model: str
    weights: Path | None = None
    weights_key: str | None = None
    random_weights: bool = False
    img_size: str | int | None = None
    in_chans: Count | None = None
    mean: tuple[Finite, ...] | None = None
    std: tuple[Finite, ...] | None = None
    crop_pct: Annotated[float | None, Field(ge=LEAST_CROP, le=1, allow_inf_nan=False)] = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    data: str | None = None
    classes: Path | None = None
    architecture: Path | None = None
    released: Path | None = None
    pulled: str | None = None
    finetune: FinetuneSettings | None = None  # None: what suits the data

    @model_validator(mode="before")
    @classmethod
    def _where_time_is_saved(cls, given: Any) -> Any:
        """Where a target is of time, a part costs more than its arithmetic, and a stage of tokens costs something:
        both are left to the plan, unless something else is said."""
        if not isinstance(given, dict) or given.get("runtime") is None or "shaping" in given:
            return given
        shaping = SHAPINGS["tensorrt"].model_copy(update={"token_stages": "auto"})
        return {"sub_blocks": given.get("prune") != "tokens"} | given | {"shaping": shaping}

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if self.imported:
            return self
        by_time = [self.target_latency, self.target_throughput]
        goals = [goal is not None for goal in (self.target_macs, *by_time, self.allowable_drop, self.architecture)]
        if sum(goals) != 1:
            raise ValueError(
                "give exactly one of --target-macs, --target-latency, --target-throughput, --allowable-drop and "
                "--architecture"
            )
        if any(by_time) != (self.runtime is not None):
            raise ValueError(
                "--target-latency MS (or --target-throughput) and --runtime NAME go together: milliseconds on which "
                "runtime?"
            )
        if (self.target_throughput is None) != (self.latency_limit is None):
            raise ValueError(
                "--target-throughput IMAGES_PER_S and --latency-limit MS go together: how long may a batch take?"
            )
        if self.target_throughput is not None and self.latency_batch != 1:
            raise ValueError("--batch is for --target-latency; --target-throughput picks a batch itself")
        if self.shaping.token_stages == "auto" and not any(by_time):
            raise ValueError(
                "--token-stages auto goes with --target-latency or --target-throughput: by time a stage pays or not"
            )
        if self.sub_blocks and self.prune == "tokens":
            raise ValueError("--sub-blocks removes channels, which --prune tokens leaves alone")
        if self.order != "bottom-up" and self.allowable_drop is not None:
            raise ValueError(f"--order {self.order} goes with a target or a table: what is allowed is spent bottom-up")
        if self.data == "" or (self.data is None and not self.random_weights):
            raise ValueError("give --data: 'digits', an image folder, hfds/NAME, hfids/NAME or wds/FOLDER")
        if self.random_weights and self.architecture is None:
            raise ValueError("random weights have no accuracy to search by; give --architecture FILE")
        return self

    @property
    def imported(self) -> bool:
        """Whether the slim model was made elsewhere, and no search led to it."""
        return self.released is not None or self.pulled is not None

    def choices(self) -> dict[str, Any]:
        """What is said of the model beside its name and weights, as `load_model` takes it."""
        names = ("weights_key", "img_size", "in_chans", "mean", "std", "crop_pct", "interpolation")
        return {name: getattr(self, name) for name in names}

    def data_options(self, classes: tuple[str, ...] | None, classes_from: str, exact: bool) -> DataOptions:
        """How its images are read, when `classes_from` names the classes."""
        given = {name: getattr(self, name) for name in ReadingOptions.model_fields}
        return DataOptions(classes=classes, classes_from=classes_from, exact=exact, **given)

    def save(self, directory: Path) -> None:
        """Write `recipe.yaml`."""
        own = [name for name in type(self).model_fields if name not in SearchSettings.model_fields]
        fields = self.model_dump(mode="json")
        ordered = {name: fields[name] for name in [*own, *SearchSettings.model_fields]}  # the model before its settings
        write_text(directory / RECIPE_FILE, yaml.safe_dump(ordered, sort_keys=False))

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
    if content.get("released") or content.get("pulled"):
        raise InputError(f"{path} is of an imported run, which `lowpass import-vtc` or `lowpass pull` makes")
    try:
        return Recipe.model_validate(content | {name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from None


def make_recipe(**options: object) -> Recipe:
    """A recipe from the command line's options.

    Raises:
        InputError: with the option and what is wrong with it.
    """
    try:
        return Recipe.model_validate(options)
    except ValidationError as error:
        raise InputError(first_problem(error)) from None
