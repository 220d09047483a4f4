"""Top-1 of a model on a few hundred test images, under the reading that was asked for and under others.

A model whose classes are numbered otherwise, that wants other pixels, or whose good weights are the other ones in the
file, scores less than it can: near chance, or well above it and yet not what it was trained to. What would have helped
is measured on the same images, and compared image by image: what both get right says nothing.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger, track
from lowpass.pipeline.data.classes import ordered
from lowpass.pipeline.data.datasets import Batches, Data, len_of, subset
from lowpass.pipeline.data.folders import FolderImages
from lowpass.pipeline.data.options import ClassOrder
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.evaluate import best_device
from lowpass.pipeline.run.recipe import IN_MEMORY, Recipe

CHECKED_IMAGES = 300
NAMED = 20  # classes that a message lists
BETTER = 5.0  # points of top-1 that another reading must have more
DEVIATIONS = 3.0  # that it must be beyond what luck gives, and a model beyond what guessing gives
NORMALISATIONS = {
    "ImageNet's mean and deviation": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "a mean and deviation of 0.5": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "CLIP's mean and deviation": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}


@dataclass(frozen=True)
class Alternative:
    """Another reading of the same inputs: what it is, the options that ask for it, its top-1 in percent, and whether
    the images tell that it is better."""

    what: str
    options: str
    top1: float
    is_better: bool


@dataclass(frozen=True)
class Checked:
    """A model's top-1 in percent on so many test images, that of other readings, best first, and what is suspicious:
    nothing, or a sentence with the remedy."""

    images: int
    top1: float
    alternatives: tuple[Alternative, ...]
    trouble: str

    def insist(self, go_on: bool) -> None:
        """Refuse what is suspicious, or only say it.

        Raises:
            InputError: with what helps.
        """
        if self.trouble and not go_on:
            raise InputError(f"{self.trouble}; --yes goes on all the same")
        if self.trouble:
            logger.warning("%s; going on, as --yes says", self.trouble)


def check_readings(
    model: SlimViT,
    data: Data,
    recipe: Recipe,
    whose: str,
    are_named: bool,
    others: Iterable[tuple[str, SlimViT]] = (),
    is_run: bool = False,
) -> Checked:
    """Measure a model on some test images, and other readings of them.

    Args:
        model: as it was read.
        data: as it was read.
        recipe: how that was asked for.
        whose: what to call the model, such as `dense`.
        are_named: somebody names the classes: they are not numbered by the recipe's `class_order`.
        others: other weights of the same model, by their key in its file.
        is_run: of a run, whose classes and preprocessing are fixed: no option helps.
    """
    chosen = torch.randperm(len_of(data.test), generator=torch.Generator().manual_seed(recipe.seed))[:CHECKED_IMAGES]
    loader = data.loader(subset(data.test, sorted(chosen.tolist())), recipe.batch_size)
    batches = [(images.clone(), labels.clone()) for images, labels in track(loader, f"checking the {whose} model")]
    labels = torch.cat([labels for _, labels in batches])
    predicted = _predicted(model, batches)
    right = predicted == labels

    def alternative(what: str, options: str, other: Tensor) -> Alternative:
        return Alternative(what, options, _top1(other), _is_better(other, right))

    found = [alternative(*named, predicted == moved) for named, moved in _other_orders(data, are_named, labels)]
    if _top1(right) <= 100 - BETTER:  # otherwise none can be better by so much
        found += [
            alternative(*named, _predicted(model, seen) == labels)
            for named, seen in _other_pixels(model, recipe, batches)
        ]
        found += [
            alternative(f"the weights {key}", f"--weights-key {key}", _predicted(other, batches) == labels)
            for key, other in others
        ]
    if not any(other.is_better for other in found) and (anew := _numbered_anew(predicted, labels, data)) is not None:
        found.append(anew)
    found.sort(key=lambda other: -other.top1)
    logger.info("%s top-1: %.1f %% on %d of the test images", whose, _top1(right), len(labels))
    return Checked(len(labels), _top1(right), tuple(found), _trouble(right, data.num_classes, found, whose, is_run))


def _trouble(right: Tensor, classes: int, found: list[Alternative], whose: str, is_run: bool) -> str:
    """What is suspicious, and what helps."""
    top1, chance = _top1(right), 100 / classes
    guesses = classes > 1 and is_a_guess(top1, chance, len(right))
    best = next((other for other in found if other.is_better), None)
    if not (guesses or best):
        return ""
    said = f"the {whose} model's top-1 is {top1:.1f} % on {len(right)} of the test images"
    if guesses:
        said += f", where guessing gives {chance:.1f} %"
    if best is not None:
        remedy = "the run's are fixed, so mend the data" if is_run else f"give {best.options}"
        return f"{said}; with {best.what} it is {best.top1:.1f} %: {remedy}"
    if is_run:
        return f"{said}: these are not images of the run's classes"
    return (
        f"{said}: these are not the weights, the classes or the pixels that it was trained with (--classes FILE names "
        "the classes in the order of the logits, --mean and --std the pixels)"
    )


def is_a_guess(top1: float, chance: float, images: int) -> bool:
    """Whether a top-1 on so many images is within what luck gives to somebody who guesses, all in percent."""
    luck = chance + DEVIATIONS * math.sqrt(chance * (100 - chance) / images)
    # Of few images luck gets many right: what is right more than halfway from chance to all is no guess.
    return top1 <= min(luck, (chance + 100) / 2)


def _is_better(other: Tensor, right: Tensor) -> bool:
    """By so many points, and by more than luck decides of the images that one of them alone gets right (McNemar)."""
    wins, losses = int((other & ~right).sum()), int((right & ~other).sum())
    net = wins - losses
    return 100 * net >= BETTER * len(right) and net >= DEVIATIONS * math.sqrt(wins + losses)


Named = tuple[str, str]


def _other_orders(data: Data, are_named: bool, labels: Tensor) -> Iterator[tuple[Named, Tensor]]:
    """The same images, with the classes numbered otherwise."""
    if data.classes is None:
        return
    orders: tuple[ClassOrder, ...] = ("natural", "plain")
    by_order = isinstance(data.test, FolderImages) and not are_named
    for order in orders:
        other = ordered(data.classes, order)
        if other != data.classes:
            moved = torch.tensor([other.index(name) for name in data.classes])
            options = f"--class-order {order}" if by_order else f"--classes FILE, with the names in {order} order"
            yield (f"classes in {order} order", options), moved[labels]


def _numbered_anew(predicted: Tensor, labels: Tensor, data: Data) -> Alternative | None:
    """The numbering of the classes that suits half of the images best, on the other half; None: theirs does as well."""
    seen, judged = (torch.arange(len(labels)) % 2 == half for half in (0, 1))
    if not judged.any():  # of a single image there is no other half
        return None
    counts = torch.zeros(data.num_classes, data.num_classes)
    counts.index_put_((predicted[seen], labels[seen]), torch.ones(int(seen.sum())), accumulate=True)
    moved = torch.from_numpy(linear_sum_assignment(counts.numpy(), maximize=True)[1])  # of each logit, the label
    right, other = (answer[judged] == labels[judged] for answer in (predicted, moved[predicted]))
    # Who always says the most frequent class is right that often, whatever is seen.
    frequent = 100 * float(labels[judged].bincount().max()) / int(judged.sum())
    if not _is_better(other, right) or is_a_guess(_top1(other), frequent, len(other)):
        return None
    names = [str(number) if data.classes is None else data.classes[number] for number in moved.tolist()[:NAMED]]
    said = f"{', '.join(names)}{' and so on' if data.num_classes > NAMED else ''}"
    options = f"--classes FILE, with the names in the order of the logits ({said})"
    if data.classes is None:
        options = f"data whose classes are numbered as the logits are (by the logits: {said})"
    return Alternative("classes in another order", options, _top1(other), True)


def _other_pixels(model: SlimViT, recipe: Recipe, batches: Batches) -> Iterator[tuple[Named, Batches]]:
    """The same pixels, normalised as other models want them."""
    prep = model.architecture.preprocessing
    if len(prep.mean) == 3 and recipe.data not in (IN_MEMORY, "digits"):  # whose pixels come as they are
        for what, (mean, std) in NORMALISATIONS.items():
            if (tuple(mean), tuple(std)) != (prep.mean, prep.std):
                seen = [(_renormalised(images, prep.mean, prep.std, mean, std), y) for images, y in batches]
                yield (what, f"--mean {comma_separated(mean)} --std {comma_separated(std)}"), seen


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


def _top1(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def comma_separated(values: tuple[float, ...]) -> str:
    """Numbers as options take them."""
    return ",".join(f"{value:g}" for value in values)
