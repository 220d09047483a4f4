"""Dense top-1, measured before anything else: the one figure that shows most wrong assumptions about a model."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lowpass.pipeline.base.errors import InputError, first_problem
from lowpass.pipeline.base.files import write_json
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.model.architecture import Preprocessing
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.inputs import Inputs, as_slim
from lowpass.pipeline.run.readings import check_readings, comma_separated

INPUTS_FILE = "inputs.json"


class Provenance(BaseModel):
    """Where a run's inputs come from, and the figure that vouches for them: `inputs.json`.

    `checked_top1` is the dense model's, in percent, on `checked_images` of the test split; None: there were no images.
    `alternatives` are the top-1 of other readings, by the options that ask for them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights_key: str
    other_weights: tuple[str, ...]
    preprocessing: str
    classes: str
    checked_images: int = 0
    checked_top1: float | None = None
    alternatives: dict[str, float] = {}

    def save(self, directory: Path) -> None:
        """Write `inputs.json`."""
        write_json(directory / INPUTS_FILE, self.model_dump(mode="json"))

    @classmethod
    def load(cls, directory: Path) -> "Provenance | None":
        """What `inputs.json` says; None: there is none, as of an imported run.

        Raises:
            InputError: it is damaged.
        """
        path = directory / INPUTS_FILE
        try:
            return cls.model_validate_json(path.read_bytes()) if path.exists() else None
        except ValidationError as error:
            raise InputError(f"{path} does not say where inputs come from: {first_problem(error)}") from None


def check_dense(inputs: Inputs, go_on: bool) -> Provenance:
    """Measure the dense model on some test images, and compare other readings of the inputs.

    Args:
        inputs: of a run.
        go_on: say what is suspicious, and go on.

    Raises:
        InputError: the dense model does no better than a guess, or clearly better under another reading.
    """
    data, recipe, prep = inputs.data, inputs.recipe, inputs.dense.architecture.preprocessing
    named, origin = recipe.classes, inputs.origin
    known = set(origin.classes or ())
    are_named = named is not None or bool(known and data is not None and known.issuperset(data.classes or ()))
    numbered = "the data's numbers" if data is not None and data.classes is None else f"{recipe.class_order} order"
    provenance = Provenance(
        weights_key=origin.weights_key,
        other_weights=origin.other_weights,
        preprocessing=prep.source,
        classes=str(named or (origin.classes_from if are_named else numbered)),
    )
    if data is None or recipe.random_weights:
        return provenance
    say_preprocessing(prep)
    found = check_readings(inputs.dense, data, recipe, "dense", are_named, _other_weights(inputs))
    found.insist(go_on)
    checked = {"checked_images": found.images, "checked_top1": found.top1}
    return provenance.model_copy(
        update=checked | {"alternatives": {other.options: other.top1 for other in found.alternatives}}
    )


def say_preprocessing(prep: Preprocessing) -> None:
    """Log how pictures become a model's input, and who says so."""
    logger.info(
        "preprocessing: mean %s, std %s, crop %g (%s), %s; from %s",
        comma_separated(prep.mean),
        comma_separated(prep.std),
        prep.crop_pct,
        prep.crop_mode,
        prep.interpolation,
        prep.source or "timm's defaults",
    )


def _other_weights(inputs: Inputs) -> Iterator[tuple[str, SlimViT]]:
    """Other weights of the same file."""
    recipe, cut = inputs.recipe, inputs.data is not None and inputs.data.rows is not None
    for key in () if cut else inputs.origin.other_weights:
        try:
            choices = recipe.choices() | {"weights_key": key}
            model = load_model(recipe.model, recipe.weights, seed=recipe.seed, **choices)
        except InputError:
            continue  # a table of tensors that is no such model
        slim = as_slim(model, recipe)
        if slim.architecture.dense == inputs.dense.architecture.dense:
            yield key, slim
