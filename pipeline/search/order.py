"""On which model a block is scored when the table of shapes is settled: with everything below it cut (bottom-up, the
method), with everything above it cut (top-down), or on the dense model (one-shot)."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch

from lowpass.pipeline.base.processes import sums_over_processes
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import ChannelChoice, choose_for_shape
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.whole_parts import add_below, mean_added, missing_parts, take_out
from lowpass.pipeline.search.channel_criteria import ScoringBatch
from lowpass.pipeline.search.state import SearchState


def chooser(state: SearchState, shapes: Sequence[BlockShape]) -> Callable[[int], ChannelChoice | None]:
    """What stays of a block, by its index; None: everything. Bottom-up it is asked once `state` stands at the block.

    Args:
        state: at block 0 of the dense model.
        shapes: what the blocks are cut to.
    """
    if state.settings.order != "bottom-up":
        return _choices_ahead(state, shapes).__getitem__

    def choose(index: int) -> ChannelChoice | None:
        same = _same_channels(shapes[index], state.model.blocks[index].shape)
        return None if same else choose_for_shape(state.channel_scores(), shapes[index])

    return choose


def _choices_ahead(state: SearchState, shapes: Sequence[BlockShape]) -> list[ChannelChoice | None]:
    """All of them before anything is cut."""
    dense = state.model
    scored = copy.deepcopy(dense)  # for top-down, cut on the way down
    choices: list[ChannelChoice | None] = [None] * len(shapes)
    for index in reversed(range(len(shapes))):
        shape, top_down = shapes[index], state.settings.order == "top-down"
        if top_down and shape.heads:  # without attention it drops none
            scored.set_keep(index, shape.keep)
        if _same_channels(shape, dense.blocks[index].shape):
            continue
        choice = choose_for_shape(state.scores_of(scored, _entering(state, index), index), shape)
        choices[index] = choice
        if top_down:
            for part in missing_parts(scored.blocks[index], shape):
                entering = (clean for clean, _, _ in _entering(state, index))
                described, last = scored.architecture.dense, index == len(shapes) - 1
                added = mean_added(scored.blocks[index], described, last, part, entering, sums_over_processes)
                left = take_out(scored.blocks[index], part, added)
                if left is not None:
                    add_below(scored, index, left)
            remove_channels(scored.blocks[index], choice)
    return choices


def _entering(state: SearchState, index: int) -> Iterator[ScoringBatch]:
    """What enters a block of the dense model, from what entered block 0."""
    below = state.model.blocks[:index]
    for clean, low, labels in state.streams():
        with torch.no_grad():
            for block in below:
                clean, low = block(clean), block(low)
        yield clean, low, labels


def _same_channels(shape: BlockShape, other: BlockShape) -> bool:
    """Whether two shapes differ in tokens only."""
    return shape.model_copy(update={"keep": other.keep}) == other
