"""Dense top-1, measured before anything else: the one figure that shows most wrong assumptions about a model.

A model whose classes are numbered otherwise, that wants other pixels, or whose good weights are the other ones in the
file, scores far below what it can. What would have helped is measured, too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor
from torch.utils.data import Subset

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_json
from lowpass.pipeline.base.progress import logger, track
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.data.classes import ordered
from lowpass.pipeline.data.datasets import Batches, len_of
from lowpass.pipeline.data.options import ClassOrder
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.evaluate import best_device
from lowpass.pipeline.run.inputs import Inputs, as_slim
from lowpass.pipeline.run.recipe import IN_MEMORY

CHECKED_IMAGES = 300
FAR_BETTER = 10.0  # points of top-1
DEVIATIONS = 3.0  # of what a model that guesses would score
INPUTS_FILE = "inputs.json"
NORMALISATIONS = {
    "ImageNet's mean and deviation": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "a mean and deviation of 0.5": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "CLIP's mean and deviation": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}


@dataclass(frozen=True)
class Alternative:
    """Another reading of the same inputs: what it is, the options that ask for it, and its top-1 in percent."""

    what: str
    options: str
    top1: float


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


def check_dense(inputs: Inputs, go_on: bool) -> Provenance:
    """Measure the dense model on some test images, and compare other readings of the inputs.

    Args:
        inputs: of a run.
        go_on: say what is suspicious, and go on.

    Raises:
        InputError: the dense model does no better than a guess, or far better under another reading.
    """
    data, recipe, prep = inputs.data, inputs.recipe, inputs.dense.architecture.preprocessing
    named = recipe.classes or (inputs.origin.classes_from if inputs.origin.classes else f"{recipe.class_order} order")
    provenance = Provenance(
        weights_key=inputs.origin.weights_key,
        other_weights=inputs.origin.other_weights,
        preprocessing=prep.source,
        classes=str(named),
    )
    if data is None or recipe.random_weights:
        return provenance
    chosen = torch.randperm(len_of(data.test), generator=torch.Generator().manual_seed(recipe.seed))[:CHECKED_IMAGES]
    loader = data.loader(Subset(data.test, sorted(chosen.tolist())), recipe.batch_size)
    batches = [(images.clone(), labels.clone()) for images, labels in track(loader, "checking the dense model")]
    predicted, labels = _predicted(inputs.dense, batches), torch.cat([labels for _, labels in batches])
    top1 = _top1(predicted, labels)
    others = [*_other_orders(inputs, predicted, labels)]
    if top1 <= 100 - FAR_BETTER:  # otherwise none can be far better
        others += [*_other_pixels(inputs, batches, labels), *_other_weights(inputs, batches, labels)]
    others.sort(key=lambda other: -other.top1)
    logger.info(
        "preprocessing: mean %s, std %s, crop %g (%s), %s; from %s",
        _numbers(prep.mean),
        _numbers(prep.std),
        prep.crop_pct,
        prep.crop_mode,
        prep.interpolation,
        prep.source or "timm's defaults",
    )
    logger.info("dense top-1: %.1f %% on %d of the test images", top1, len(labels))
    trouble = _trouble(top1, len(labels), data.num_classes, others[0] if others else None)
    if trouble and not go_on:
        raise InputError(f"{trouble}; --yes goes on all the same")
    if trouble:
        logger.warning("%s; going on, as --yes says", trouble)
    checked = {"checked_images": len(labels), "checked_top1": top1}
    return provenance.model_copy(update=checked | {"alternatives": {other.options: other.top1 for other in others}})


def _trouble(top1: float, count: int, classes: int, best: Alternative | None) -> str:
    """What is suspicious about a top-1 in percent, and what helps."""
    chance = 100 / classes
    deviation = math.sqrt(chance * (100 - chance) / count)
    guesses = classes > 1 and top1 <= chance + DEVIATIONS * deviation
    helps = best is not None and best.top1 >= top1 + max(FAR_BETTER, DEVIATIONS * deviation)
    if not (guesses or helps):
        return ""
    said = f"the dense model's top-1 is {top1:.1f} % on {count} of the test images"
    if guesses:
        said += f", where guessing gives {chance:.1f} %"
    if helps and best is not None:
        return f"{said}; with {best.what} it is {best.top1:.1f} %: give {best.options}"
    return (
        f"{said}: these are not the weights, the classes or the pixels that it was trained with (--classes FILE names "
        "the classes in the order of the logits, --mean and --std the pixels)"
    )


def _other_orders(inputs: Inputs, predicted: Tensor, labels: Tensor) -> Iterator[Alternative]:
    """The same predictions, with the classes numbered otherwise."""
    data, recipe = inputs.data, inputs.recipe
    if data is not None and data.classes is not None:
        orders: tuple[ClassOrder, ...] = ("natural", "plain")
        for order in orders:
            other = ordered(data.classes, order)
            if other != data.classes and recipe.classes is None:
                moved = torch.tensor([other.index(name) for name in data.classes])
                yield Alternative(
                    f"classes in {order} order", f"--class-order {order}", _top1(predicted, moved[labels])
                )


def _other_pixels(inputs: Inputs, batches: Batches, labels: Tensor) -> Iterator[Alternative]:
    """The same pixels, normalised as other models want them."""
    prep = inputs.dense.architecture.preprocessing
    if len(prep.mean) == 3 and inputs.recipe.data != IN_MEMORY:
        for what, (mean, std) in NORMALISATIONS.items():
            if (tuple(mean), tuple(std)) != (prep.mean, prep.std):
                seen = [(_renormalised(images, prep.mean, prep.std, mean, std), y) for images, y in batches]
                options = f"--mean {_numbers(mean)} --std {_numbers(std)}"
                yield Alternative(what, options, _top1(_predicted(inputs.dense, seen), labels))


def _other_weights(inputs: Inputs, batches: Batches, labels: Tensor) -> Iterator[Alternative]:
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
            yield Alternative(f"the weights {key}", f"--weights-key {key}", _top1(_predicted(slim, batches), labels))


@torch.inference_mode()
def _predicted(model: SlimViT, batches: Batches) -> Tensor:
    device = best_device()
    model = model.to(device)
    return torch.cat([model(images.to(device)).argmax(-1).cpu() for images, _ in batches])


def _renormalised(
    images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], other: tuple[float, ...], by: tuple[float, ...]
) -> Tensor:
    """Images normalised by `mean` and `std`, as if they had been so by `other` and `by`."""
    one, scale, two, other_scale = (torch.tensor(v)[:, None, None] for v in (mean, std, other, by))
    return (images * scale + one - two) / other_scale


def _top1(predicted: Tensor, labels: Tensor) -> float:
    return 100 * float((predicted == labels).double().mean())


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
