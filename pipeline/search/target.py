"""A search with a target: MACs or milliseconds are met, and what is lost on the way is as little as can be.

First every part of every block of the dense model is cut alone to several sizes (channels by their criterion and
refitted, tokens by theirs), and the divergence of the final classes from the dense model's is measured. `plan.py` then
picks the table that meets the target at the least sum. Last, the blocks are cut to that table bottom-up, each scored
and refitted on the model as it then stands.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger, track
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.search.cascade import apply, refit_classifier
from lowpass.pipeline.search.costs import Costs, total
from lowpass.pipeline.search.curves import BlockCurve
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.log_entries import ChannelDecision, Plan, TokenDecision
from lowpass.pipeline.search.order import chooser
from lowpass.pipeline.search.plan import least_cost, lost, plan
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.shaping import first_keep
from lowpass.pipeline.search.state import SearchState, keeping

TOLERANCE, TRIES = 0.02, 8  # of a measured plan
REFUSED_BEYOND = 0.05


@dataclass(frozen=True)
class CostTarget:
    """A target, the costs it is planned by, and its unit. `measure` gives the cost of a whole model where the sum of
    its parts is not exact: its latency. `how` it does; `batch` is how many images at once it is of."""

    value: float
    costs: Costs
    unit: str
    measure: Callable[[Architecture], float] | None = None
    how: str = "measured"
    batch: int | None = None

    @property
    def named(self) -> str:
        """The unit, and of what."""
        return self.unit if self.batch is None else f"{self.unit} for a batch of {self.batch}"


def search_to_target(
    curves: Sequence[BlockCurve], state: SearchState, targets: Sequence[CostTarget], log: SearchLog
) -> None:
    """Prune `state`'s model in place.

    Args:
        curves: what `profile` found.
        state: over the model to prune, still dense.
        targets: how far; any of them is enough.
        log: of the search.
    """
    dense = state.model.architecture
    planned = log.next(Plan, best_plan, curves, dense, targets)
    model = state.model
    choose = chooser(state, planned.blocks)
    for index, shape in enumerate(track(planned.blocks, "cutting blocks")):
        if shape.heads:
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
    cut = state.cut(choice)
    macs = model.architecture.with_block(index, shape).macs()
    return ChannelDecision(block=index, choice=choice, top1=state.top1_with(cut), macs=macs, refits=cut.refits)


def best_plan(curves: Sequence[BlockCurve], dense: Architecture, targets: Sequence[CostTarget]) -> Plan:
    """Of the plans for several targets the one that loses least.

    Raises:
        InputError: none is within reach; the message is that of the one that seemed nearest.
    """
    order = list(targets)
    if len(targets) > 1:
        found = [(target, plan(curves, dense, target.costs, target.value)) for target in targets]
        losses = {id(target): math.inf if blocks is None else lost(curves, dense, blocks) for target, blocks in found}
        order.sort(key=lambda target: losses[id(target)])
    refused = list[InputError]()
    for target in order:
        try:
            return make_plan(curves, dense, target)
        except InputError as error:
            refused.append(error)
    raise refused[0]


def make_plan(curves: Sequence[BlockCurve], dense: Architecture, target: CostTarget) -> Plan:
    """The table for a target. Where a whole model can be measured, the plan is made again until the measure agrees.

    Raises:
        InputError: the target is out of reach; the message says what is not.
    """
    budget, tries = target.value, list[Plan]()
    while True:
        blocks = plan(curves, dense, target.costs, budget)
        if blocks is None:
            break
        slim = dense.model_copy(update={"blocks": blocks})
        if target.measure is None:
            return Plan(blocks=blocks, cost=total(target.costs, slim), batch=target.batch)
        tries.append(Plan(blocks=blocks, cost=target.measure(slim), batch=target.batch))
        logger.info(f"planned for {budget:.3g} {target.named}, {target.how} {tries[-1].cost:.3g}")
        if abs(tries[-1].cost / target.value - 1) <= TOLERANCE or len(tries) == TRIES:
            break
        # The parts do not quite add up: aim as far beside the target as the measure was.
        budget *= target.value / tries[-1].cost
    refused = f"a target of {target.value:g} {target.unit} is out of reach"
    if not tries:
        raise InputError(f"{refused}: at least {least_cost(curves, dense, target.costs):.4g} {target.unit} remain")
    met = [made for made in tries if made.cost <= target.value * (1 + REFUSED_BEYOND)]
    if not met:
        raise InputError(f"{refused}: the fastest model tried takes {min(made.cost for made in tries):.3g}")
    return min(met, key=lambda made: abs(made.cost / target.value - 1))


def smallest(dense: Architecture, settings: SearchSettings) -> Architecture:
    """With every block as small as it can be."""
    blocks = settings.shaping.smallest(dense.dense, first_keep(dense), settings.prune, settings.sub_blocks)
    return dense.model_copy(update={"blocks": blocks})


def smallest_share(architecture: Architecture, settings: SearchSettings) -> float:
    """The share of the MACs that is left when every block is as small as it can be."""
    return smallest(architecture, settings).macs() / architecture.macs()


def check_target(architecture: Architecture, target_macs: float, settings: SearchSettings) -> None:
    """Refuse a target below what is left when every block is as small as it can be.

    Raises:
        InputError: with the lowest share of the MACs that can be reached.
    """
    lowest = smallest_share(architecture, settings)
    if target_macs < lowest:
        share = math.ceil(lowest * 1000) / 1000
        raise InputError(
            f"a MACs target of {target_macs:g} is out of reach for {architecture.dense.name}: "
            f"at least {share:.3f} of the dense MACs remain; the paper's targets are 0.45 to 0.6"
        )


def check_measured_targets(targets: Sequence[CostTarget], dense: Architecture, settings: SearchSettings) -> None:
    """Refuse measured targets one of which the dense model meets already, or all of which the smallest model misses.
    Where there are several, they are judged by what they are planned by: to measure each would take long.

    Raises:
        InputError: with what was measured.
    """
    missed = dict[float, str]()  # by how many times the target the smallest model takes
    for target in targets:
        if target.measure is None:
            return
        measure = target.measure if len(targets) == 1 else partial(total, target.costs)
        before = measure(dense)
        if before <= target.value:
            raise InputError(
                f"{dense.dense.name} takes {before:.3g} {target.named} as it is; a target must be below that"
            )
        least = measure(smallest(dense, settings))
        if least > target.value * (1 + REFUSED_BEYOND):
            missed[least / target.value] = (
                f"a target of {target.value:g} {target.named} is out of reach: the smallest model takes {least:.3g} "
                f"{target.unit}, the dense one {before:.3g}"
            )
    if len(missed) == len(targets):
        raise InputError(missed[min(missed)])


MOST_AT_ONCE = 128  # images in the largest batch that is thought of


def batches_for(images_per_s: float, limit_ms: float) -> dict[int, float]:
    """The batches by which a throughput may be had within a limit, each with the milliseconds it may then take.

    A batch that takes all of the limit and more for its share of the throughput gains nothing over the largest that
    does not.
    """
    batches = {1: min(1000 / images_per_s, limit_ms)}
    batch = 2
    while batch <= MOST_AT_ONCE and 1000 * batch / images_per_s <= limit_ms:
        batches[batch] = 1000 * batch / images_per_s
        batch *= 2
    return batches
