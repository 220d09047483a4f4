"""The knapsack against trying everything, and the costs it is planned by."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import timm
from conftest import MakeViT
from hypothesis import given, settings
from hypothesis import strategies as st

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture, DenseViT
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.costs import Costs, Macs, total
from lowpass.pipeline.search.curves import AttentionOption, BlockCurve, SizeOption, interpolated
from lowpass.pipeline.search.latency_table import LatencyTable
from lowpass.pipeline.search.log_entries import Plan
from lowpass.pipeline.search.loss_curves import spread
from lowpass.pipeline.search.plan import NEAR, least_cost, lost, plan
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.shaping import SHAPINGS
from lowpass.pipeline.search.target import (
    REFUSED_BEYOND,
    CostTarget,
    batches_for,
    best_plan,
    check_measured_targets,
    make_plan,
)

DEPTH = 3


@pytest.fixture(scope="module")
def architecture(make_vit: MakeViT) -> Architecture:
    return SlimViT.from_timm(make_vit(img_size=24, embed_dim=48, depth=DEPTH)).architecture


def sizes_of(whole: int, sizes: Sequence[int], losses: Sequence[float]) -> tuple[SizeOption, ...]:
    return (*(SizeOption(size=s, loss=x) for s, x in zip(sizes, losses, strict=True)), SizeOption(size=whole, loss=0))


losses = st.floats(0.01, 1)


@st.composite
def curves(draw: st.DrawFn, parts_may_go: bool = False) -> list[BlockCurve]:
    made = []
    for block in range(DEPTH):
        attention = [AttentionOption(heads=h, qk_dim=16, v_dim=16, loss=draw(losses)) for h in (1, 2)]
        attention.append(AttentionOption(heads=3, qk_dim=16, v_dim=16, loss=0))
        tokens = sizes_of(36, (9, 18), sorted((draw(losses), draw(losses)), reverse=True)) if block else ()
        hidden = sizes_of(192, (48, 96), (draw(losses), draw(losses)))
        if parts_may_go:
            attention[0] = AttentionOption(heads=0, qk_dim=0, v_dim=0, loss=draw(losses))
            hidden = (SizeOption(size=0, loss=draw(losses)), *hidden[1:])
            tokens = tokens[1:]
        made.append(BlockCurve(attention=tuple(attention), hidden=hidden, tokens=tokens))
    return made


def every_table(of: list[BlockCurve]) -> list[tuple[float, tuple[BlockShape, ...]]]:
    """All tables with their losses."""
    found = []
    parts = [itertools.product(c.attention, c.hidden, c.tokens or [SizeOption(size=36, loss=0)]) for c in of]
    for combination in itertools.product(*parts):
        tokens, loss, blocks = 36, 0.0, []
        for curve, (shape, hidden, kept) in zip(of, combination, strict=True):
            keep = kept.size if curve.tokens else tokens
            if keep > tokens or (keep < tokens and not shape.heads):
                break
            before = {option.size: option.loss for option in curve.tokens}.get(tokens, 0.0)
            loss += shape.loss + hidden.loss + (kept.loss - before if keep < tokens else 0.0)
            tokens = keep
            sizes = shape.model_dump(exclude={"loss"})
            blocks.append(BlockShape(**sizes, hidden=hidden.size, keep=keep))
        else:
            found.append((loss, tuple(blocks)))
    return found


def smooth_curves() -> list[BlockCurve]:
    """Of which a table can be made for nearly any cost; no token may go."""
    attention = tuple(AttentionOption(heads=h, qk_dim=16, v_dim=16, loss=0.1 * (3 - h)) for h in (1, 2, 3))
    hidden = tuple(SizeOption(size=s, loss=(192 - s) / 192) for s in range(4, 193, 4))
    return [BlockCurve(attention=attention, hidden=hidden, tokens=())] * DEPTH


class Kernels:
    """Every part takes time for its being there, and hardly any where but a row is computed."""

    def ends(self) -> float:
        return 1.0

    def attention(self, tokens: int, shape: BlockShape, last: bool) -> float:
        return (0.3 if last else 1 + tokens * shape.heads / 80) if shape.heads else 0.0

    def mlp(self, tokens: int, hidden: int, last: bool) -> float:
        return (0.2 if last else 0.5 + tokens * hidden / 6000) if hidden else 0.0

    def selection(self, image_tokens: int, last: bool) -> float:
        return 0.0 if last else 0.4


@pytest.mark.slow
@given(of=curves(), share=st.floats(0.25, 1))
def test_the_plan_loses_least_of_all_tables_within_the_target(
    architecture: Architecture, of: list[BlockCurve], share: float
) -> None:
    check_loses_least(architecture, of, Macs(architecture), share * architecture.macs())


@given(of=curves(parts_may_go=True), share=st.floats(0.1, 1), by_kernels=st.booleans())
@settings(max_examples=25)
def test_so_it_does_where_whole_parts_may_go(
    architecture: Architecture, of: list[BlockCurve], share: float, by_kernels: bool
) -> None:
    costs = Kernels() if by_kernels else Macs(architecture)
    check_loses_least(architecture, of, costs, share * total(costs, architecture))


def wasteful(architecture: Architecture, costs: Costs, entry: tuple[float, tuple[BlockShape, ...], float]) -> bool:
    """Whether a drop of tokens could be left out and all would cost no more."""
    _, blocks, cost = entry
    entering = [36, *(block.keep for block in blocks)]
    for before, after in itertools.pairwise(entering):
        if after < before:
            kept = tuple(b.model_copy(update={"keep": before if b.keep == after else b.keep}) for b in blocks)
            if total(costs, architecture.model_copy(update={"blocks": kept})) <= cost:
                return True
    return False


def check_loses_least(architecture: Architecture, of: list[BlockCurve], costs: Costs, target: float) -> None:
    within = [
        (loss, blocks, cost)
        for loss, blocks in every_table(of)
        if any(shape.heads for shape in blocks)  # or nobody sees the image
        if (cost := total(costs, architecture.model_copy(update={"blocks": blocks}))) <= target
    ]
    planned = plan(of, architecture, costs, target)
    least = min(
        total(costs, architecture.model_copy(update={"blocks": blocks}))
        for _, blocks in every_table(of)
        if any(shape.heads for shape in blocks)
    )
    assert least_cost(of, architecture, costs) == pytest.approx(least)
    if not within:
        assert planned is None
        return
    # Costs are binned: what is just near may not be seen so. And no stage is taken that costs more than it saves.
    near = [entry for entry in within if entry[2] >= 1.001 * NEAR * target and not wasteful(architecture, costs, entry)]
    by_table = {blocks: loss for loss, blocks, _ in within}
    assert planned in by_table  # within the target, and made of what was measured
    assert lost(of, architecture, planned) == pytest.approx(by_table[planned])
    assert not near or by_table[planned] <= min(loss for loss, *_ in near) + 1e-9


@given(share=st.floats(0.01, 1))
def test_costs_add_up_to_the_macs_of_the_model(architecture: Architecture, share: float) -> None:
    keep = max(1, round(36 * share))
    shape = BlockShape(heads=2, qk_dim=5, v_dim=7, hidden=50, keep=keep)
    slim = architecture.model_copy(update={"blocks": (shape,) * DEPTH})
    assert total(Macs(architecture), slim) == slim.macs()


def test_losses_in_between_are_interpolated_and_never_fall() -> None:
    measured = [SizeOption(size=s, loss=x) for s, x in ((0, 0.5), (10, 1.0), (20, 0.2), (30, 0.0))]
    got = {option.size: option.loss for option in interpolated(measured, [0, 5, 10, 15, 20, 25, 30])}
    assert got == pytest.approx({0: 1.0, 5: 1.0, 10: 1.0, 15: 0.6, 20: 0.2, 25: 0.1, 30: 0.0})


@given(st.lists(st.integers(0, 99), min_size=1, max_size=40, unique=True), st.integers(2, 9))
def test_spread_keeps_both_ends(values: list[int], points: int) -> None:
    values.sort()
    chosen = spread(values, points)
    assert chosen[0] == values[0] and chosen[-1] == values[-1] and len(chosen) <= points
    assert chosen == sorted(set(chosen) & set(values))


def table(dense: DenseViT) -> LatencyTable:
    return LatencyTable(
        dense=dense,
        runtime="onnxruntime",
        precision="fp32",
        batch=1,
        token_score="full",
        token_criterion="lfe-attention",
        machine={},
        ends_ms=1.0,
        tokens=(10, 20),
        rows=(32, 64),
        hidden=(96, 192),
        attention_ms=((1.0, 2.0), (2.0, 4.0)),
        mlp_ms=((1.0, 2.0), (3.0, 5.0)),
        selection_ms=(0.5, 0.9),
        last_ms=((0.2, 0.6), (0.4, 0.8)),
    )


def test_a_latency_table_interpolates(architecture: Architecture) -> None:
    costs = table(architecture.dense)
    assert costs.mlp(10, 96, last=False) == 1 and costs.mlp(20, 192, last=False) == 5
    assert costs.mlp(15, 144, last=False) == pytest.approx(2.75)
    assert costs.mlp(40, 96, last=False) == pytest.approx(7)  # beyond the grid it goes on
    half = BlockShape(heads=3, qk_dim=8, v_dim=8, hidden=1, keep=1)
    assert costs.attention(10, half, last=False) == pytest.approx(1.5)
    assert costs.selection(14, last=False) == pytest.approx(0.7)  # image tokens; CLS comes on top
    # Of the last block CLS's row is computed, and so neither its width nor what it selects matters.
    assert costs.attention(15, half, last=True) == pytest.approx(0.5)
    assert costs.mlp(20, 192, last=True) == costs.selection(14, last=True) == 0


def test_the_last_block_counts_as_the_last(architecture: Architecture) -> None:
    """It is cut where it costs, which a table of milliseconds sees otherwise than MACs."""
    costs, whole = table(architecture.dense), architecture.blocks
    for smaller in ({"hidden": 96}, {"keep": 5}):
        changed = architecture.with_block(len(whole) - 1, whole[-1].model_copy(update=smaller))
        assert total(costs, changed) == total(costs, architecture)
        assert total(Macs(architecture), changed) < total(Macs(architecture), architecture)


@pytest.mark.parametrize("off", [0.7, 1.0, 1.4])
def test_a_measured_target_is_met_though_parts_do_not_add_up(architecture: Architecture, off: float) -> None:
    """The whole model takes other than its parts: the plan is made again until the measure agrees."""
    costs = Macs(architecture)
    of = smooth_curves()
    asked: list[float] = []

    def measure(slim: Architecture) -> float:
        asked.append(off * slim.macs() ** 0.98 * architecture.macs() ** 0.02)
        return asked[-1]

    target = 0.6 * off * architecture.macs()
    made = make_plan(of, architecture, CostTarget(target, costs, "ms", measure))
    assert isinstance(made, Plan) and abs(made.cost / target - 1) <= 0.02
    assert made.cost == asked[-1] and len(asked) <= 5


def test_an_unreachable_measured_target_is_refused_with_what_is_reachable(architecture: Architecture) -> None:
    costs = Macs(architecture)
    of = [
        BlockCurve(
            attention=(AttentionOption(heads=3, qk_dim=16, v_dim=16, loss=0),),
            hidden=sizes_of(192, (96,), (1,)),
            tokens=(),
        )
    ] * DEPTH
    whole = architecture.macs()
    with pytest.raises(InputError, match="out of reach"):
        make_plan(of, architecture, CostTarget(0.2 * whole, costs, "ms", lambda slim: float(slim.macs())))
    least = least_cost(of, architecture, costs)
    with pytest.raises(InputError, match=re.escape(f"takes {2 * least:.3g}")):
        make_plan(
            of, architecture, CostTarget(least * (1 + REFUSED_BEYOND), costs, "ms", lambda slim: 2.0 * slim.macs())
        )


def test_no_stage_drops_tokens_at_a_cost_above_what_that_saves(architecture: Architecture) -> None:
    """However near the target it would come: all tokens kept would be faster."""

    class Dear(Macs):
        def selection(self, image_tokens: int, last: bool) -> float:
            return 0.05 * architecture.macs()

    of = [
        BlockCurve(
            attention=(AttentionOption(heads=2, qk_dim=16, v_dim=16, loss=0.1), whole),
            hidden=sizes_of(192, (96,), (0.2,)),
            tokens=tuple(SizeOption(size=size, loss=(36 - size) / 1e6) for size in (34, 35, 36)),
        )
        for whole in [AttentionOption(heads=3, qk_dim=16, v_dim=16, loss=0)] * DEPTH
    ]
    costs = Dear(architecture)
    for share in (0.6, 0.7, 0.8, 0.9):
        blocks = plan(of, architecture, costs, share * architecture.macs())
        assert blocks is not None and all(block.keep == 36 for block in blocks)
    least = (BlockShape(heads=2, qk_dim=16, v_dim=16, hidden=96, keep=36),) * DEPTH
    assert least_cost(of, architecture, costs) == total(costs, architecture.model_copy(update={"blocks": least}))


def test_what_misses_its_target_by_far_is_the_nearest_there_is_and_said(
    architecture: Architecture, caplog: pytest.LogCaptureFixture
) -> None:
    of = [
        BlockCurve(
            attention=(AttentionOption(heads=3, qk_dim=16, v_dim=16, loss=0),),
            hidden=sizes_of(192, (8, 96), (0.01, 0.2)),  # by an accident of measuring the narrower loses less
            tokens=(),
        )
    ] * DEPTH
    target = CostTarget(0.99 * architecture.macs(), Macs(architecture), "MACs")
    made = make_plan(of, architecture, target)
    assert sorted(block.hidden for block in made.blocks) == [96, 192, 192]
    assert "below the target of" in caplog.text and "planned" in caplog.text
    caplog.clear()
    make_plan(of, architecture, CostTarget(made.cost, Macs(architecture), "MACs"))
    assert not caplog.text


def test_a_limit_is_not_exceeded(architecture: Architecture) -> None:
    """A target may be missed by a little; what a batch may take at most, not."""
    of = smooth_curves()
    whole, steps = architecture.macs(), itertools.count()

    def measure(slim: Architecture) -> float:  # a little more than its parts, and never the same
        return slim.macs() * (1.03 + 0.002 * (next(steps) % 2))

    for limit, most in ((float("inf"), 0.5 * 1.05), (0.5 * whole, 0.5)):
        target = CostTarget(0.5 * whole, Macs(architecture), "ms", measure, batch=4)
        target = replace(target, limit=limit, throughput=8000 / whole)
        made = make_plan(of, architecture, target)
        assert 0.47 * whole < made.cost <= most * whole
    with pytest.raises(InputError, match=r"images a second within .* ms are out of reach: there are"):
        make_plan(of, architecture, replace(target, value=whole / 100, limit=whole / 100))


def test_a_measured_target_is_checked_before_the_search(architecture: Architecture) -> None:
    asked = SearchSettings(shaping=SHAPINGS["onnxruntime"])

    def refusal(target: float) -> str:
        goal = CostTarget(target * architecture.macs(), Macs(architecture), "ms", lambda slim: float(slim.macs()))
        with pytest.raises(InputError) as error:
            check_measured_targets([goal], architecture, asked)
        return str(error.value)

    assert "as it is" in refusal(1.1)
    assert "out of reach: the smallest model takes" in refusal(0.01)
    reachable = CostTarget(0.5 * architecture.macs(), Macs(architecture), "ms", lambda slim: float(slim.macs()))
    check_measured_targets([reachable], architecture, asked)
    barely = CostTarget(0.12 * architecture.macs(), Macs(architecture), "ms", lambda slim: float(slim.macs()))
    with pytest.raises(InputError, match="the smallest model takes"):
        check_measured_targets([barely], architecture, asked)
    check_measured_targets([barely], architecture, asked.model_copy(update={"sub_blocks": True}))


@given(rate=st.floats(0.1, 1e5), limit=st.floats(0.01, 1e4))
def test_batches_of_a_throughput_keep_to_the_limit(rate: float, limit: float) -> None:
    batches = batches_for(rate, limit)
    assert list(batches) == [2**i for i in range(len(batches))]
    for batch, ms in batches.items():
        assert ms <= limit and 1000 * batch / ms >= rate * (1 - 1e-9) and batch <= 128
    # The largest may take all of the limit: in a larger one more would have to be done in as long.
    assert max(batches) == 128 or batches[max(batches)] == limit


def test_of_several_targets_the_one_that_costs_least_is_planned_for(architecture: Architecture) -> None:
    """Beyond what dense does in a batch of one; larger batches come cheaper."""
    of = smooth_curves()
    whole = architecture.macs()

    def target(batch: int, share: float, out_of: float = 1.0) -> CostTarget:
        def measure(slim: Architecture) -> float:
            return slim.macs() / out_of

        return CostTarget(share * whole, Macs(architecture), "ms", measure, batch=batch)

    made = best_plan(of, architecture, [target(1, 0.4), target(4, 0.8), target(8, 0.6)])
    assert made.batch == 4 and made.cost == pytest.approx(0.8 * whole, rel=0.02)
    # What is planned for batch 4 takes ten times as long as its parts: batch 8 it is.
    made = best_plan(of, architecture, [target(1, 0.4), target(4, 0.8, 0.1), target(8, 0.6)])
    assert made.batch == 8 and made.cost == pytest.approx(0.6 * whole, rel=0.02)
    with pytest.raises(InputError, match="is out of reach"):
        best_plan(of, architecture, [target(1, 0.01), target(8, 0.02)])


def test_deit_small_has_the_macs_it_is_known_by() -> None:
    architecture = SlimViT.from_timm(timm.create_model("deit_small_patch16_224")).architecture
    assert architecture.macs() == pytest.approx(4.6e9, rel=0.01)
