"""A search with a target: MACs or milliseconds are met, and what is lost on the way is as little as can be.

First every part of every block of the dense model is cut alone to several sizes (channels by their criterion and
refitted, tokens by theirs), and the divergence of the final classes from the dense model's is measured. `plan.py` then
picks the table that meets the target at the least sum. Last, the blocks are cut to that table bottom-up, each scored
and refitted on the model as it then stands.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger, track
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.search.cascade import apply, refit_classifier
from lowpass.pipeline.search.costs import Costs, total
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.log_entries import ChannelDecision, Plan, TokenDecision
from lowpass.pipeline.search.order import chooser
from lowpass.pipeline.search.plan import BlockCurve, plan, refuse_unreachable
from lowpass.pipeline.search.shaping import Prune, Shaping, first_keep
from lowpass.pipeline.search.state import SearchState, keeping

TOLERANCE, TRIES = 0.02, 8  # of a measured plan
REFUSED_BEYOND = 0.05


@dataclass(frozen=True)
class CostTarget:
    """A target, the costs it is planned by, and its unit. `measure` gives the cost of a whole model where the sum of
    its parts is not exact: its latency. `how` it does."""

    value: float
    costs: Costs
    unit: str
    measure: Callable[[Architecture], float] | None = None
    how: str = "measured"


def search_to_target(curves: Sequence[BlockCurve], state: SearchState, target: CostTarget, log: SearchLog) -> None:
    """Prune `state`'s model in place.

    Args:
        curves: what `profile` found.
        state: over the model to prune, still dense.
        target: how far.
        log: of the search.
    """
    dense = state.model.architecture
    planned = log.next(Plan, make_plan, curves, dense, target)
    model = state.model
    choose = chooser(state, planned.blocks)
    for index, shape in enumerate(track(planned.blocks, "cutting blocks")):
        state.refit_attention()
        if shape.keep < model.blocks[index].tokens_in:
            log.next(TokenDecision, _kept, state, shape.keep)
            model.set_keep(index, shape.keep)
        apply(state, log.next(ChannelDecision, _cut_to, state, shape, choose))
        state.ascend()
    refit_classifier(state, log)


def _kept(state: SearchState, keep: int) -> TokenDecision:
    model, index = state.model, state.index
    with keeping(model, index, keep):
        top1 = state.top1(model.blocks[index:])
        return TokenDecision(block=index, keep=keep, top1=top1, macs=model.architecture.macs())


def _cut_to(state: SearchState, shape: BlockShape, choose: Callable[[int], ChannelChoice | None]) -> ChannelDecision:
    model, index = state.model, state.index
    choice = choose(index)
    block, refits = state.cut(choice)
    top1 = state.top1([block, *model.blocks[index + 1 :]])
    macs = model.architecture.with_block(index, shape).macs()
    return ChannelDecision(block=index, choice=choice, top1=top1, macs=macs, refits=refits)


def make_plan(curves: Sequence[BlockCurve], dense: Architecture, target: CostTarget) -> Plan:
    """The table for a target. Where a whole model can be measured, the plan is made again until the measure agrees.

    Raises:
        InputError: the target is out of reach; the message says what is not.
    """
    refuse_unreachable(curves, dense, target.costs, target.value, target.unit)
    budget, tries = target.value, list[Plan]()
    while True:
        blocks = plan(curves, dense, target.costs, budget)
        if blocks is None:
            break
        slim = dense.model_copy(update={"blocks": blocks})
        if target.measure is None:
            return Plan(blocks=blocks, cost=total(target.costs, slim))
        tries.append(Plan(blocks=blocks, cost=target.measure(slim)))
        logger.info(f"planned for {budget:.3g} {target.unit}, {target.how} {tries[-1].cost:.3g}")
        if abs(tries[-1].cost / target.value - 1) <= TOLERANCE or len(tries) == TRIES:
            break
        # The parts do not quite add up: aim as far beside the target as the measure was.
        budget *= target.value / tries[-1].cost
    met = [made for made in tries if made.cost <= target.value * (1 + REFUSED_BEYOND)]
    if not met:
        fastest = min(made.cost for made in tries)
        raise InputError(
            f"a target of {target.value:g} {target.unit} is out of reach: the fastest model tried takes {fastest:.3g}"
        )
    return min(met, key=lambda made: abs(made.cost / target.value - 1))


def smallest_share(architecture: Architecture, shaping: Shaping, prune: Prune) -> float:
    """The share of the MACs that is left when every block is as small as it can be."""
    blocks = shaping.smallest(architecture.dense, first_keep(architecture), prune)
    return architecture.model_copy(update={"blocks": blocks}).macs() / architecture.macs()


def check_target(architecture: Architecture, target_macs: float, shaping: Shaping, prune: Prune = "both") -> None:
    """Refuse a target below what is left when every block is as small as it can be.

    Raises:
        InputError: with the lowest share of the MACs that can be reached.
    """
    lowest = smallest_share(architecture, shaping, prune)
    if target_macs < lowest:
        share = math.ceil(lowest * 1000) / 1000
        raise InputError(
            f"a MACs target of {target_macs:g} is out of reach for {architecture.dense.name}: "
            f"at least {share:.3f} of the dense MACs remain; the paper's targets are 0.45 to 0.6"
        )


def check_measured_target(target: CostTarget, dense: Architecture, shaping: Shaping, prune: Prune) -> None:
    """Refuse a measured target that the dense model meets already or that the smallest model misses.

    Raises:
        InputError: with what was measured.
    """
    if target.measure is None:
        return
    before = target.measure(dense)
    if before <= target.value:
        raise InputError(f"{dense.dense.name} takes {before:.3g} {target.unit} as it is; a target must be below that")
    blocks = shaping.smallest(dense.dense, first_keep(dense), prune)
    least = target.measure(dense.model_copy(update={"blocks": blocks}))
    if least > target.value * (1 + REFUSED_BEYOND):
        raise InputError(
            f"a target of {target.value:g} {target.unit} is out of reach: the smallest model takes {least:.3g} "
            f"{target.unit}, the dense one {before:.3g}"
        )
