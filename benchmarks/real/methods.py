"""What the table of the real model compares: searches of our own that differ in one thing, and the rivals."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Subset

from lowpass.benchmarks.accuracy.shared_curves import share_curves
from lowpass.benchmarks.peers.corp import prune_by_corp
from lowpass.benchmarks.peers.evit import evit, evit_macs, matched_keep_rate
from lowpass.benchmarks.peers.isomorphic import counted_macs, prune_isomorphic
from lowpass.benchmarks.peers.tome import matched_r, tome, tome_macs
from lowpass.benchmarks.peers.vbp import prune_by_variance
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.data.datasets import Batches, Data, len_of
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.inputs import MACHINE
from lowpass.pipeline.run.recipe import RECIPE_FILE, Recipe
from lowpass.pipeline.search.shaping import AS_PUBLISHED

RUN_TESTED = 300  # test images that a run measures itself on, as it checks its dense model on: the table has its own


@dataclass(frozen=True)
class Pruned:
    """A model, and the multiply-accumulates of one image through it."""

    model: nn.Module
    macs: int


Rival = Callable[[VisionTransformer, Batches, float], Pruned]  # dense model, calibration batches, share of the MACs


@dataclass(frozen=True)
class Method:
    """One line of the table: what a search changes of the defaults of `lowpass compress`, or a rival. `drawn`: the
    calibration images, and so the seed, make a difference."""

    recipe: Mapping[str, object] = field(default_factory=dict)
    rival: Rival | None = None
    drawn: bool = True


def _slim(prune: Callable[[SlimViT, list[Tensor], float], None]) -> Rival:
    def rival(model: VisionTransformer, batches: Batches, share: float) -> Pruned:
        slim = SlimViT.from_timm(model)
        prune(slim, [images for images, _ in batches], share)
        return Pruned(slim, slim.architecture.macs())

    return rival


def _isomorphic(inside: bool) -> Rival:
    def rival(model: VisionTransformer, batches: Batches, share: float) -> Pruned:
        pruned = prune_isomorphic(model, batches, share, inside)
        return Pruned(pruned, counted_macs(pruned))

    return rival


def _evit(model: VisionTransformer, batches: Batches, share: float) -> Pruned:
    rate = matched_keep_rate(model, int(share * evit_macs(model, 1)))
    return Pruned(evit(model, rate), evit_macs(model, rate))


def _tome(model: VisionTransformer, batches: Batches, share: float) -> Pruned:
    schedule = matched_r(model, int(share * tome_macs(model, 0)))
    return Pruned(tome(model, schedule), tome_macs(model, schedule))


METHODS: dict[str, Method] = {
    "lowpass": Method(),
    "lfs": Method({"channel_criterion": "lfs"}),
    "as-published": Method({"shaping": AS_PUBLISHED, "channel_criterion": "lfs", "recovery": False}),
    "taylor": Method({"channel_criterion": "taylor"}),
    "magnitude": Method({"channel_criterion": "magnitude"}),
    "taylor-bare": Method({"channel_criterion": "taylor", "recovery": False}),
    "magnitude-bare": Method({"channel_criterion": "magnitude", "recovery": False}),
    "channels": Method({"prune": "channels"}),
    "vbp": Method(rival=_slim(prune_by_variance)),
    "corp": Method(rival=_slim(prune_by_corp)),
    "isomorphic": Method(rival=_isomorphic(inside=False)),
    "isomorphic-inside": Method(rival=_isomorphic(inside=True)),
    "evit": Method(rival=_evit, drawn=False),
    "tome": Method(rival=_tome, drawn=False),
}


def searched(recipe: Recipe, directory: Path, data: Data, dense_top1: float) -> Pruned:
    """Search in a run directory, or take up what is there; curves come from the other runs beside it.

    Args:
        recipe: of the search.
        directory: of the run; one of another recipe is cleared away.
        data: what it is calibrated on.
        dense_top1: of the dense model, on whichever images.
    """
    if (directory / RECIPE_FILE).exists() and _settings(Recipe.load(directory)) != _settings(recipe):
        logger.info("%s: made by another recipe; done anew", directory)
        shutil.rmtree(directory)
    share_curves(directory, recipe)
    few = Subset(data.test, tested_indices(data, RUN_TESTED))
    compress(recipe, directory, resume=True, dense_top1=dense_top1, data=(data.calibration, few))
    slim = SlimViT.load(directory)
    return Pruned(slim, slim.architecture.macs())


def _settings(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(exclude=set(MACHINE))


def tested_indices(data: Data, count: int | None) -> list[int]:
    """Which test images are looked at: `count` of them, the same whatever the row; None: all."""
    every = len_of(data.test)
    return sorted(torch.randperm(every, generator=torch.Generator().manual_seed(0))[:count].tolist())
