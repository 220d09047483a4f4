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
from lowpass.pipeline.base.processes import by_the_first
from lowpass.pipeline.base.progress import logger, track
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.search.cascade import apply, refit_classifier
from lowpass.pipeline.search.costs import Costs, Macs, total
from lowpass.pipeline.search.curves import BlockCurve
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.log_entries import ChannelDecision, Plan, TokenDecision
from lowpass.pipeline.search.order import chooser
from lowpass.pipeline.search.plan import NEAR, least_cost, lost, plan
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.shaping import first_keep
from lowpass.pipeline.search.state import SearchState, keeping

TOLERANCE, TRIES = 0.02, 8  # of a measured plan
REFUSED_BEYOND = 0.05


@dataclass(frozen=True)
class CostTarget:
    """A target, the costs it is planned by, and its unit. `measure` gives the cost of a whole model where the sum of
    its parts is not exact: its latency. `how` it does; `batch` is how many images at once it is of. `limit`: what must
    not be exceeded at all, where a `throughput` in images a second is what is asked for."""

    value: float
    costs: Costs
    unit: str
    measure: Callable[[Architecture], float] | None = None
    how: str = "measured"
    batch: int | None = None
    limit: float = math.inf
    throughput: float | None = None

    @property
    def most(self) -> float:
        """What a plan may cost."""
        return min(self.value * (1 + REFUSED_BEYOND), self.limit)

    def out_of_reach(self, least: float) -> str:
        """How it is refused, where `least` is the least that a model was seen to cost."""
        if self.throughput is None or self.batch is None:
            return f"a target of {self.value:g} {self.named} is out of reach"
        images = 1000 * self.batch / least
        return (
            f"{self.throughput:g} images a second within {self.limit:g} ms are out of reach: there are {images:.4g} in "
            f"batches of {self.batch}, which take {least:.3g} {self.unit}"
        )

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
        targets: how far; any of them is enough. Of several processes the first has them, and plans.
        log: of the search.
    """
    dense = state.model.architecture
    planned = log.next(Plan, by_the_first, partial(best_plan, curves, dense, targets))
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
            made = make_plan(curves, dense, target)
        except InputError as error:
            refused.append(error)
        else:
            if target.throughput is not None:
                logger.info(f"batches of {made.batch}: build with --batch 1:{made.batch}:{made.batch}")
            return made
    raise refused[0]


def make_plan(curves: Sequence[BlockCurve], dense: Architecture, target: CostTarget) -> Plan:
    """The table for a target. Where a whole model can be measured, the plan is made again until the measure agrees.

    Raises:
        InputError: the target is out of reach; the message says what is not.
    """
    budget, tries, least = min(target.value, target.limit), list[Plan](), least_cost(curves, dense, target.costs)
    while True:
        blocks = plan(curves, dense, target.costs, budget)
        if blocks is None:
            break
        slim = dense.model_copy(update={"blocks": blocks})
        if target.measure is None:
            _say_if_far(total(target.costs, slim), target)
            return Plan(blocks=blocks, cost=total(target.costs, slim), batch=target.batch)
        tries.append(Plan(blocks=blocks, cost=target.measure(slim), batch=target.batch))
        logger.info(f"planned for {budget:.3g} {target.named}, {target.how} {tries[-1].cost:.3g}")
        near = abs(tries[-1].cost / target.value - 1) <= TOLERANCE and tries[-1].cost <= target.most
        if near or budget <= least or len(tries) == TRIES:
            break
        # The parts do not quite add up: aim as far beside the target as the measure was, down to the cheapest table.
        aim = min(target.value, target.limit * (1 - TOLERANCE))
        budget = max(budget * aim / tries[-1].cost, least)
    if not tries:
        raise InputError(f"{target.out_of_reach(least)}: at least {least:.4g} {target.unit} remain")
    met = [made for made in tries if made.cost <= target.most]
    if not met:
        fastest = min(made.cost for made in tries)
        raise InputError(f"{target.out_of_reach(fastest)}: the fastest model tried takes {fastest:.3g}")
    made = min(met, key=lambda made: abs(made.cost / target.value - 1))
    _say_if_far(made.cost, target)
    return made


def _say_if_far(cost: float, target: CostTarget) -> None:
    """A plan may be far below its target: what lies between loses more, or costs more."""
    if cost < target.value * (1 - (REFUSED_BEYOND if target.measure else 1 - NEAR)):
        logger.warning(
            f"planned: {cost:.4g} {target.named}, {100 * (1 - cost / target.value):.0f}% below the target of "
            f"{target.value:.4g}; no table is nearer that it would pay to cut to"
        )


def smallest(dense: Architecture, settings: SearchSettings, costs: Costs) -> Architecture:
    """With every block as small as it can be; with all its tokens where scoring them costs more than dropping saves."""
    found = [dense]
    for prune in {settings.prune, "channels" if settings.prune == "both" else settings.prune}:
        blocks = settings.shaping.smallest(dense.dense, first_keep(dense), prune, settings.sub_blocks)
        found.append(dense.model_copy(update={"blocks": blocks}))
    return min(found, key=lambda slim: total(costs, slim))


def smallest_share(architecture: Architecture, settings: SearchSettings) -> float:
    """The share of the MACs that is left when every block is as small as it can be."""
    return smallest(architecture, settings, Macs(architecture)).macs() / architecture.macs()


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
            met = f"{dense.dense.name} takes {before:.3g} {target.named} as it is"
            if target.throughput is None or target.batch is None:
                raise InputError(f"{met}; a target must be below that")
            raise InputError(f"{met}, {1000 * target.batch / before:.4g} images a second; a target must be above that")
        least = measure(smallest(dense, settings, target.costs))
        if least > target.most:
            missed[least / target.value] = (
                f"{target.out_of_reach(least)}: the smallest model takes {least:.3g} {target.unit}, the dense one "
                f"{before:.3g}"
            )
    if len(missed) == len(targets):
        raise InputError(missed[min(missed)])


MOST_AT_ONCE = 128  # images in the largest batch that is thought of


def batches_for(images_per_s: float, limit_ms: float) -> dict[int, float]:
    """The batches by which a throughput may be had within a limit, each with the milliseconds it may then take: powers
    of two, up to the first that may take all of the limit. A larger one would have to be faster still."""
    batches, batch = dict[int, float](), 1
    while batch <= MOST_AT_ONCE:
        batches[batch] = min(1000 * batch / images_per_s, limit_ms)
        if 1000 * batch / images_per_s >= limit_ms:
            break
        batch *= 2
    return batches
