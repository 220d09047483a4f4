"""On which model a block is scored when the table of shapes is settled: with everything below it cut (bottom-up, the
method), with everything above it cut (top-down), or on the dense model (one-shot)."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch

from lowpass.pipeline.method.channels import ChannelChoice, choose_for_shape
from lowpass.pipeline.method.sensitivity import Stream
from lowpass.pipeline.model.architecture import BlockShape
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.search.state import Standing


def chooser(standing: Standing, shapes: Sequence[BlockShape]) -> Callable[[int], ChannelChoice | None]:
    """What stays of a block, by its index; None: everything. Bottom-up it is asked once `standing` stands at the block.

    Args:
        standing: at block 0 of the dense model.
        shapes: what the blocks are cut to.
    """
    if standing.recipe.order != "bottom-up":
        return _choices_ahead(standing, shapes).__getitem__

    def choose(index: int) -> ChannelChoice | None:
        same = _same_channels(shapes[index], standing.model.blocks[index].shape)
        return None if same else choose_for_shape(standing.sensitivity(), shapes[index])

    return choose


def _choices_ahead(standing: Standing, shapes: Sequence[BlockShape]) -> list[ChannelChoice | None]:
    """All of them before anything is cut."""
    dense = standing.model
    scored = copy.deepcopy(dense)  # for top-down, cut on the way down
    choices: list[ChannelChoice | None] = [None] * len(shapes)
    for index in reversed(range(len(shapes))):
        shape, top_down = shapes[index], standing.recipe.order == "top-down"
        if top_down:
            scored.set_keep(index, shape.keep)
        if _same_channels(shape, dense.blocks[index].shape):
            continue
        choice = choose_for_shape(standing.scores_of(scored, _entering(standing, index), index), shape)
        choices[index] = choice
        if top_down:
            remove_channels(scored.blocks[index], choice)
    return choices


def _entering(standing: Standing, index: int) -> Iterator[Stream]:
    """What enters a block of the dense model, from what entered block 0."""
    below = standing.model.blocks[:index]
    for clean, low, labels in standing.streams():
        with torch.no_grad():
            for block in below:
                clean, low = block(clean), block(low)
        yield clean, low, labels


def _same_channels(shape: BlockShape, other: BlockShape) -> bool:
    """Whether two shapes differ in tokens only."""
    return shape.model_copy(update={"keep": other.keep}) == other
