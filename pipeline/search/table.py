"""A given table of shapes, applied without a search."""

from collections.abc import Sequence

from lowpass.pipeline.base.progress import track
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.search.order import chooser
from lowpass.pipeline.search.state import SearchState


def apply_table(state: SearchState, blocks: Sequence[BlockShape]) -> None:
    """Cut the model of `state` down to `blocks`, in place and bottom-up, keeping the channels that its criterion likes
    best. Of a part that the table does not have, what it adds on average stays."""
    model = state.model
    choose = chooser(state, blocks)
    for index, shape in enumerate(track(blocks, "cutting blocks")):
        if shape.heads:
            state.refit_attention()
        model.set_keep(index, shape.keep)
        state.accept(state.cut(choose(index)))
        state.ascend()
    state.refit_classifier()
