"""What every part of every block of the dense model loses when it is cut alone."""

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import choose_channels, choose_for_shape
from lowpass.pipeline.method.recovery import refit
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_block import SlimBlock, layer_scale
from lowpass.pipeline.search.curves import AttentionOption, BlockCurve, SizeOption, falling, interpolated
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.log_entries import Curve
from lowpass.pipeline.search.shaping import Shaping, first_keep
from lowpass.pipeline.search.state import SearchState, keeping

PROFILED_IMAGES = 256  # on which losses are measured
# Sizes measured of a hidden width, a head count or a token count; in between is interpolated. Along the error that a
# cut leaves behind a refit, which structured OBS knows, a loss is nearly straight: few points tell more than many.
POINTS, POINTS_BY_ERROR = 8, 4
LEVELS = 32  # counts of tokens that a plan may choose from
THRESHOLDS = 12  # cuts of the attention measured where heads are thinned


def measure_loss_curves(state: SearchState, log: SearchLog) -> list[BlockCurve]:
    """The loss curves of all blocks of a dense model."""
    batches = state.clean[: state.share.among_first(PROFILED_IMAGES)]
    wanted = [state.logits(state.model.blocks, tokens).log_softmax(-1).cpu() for tokens in batches]
    curves = []
    for _ in track(state.model.blocks, "profiling blocks"):
        curves.append(log.next(Curve, _curve, state, wanted).losses)
        state.ascend()
    return curves


def _curve(state: SearchState, wanted: list[torch.Tensor]) -> Curve:
    """Every part of the block at hand, cut alone."""
    model, index, shaping = state.model, state.index, state.settings.shaping
    dense = model.architecture.dense
    normed = dense.attn_norm or dense.mlp_norm
    block, above = model.blocks[index], model.blocks[index + 1 :]
    batches = state.clean[: len(wanted)]
    scores = state.channel_scores()
    moments = state.refit_moments(block) if state.settings.recovery else None

    def loss(candidate: SlimBlock, added: Tensor | None = None) -> float:
        found = state.divergence([candidate, *above], batches, wanted, added)
        if not math.isfinite(found):
            raise RunError(
                f"block {index}: the classes of the cut model are no numbers; if mixed precision is on, do without it"
            )
        return found

    def cut(shape: BlockShape) -> SlimBlock:
        choice = choose_for_shape(scores, shape)
        # What is read of a part is part of what was read of the whole, unless thinned heads attend differently or a
        # norm comes between.
        if moments is not None and (normed or shape.qk_dim < block.attn.qk_dim):
            return state.cut(choice).block
        candidate = copy.deepcopy(block)
        remove_channels(candidate, choice)
        if moments is not None:
            (fitted, judged), (mlp_fitted, mlp_judged) = moments
            if shape.hidden < block.shape.hidden:
                refit(
                    candidate.mlp.fc2,
                    "mlp.fc2",
                    mlp_fitted.take(choice.hidden),
                    mlp_judged.take(choice.hidden),
                    layer_scale(block.ls2),
                )
            else:
                size = block.attn.v_dim
                rows = [h * size + i for h, kept in zip(choice.heads, choice.value, strict=True) for i in kept]
                refit(candidate.attn.proj, "attn.proj", fitted.take(rows), judged.take(rows), layer_scale(block.ls1))
        return candidate

    def loss_without(**gone: int) -> float:
        without = state.cut(choose_for_shape(scores, block.shape.model_copy(update=gone)))
        return loss(without.block, without.added)

    whole = block.shape
    prune = state.settings.prune

    def of_sizes(field: Literal["heads", "hidden"], sizes: list[int], of: Tensor | None) -> tuple[SizeOption, ...]:
        points, along = POINTS, falling
        if of is not None and scores.cumulative:
            points, along = POINTS_BY_ERROR, partial(_left_behind, of.sort().values)
        shapes = {size: whole.model_copy(update={field: size}) for size in spread(sizes, points)}
        measured = [SizeOption(size=n, loss=0.0 if s == whole else loss(cut(s))) for n, s in shapes.items()]
        return interpolated(measured, sizes, along)

    if prune == "tokens":
        attention = [AttentionOption(heads=whole.heads, qk_dim=whole.qk_dim, v_dim=whole.v_dim, loss=0.0)]
    elif shaping.whole_heads:
        attention = [
            AttentionOption(heads=kept.size, qk_dim=whole.qk_dim, v_dim=whole.v_dim, loss=kept.loss)
            for kept in of_sizes("heads", list(range(1, whole.heads + 1)), scores.heads)
        ]
    else:
        attention = [
            AttentionOption(heads=s.heads, qk_dim=s.qk_dim, v_dim=s.v_dim, loss=0.0 if s == whole else loss(cut(s)))
            for s in thin_shapes(whole, scores)
        ]
    if state.settings.sub_blocks and prune != "tokens":
        nothing = {"heads": 0, "qk_dim": 0, "v_dim": 0}
        attention.insert(0, AttentionOption(**nothing, loss=loss_without(**nothing)))
    widths = [whole.hidden] if prune == "tokens" else widths_of(whole.hidden, shaping)
    hidden = of_sizes("hidden", widths, scores.hidden)
    if state.settings.sub_blocks and prune != "tokens":
        hidden = (SizeOption(size=0, loss=loss_without(hidden=0)), *hidden)
    tokens = list[SizeOption]()
    if prune != "channels" and index in shaping.stages(len(model.blocks)):
        counts = token_counts(model.architecture, index, shaping)
        for keep in spread(counts, POINTS):
            with keeping(model, index, keep):
                divergence = 0.0 if keep == whole.keep else loss(model.blocks[index])
            tokens.append(SizeOption(size=keep, loss=divergence))
        tokens = list(interpolated(tokens, counts))
    losses = BlockCurve(attention=tuple(attention), hidden=hidden, tokens=tuple(tokens))
    return Curve(block=index, losses=losses)


def _left_behind(ascending: Tensor, kept: int) -> float:
    """The error once all but `kept` channels (or heads) are gone, from scores that are cumulative."""
    gone = len(ascending) - kept
    return float(ascending[gone - 1]) if gone else 0.0


def thin_shapes(whole: BlockShape, scores: ChannelScores) -> list[BlockShape]:
    """What the paper's head search makes of thresholds."""
    have = scores.rows
    found = {
        whole: None,
        whole.model_copy(update={"qk_dim": scores.step, "v_dim": 1}): None,
    }
    for step in range(1, THRESHOLDS + 1):
        choice = choose_channels(scores, min(have - 1, have * step // THRESHOLDS))
        found[choice.shape(whole.keep).model_copy(update={"hidden": whole.hidden})] = None
    return list(found)


def widths_of(whole: int, shaping: Shaping) -> list[int]:
    """Hidden widths that suit, ascending: at most 64 of them."""
    step = max(1, whole // 64)
    return sorted({shaping.width(width, whole) for width in [*range(1, whole, step), whole]})


def token_counts(architecture: Architecture, index: int, shaping: Shaping) -> list[int]:
    """Counts of image tokens that a block may pass on, ascending."""
    whole = architecture.dense.num_tokens
    fewest = first_keep(architecture) if index == 0 else 1
    step = max(1, whole // LEVELS)
    prefix = architecture.dense.num_prefix_tokens
    return sorted({shaping.keep(keep, whole, prefix) for keep in [*range(whole, fewest - 1, -step), fewest]})


def spread(values: Sequence[int], points: int) -> list[int]:
    """About `points` of ascending values, both ends among them."""
    if len(values) <= points:
        return list(values)
    return sorted({values[round(i * (len(values) - 1) / (points - 1))] for i in range(points)})
