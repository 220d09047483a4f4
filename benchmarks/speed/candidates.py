"""Who is compared: dense timm, lowpass, the shapes as published, EViT, ToMe and uniform width, at matched MACs.

`dense` is timm's model as timm exports it, `dense-exported` as `lowpass export --dense` writes it: what the deployment
graph gains without removing anything."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from lowpass.benchmarks.peers.evit import evit, evit_macs, matched_keep_rate
from lowpass.benchmarks.peers.tome import matched_r, tome, tome_macs
from lowpass.export.graph.deployable import deployable
from lowpass.export.graph.precision import AtPrecision
from lowpass.export.options import DTYPES, Precision
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture, read_blocks
from lowpass.pipeline.model.slim_vit import SlimViT

RECIPES = Path(str(resources.files("lowpass"))) / "recipes"
MODELS = {f"deit_{size}": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
CANDIDATES = ("dense", "dense-exported", "lowpass", "as-published", "uniform-width", "evit", "tome")


@dataclass(frozen=True)
class Candidate:
    """A model to time: `at(precision)` is a module from FP32 images to FP32 logits, computed in it
    (INT8: in FP32, to be quantised)."""

    name: str
    macs: int
    at: Callable[[Precision], nn.Module]


def candidates(model: str, names: tuple[str, ...] = CANDIDATES) -> list[Candidate]:
    """The rivals for one of `MODELS`, with random weights (the same for all), at the MACs of `lowpass`.

    Raises:
        InputError: a name is unknown.
    """
    if model not in MODELS:
        raise InputError(f"there is no model {model!r}; choose from {', '.join(MODELS)}")
    torch.manual_seed(0)
    vit: VisionTransformer = timm.create_model(MODELS[model]).eval()
    dense = SlimViT.from_timm(vit, token_score="cls")
    ours = _with_blocks(dense, read_blocks(RECIPES / f"{model}_paper.json"))
    target = ours.architecture.macs()

    def make(name: str) -> Candidate:
        if name == "dense":
            return Candidate(name, dense.architecture.macs(), partial(_at, vit))
        if name == "dense-exported":
            return _slim(name, dense)
        if name == "lowpass":
            return _slim(name, ours)
        if name == "as-published":
            full = SlimViT.from_timm(vit, token_score="full")
            return _slim(name, _with_blocks(full, read_blocks(RECIPES / f"{model}_as_published.json")))
        if name == "uniform-width":
            return _slim(name, _with_blocks(dense, uniform_width(dense.architecture, target)))
        if name == "evit":
            rate = matched_keep_rate(vit, target)
            return Candidate(name, evit_macs(vit, rate), partial(_at, evit(vit, rate)))
        if name == "tome":
            r = matched_r(vit, target)
            return Candidate(name, tome_macs(vit, r), partial(_at, tome(vit, r)))
        raise InputError(f"there is no candidate {name!r}; choose from {', '.join(CANDIDATES)}")

    return [make(name) for name in names]


def uniform_width(architecture: Architecture, target: int) -> tuple[BlockShape, ...]:
    """Every block cut alike in head size and hidden width, no tokens dropped: the widest within `target` MACs."""
    whole = architecture.dense.blocks()[0]
    for size in range(whole.qk_dim, 0, -1):
        shape = whole.model_copy(
            update={"qk_dim": size, "v_dim": size, "hidden": max(1, whole.hidden * size // whole.qk_dim)}
        )
        blocks = (shape,) * architecture.dense.depth
        if architecture.model_copy(update={"blocks": blocks}).macs() <= target:
            return blocks
    raise InputError(f"no uniform width of {architecture.dense.name} reaches {target} MACs")


def _with_blocks(slim: SlimViT, blocks: tuple[BlockShape, ...]) -> SlimViT:
    """A model of that table with weights of its own: random ones are as good as any others to time."""
    return SlimViT(slim.architecture.model_copy(update={"blocks": blocks})).eval()


def _slim(name: str, slim: SlimViT) -> Candidate:
    return Candidate(name, slim.architecture.macs(), partial(deployable, slim))


def _at(module: nn.Module, precision: Precision) -> nn.Module:
    return AtPrecision(copy.deepcopy(module), DTYPES[precision])
