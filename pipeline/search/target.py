"""A search with a target: MACs or milliseconds are met, and what is lost on the way is as little as can be.

First every part of every block of the dense model is cut alone to several sizes (channels by LFS, refitted, tokens by
LFE), and the divergence of the final classes from the dense model's is measured. `plan.py` then picks the
table that meets the target at the least sum. Last, the blocks are cut to that table bottom-up, each scored and refitted
on the model as it then stands.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import console, track
from lowpass.pipeline.method.channels import ChannelChoice, choose_channels, choose_for_shape
from lowpass.pipeline.method.recovery import Refit, refit
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.model.architecture import Architecture, BlockShape
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim import SlimBlock
from lowpass.pipeline.search.cascade import Log, apply, first_keep, keeping
from lowpass.pipeline.search.costs import Costs, total
from lowpass.pipeline.search.decisions import ChannelDecision, Curve, Plan, TokenDecision
from lowpass.pipeline.search.order import chooser
from lowpass.pipeline.search.plan import AttentionOption, BlockCurve, SizeOption, interpolated, plan, refuse_unreachable
from lowpass.pipeline.search.shaping import Prune, Shaping
from lowpass.pipeline.search.state import Standing

PROFILED_IMAGES = 512  # on which losses are measured
POINTS = 8  # sizes measured of a hidden width or of a token count; in between is interpolated
LEVELS = 32  # counts of tokens that a plan may choose from
THRESHOLDS = 12  # cuts of the attention measured where heads are thinned
TOLERANCE, TRIES = 0.02, 8  # of a measured plan
REFUSED_BEYOND = 0.05


@dataclass(frozen=True)
class Goal:
    """A target, the costs it is planned by, and its unit. `measure` gives the cost of a whole model where the sum of
    its parts is not exact: its latency."""

    target: float
    costs: Costs
    unit: str
    measure: Callable[[Architecture], float] | None = None


def search_to_target(curves: Sequence[BlockCurve], standing: Standing, goal: Goal, log: Log) -> None:
    """Prune `standing`'s model in place.

    Args:
        curves: what `profile` found.
        standing: over the model to prune, still dense.
        goal: how far.
        log: of the search.
    """
    dense = standing.model.architecture
    planned = log.next(Plan, make_plan, curves, dense, goal)
    model = standing.model
    choose = chooser(standing, planned.blocks)
    for index, shape in enumerate(track(planned.blocks, "cutting blocks")):
        if shape.keep < model.blocks[index].tokens_in:
            log.next(TokenDecision, _kept, standing, shape.keep)
            model.set_keep(index, shape.keep)
        apply(standing, log.next(ChannelDecision, _cut_to, standing, shape, choose))
        standing.ascend()


def _kept(standing: Standing, keep: int) -> TokenDecision:
    model, index = standing.model, standing.index
    with keeping(model, index, keep):
        top1 = standing.top1(model.blocks[index:])
        return TokenDecision(block=index, keep=keep, top1=top1, macs=model.architecture.macs())


def _cut_to(standing: Standing, shape: BlockShape, choose: Callable[[int], ChannelChoice | None]) -> ChannelDecision:
    model, index = standing.model, standing.index
    choice = choose(index)
    block, refits = model.blocks[index], tuple[Refit, ...]()
    if choice is not None:
        block, refits = standing.cut(choice)
    top1 = standing.top1([block, *model.blocks[index + 1 :]])
    macs = model.architecture.with_block(index, shape).macs()
    return ChannelDecision(block=index, choice=choice, top1=top1, macs=macs, refits=refits)


def make_plan(curves: Sequence[BlockCurve], dense: Architecture, goal: Goal) -> Plan:
    """The table for a goal. Where a whole model can be measured, the plan is made again until the measure agrees.

    Raises:
        InputError: the goal is out of reach; the message says what is not.
    """
    refuse_unreachable(curves, dense, goal.costs, goal.target, goal.unit)
    budget, tries = goal.target, list[Plan]()
    while True:
        blocks = plan(curves, dense, goal.costs, budget)
        if blocks is None:
            break
        slim = dense.model_copy(update={"blocks": blocks})
        if goal.measure is None:
            return Plan(blocks=blocks, cost=total(goal.costs, slim))
        tries.append(Plan(blocks=blocks, cost=goal.measure(slim)))
        console.print(f"planned for {budget:.3g} {goal.unit}, measured {tries[-1].cost:.3g}")
        if abs(tries[-1].cost / goal.target - 1) <= TOLERANCE or len(tries) == TRIES:
            break
        # The parts do not quite add up: aim as far beside the target as the measure was.
        budget *= goal.target / tries[-1].cost
    met = [made for made in tries if made.cost <= goal.target * (1 + REFUSED_BEYOND)]
    if not met:
        fastest = min(made.cost for made in tries)
        raise InputError(
            f"a target of {goal.target:g} {goal.unit} is out of reach: the fastest model tried takes {fastest:.3g}"
        )
    return min(met, key=lambda made: abs(made.cost / goal.target - 1))


def check_measured_target(goal: Goal, dense: Architecture, shaping: Shaping, prune: Prune) -> None:
    """Refuse a measured target that the dense model meets already or that the smallest model misses.

    Raises:
        InputError: with what was measured.
    """
    if goal.measure is None:
        return
    before = goal.measure(dense)
    if before <= goal.target:
        raise InputError(f"{dense.dense.name} takes {before:.3g} {goal.unit} as it is; a target must be below that")
    blocks = shaping.smallest(dense.dense, first_keep(dense), prune)
    least = goal.measure(dense.model_copy(update={"blocks": blocks}))
    if least > goal.target * (1 + REFUSED_BEYOND):
        raise InputError(
            f"a target of {goal.target:g} {goal.unit} is out of reach: the smallest model takes {least:.3g} {goal.unit}"
            f", the dense one {before:.3g}"
        )


def profile(standing: Standing, log: Log) -> list[BlockCurve]:
    """The loss curves of all blocks of a dense model."""
    batches = _first(standing.clean, PROFILED_IMAGES)
    wanted = [standing.logits(standing.model.blocks, tokens).log_softmax(-1).cpu() for tokens in batches]
    curves = []
    for _ in track(standing.model.blocks, "profiling blocks"):
        curves.append(log.next(Curve, _curve, standing, wanted).losses)
        standing.ascend()
    return curves


def _first(batches: Sequence[torch.Tensor], images: int) -> list[torch.Tensor]:
    chosen = list[torch.Tensor]()
    while sum(map(len, chosen)) < images and len(chosen) < len(batches):
        chosen.append(batches[len(chosen)])
    return chosen


def _curve(standing: Standing, wanted: list[torch.Tensor]) -> Curve:
    """Every part of the block at hand, cut alone."""
    model, index, shaping = standing.model, standing.index, standing.recipe.shaping
    block, above = model.blocks[index], model.blocks[index + 1 :]
    batches = standing.clean[: len(wanted)]
    scores = standing.sensitivity()
    moments = standing.refit_moments(block) if standing.recipe.recovery else None

    def loss(candidate: SlimBlock) -> float:
        return standing.divergence([candidate, *above], batches, wanted)

    def cut(shape: BlockShape) -> SlimBlock:
        candidate, choice = copy.deepcopy(block), choose_for_shape(scores, shape)
        remove_channels(candidate, choice)
        if moments is not None:
            (fitted, judged), (mlp_fitted, mlp_judged) = moments
            if shape.hidden < block.shape.hidden:
                refit(candidate.mlp.fc2, "mlp.fc2", mlp_fitted.take(choice.hidden), mlp_judged.take(choice.hidden))
            elif shape.qk_dim < block.attn.qk_dim:
                return standing.cut(choice)[0]  # thinned heads attend differently
            else:
                size = block.attn.v_dim
                rows = [h * size + i for h, kept in zip(choice.heads, choice.value, strict=True) for i in kept]
                refit(candidate.attn.proj, "attn.proj", fitted.take(rows), judged.take(rows))
        return candidate

    whole = block.shape
    prune = standing.recipe.prune
    attention = [
        AttentionOption(heads=s.heads, qk_dim=s.qk_dim, v_dim=s.v_dim, loss=0.0 if s == whole else loss(cut(s)))
        for s in ([whole] if prune == "tokens" else attention_shapes(whole, scores, shaping))
    ]
    widths = [whole.hidden] if prune == "tokens" else widths_of(whole.hidden, shaping)
    hidden = [
        SizeOption(
            size=width,
            loss=0.0 if width == whole.hidden else loss(cut(whole.model_copy(update={"hidden": width}))),
        )
        for width in spread(widths, POINTS)
    ]
    tokens = []
    if prune != "channels" and index in shaping.stages(len(model.blocks)):
        counts = token_counts(model.architecture, index, shaping)
        for keep in spread(counts, POINTS):
            with keeping(model, index, keep):
                divergence = 0.0 if keep == whole.keep else loss(model.blocks[index])
            tokens.append(SizeOption(size=keep, loss=divergence))
        tokens = list(interpolated(tokens, counts))
    losses = BlockCurve(attention=tuple(attention), hidden=interpolated(hidden, widths), tokens=tuple(tokens))
    return Curve(block=index, losses=losses)


def attention_shapes(whole: BlockShape, scores: ChannelScores, shaping: Shaping) -> list[BlockShape]:
    """What the attention of a block may be cut to: whole heads, or what the paper's head search makes of thresholds."""
    if shaping.whole_heads:
        return [whole.model_copy(update={"heads": heads}) for heads in range(1, whole.heads + 1)]
    have = 2 * scores.query_key.numel() + scores.value.numel() + len(scores.hidden)
    found = {
        whole: None,
        whole.model_copy(update={"qk_dim": 1, "v_dim": 1}): None,
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
