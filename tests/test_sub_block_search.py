"""A search that may take whole parts out of blocks: what it measures, what it decides, and that it says so."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeViT
from gone_parts import NO_ATTENTION, NO_MLP
from torch.nn import functional as F

from lowpass.api import recipe_of
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.datasets import Batches, made_batches
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import choose_for_shape
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.recipe import make_recipe
from lowpass.pipeline.search.costs import Macs
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.log_entries import ChannelDecision, Curve, Entry, Plan, TokenDecision, in_a_line
from lowpass.pipeline.search.loss_curves import measure_loss_curves
from lowpass.pipeline.search.search import search
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.shaping import SHAPINGS
from lowpass.pipeline.search.state import SearchState
from lowpass.pipeline.search.sub_blocks import choose_of_the_rest, gone_rows, least_liked_first
from lowpass.pipeline.search.target import CostTarget, smallest_share

SMALL = SHAPINGS["tensorrt"].model_copy(update={"align": 8, "token_stages": 2})


@pytest.fixture(scope="module")
def dense(make_vit: MakeViT) -> SlimViT:
    """To be copied, not changed."""
    return SlimViT.from_timm(make_vit(img_size=24, embed_dim=48, depth=4))


@pytest.fixture(scope="module")
def batches(dense: SlimViT) -> Batches:
    """Labelled with what the dense model sees in it."""
    with torch.no_grad():
        return [(images, dense(images).argmax(-1)) for images, _ in made_batches(dense.architecture, 32, 16, seed=0)]


def asked(**changes: Any) -> SearchSettings:
    return SearchSettings.model_validate({"sub_blocks": True, "shaping": SMALL} | changes)


def found(
    dense: SlimViT, batches: Batches, settings: SearchSettings, decided: list[Entry] | None = None
) -> tuple[SlimViT, list[Entry]]:
    """The pruned copy of `dense`, and the decisions made beyond those `decided`."""
    model, made = copy.deepcopy(dense), list[Entry]()
    search(model, batches, batches, settings, Path(), SearchLog(decided or [], made.append))
    return model, made


@pytest.mark.parametrize("recovery", [True, False])
def test_the_loss_of_a_part_is_that_of_the_model_without_it(dense: SlimViT, batches: Batches, recovery: bool) -> None:
    """Of each part of each block; what lies above is not yet refitted to it."""
    settings = asked(target_macs=0.5, recovery=recovery)
    curves = measure_loss_curves(SearchState(copy.deepcopy(dense), batches, [], settings, Path()), SearchLog())
    for index in range(4):
        assert [option.heads for option in curves[index].attention] == [0, 1, 2, 3]
        assert curves[index].hidden[0].size == 0
        for gone, loss in ((NO_ATTENTION, curves[index].attention[0].loss), (NO_MLP, curves[index].hidden[0].loss)):
            state = SearchState(copy.deepcopy(dense), batches, [], settings, Path())
            for _ in range(index):
                state.ascend()
            shape = BlockShape(**dense.architecture.blocks[index].model_dump() | gone)
            state.accept(state.cut(choose_for_shape(state.channel_scores(), shape)))
            with torch.no_grad():
                left = [(state.model(images).log_softmax(-1), dense(images).log_softmax(-1)) for images, _ in batches]
            divergences = [F.kl_div(slim, whole, reduction="batchmean", log_target=True) for slim, whole in left]
            assert loss == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-3, abs=1e-6)
            assert loss > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.3, 0.1])
def test_a_target_may_cost_whole_parts(dense: SlimViT, batches: Batches, target: float) -> None:
    settings = asked(target_macs=target)
    whole = settings.model_copy(update={"sub_blocks": False})
    assert smallest_share(dense.architecture, settings) < target
    if target == 0.1:  # out of reach otherwise
        assert smallest_share(dense.architecture, whole) > target
    model, decisions = found(dense, batches, settings)
    (plan,) = [decision for decision in decisions if isinstance(decision, Plan)]
    assert model.architecture.blocks == plan.blocks
    assert 0.97 * target < model.architecture.macs() / dense.architecture.macs() <= target
    assert [b for b in plan.blocks if not (b.heads and b.hidden)] and any(b.heads for b in plan.blocks)
    tokens = {decision.block for decision in decisions if isinstance(decision, TokenDecision)}
    assert all(plan.blocks[index].heads for index in tokens)  # what drops tokens keeps its attention
    lines = [in_a_line(entry, dense.architecture, dense.architecture.macs()) for entry in decisions]
    assert any("its attention goes" in line or "its MLP goes" in line for line in lines)
    assert any("no attention" in line or "no MLP" in line for line in lines if line.startswith("plan"))
    assert "profiled block 0: without attention it would lose" in lines[0]
    for done in range(len(decisions)):  # taken up anywhere, it ends the same
        again, rest = found(dense, batches, settings, decisions[:done])
        assert rest == decisions[done:] and again.architecture == model.architecture
        same = zip(again.state_dict().values(), model.state_dict().values(), strict=True)
        assert all(torch.equal(one, two) for one, two in same)


def test_the_last_block_with_attention_is_paid_as_the_last(dense: SlimViT, batches: Batches) -> None:
    """By milliseconds a block that is computed for CLS alone costs little: that it may be another is seen."""

    class Milliseconds(Macs):
        def attention(self, tokens: int, shape: BlockShape, last: bool) -> float:
            return super().attention(tokens, shape, last) / (20 if last else 1)

        def mlp(self, tokens: int, hidden: int, last: bool) -> float:
            return super().mlp(tokens, hidden, last) / (20 if last else 1)

    settings = asked(target_latency=1.0, runtime="made up")
    model = copy.deepcopy(dense)
    costs = Milliseconds(dense.architecture)
    made: list[Entry] = []

    def target_of(architecture: Architecture) -> list[CostTarget]:
        return [CostTarget(0.15 * architecture.macs(), costs, "ms")]

    search(model, batches, batches, settings, Path(), SearchLog([], made.append), target_of)
    assert model.architecture.last_attention < 3
    assert model.architecture.blocks == next(entry for entry in made if isinstance(entry, Plan)).blocks


@pytest.mark.slow
def test_what_may_be_spent_goes_to_whole_parts_first(dense: SlimViT, batches: Batches) -> None:
    """Parts go where top-1 stays above the floor, and not where it does not."""
    unlabelled = [(images, torch.full_like(labels, -1)) for images, labels in batches]  # so that nothing can be lost
    model, decisions = found(dense, unlabelled, asked(allowable_drop=100.0))
    parts = [decision for decision in decisions if isinstance(decision, ChannelDecision)]
    assert not any(block.hidden for block in model.architecture.blocks)
    scoring = {decision.block for decision in decisions if isinstance(decision, TokenDecision) if decision.keep < 36}
    assert {index for index, block in enumerate(model.architecture.blocks) if block.heads} <= scoring
    rows = dense.architecture.blocks[0].heads * 48 + 192
    assert all(decision.dropped <= rows for decision in parts)
    assert parts[0].dropped == rows and [trial.amount for trial in parts[0].trials][-1] == rows

    for spent in (30.0, 60.0):
        model, decisions = found(dense, batches, asked(allowable_drop=spent))
        top1 = 100.0
        for decision in decisions:
            if isinstance(decision, ChannelDecision):
                assert decision.top1 >= top1 - spent / 4 - spent * 0.56  # at most one stage lies in a block
                accepted = [trial.top1 for trial in decision.trials if trial.amount == decision.dropped]
                assert not accepted or decision.top1 in accepted
            top1 = decision.top1 if isinstance(decision, ChannelDecision | TokenDecision) else top1
        for done in range(len(decisions)):
            again, rest = found(dense, batches, asked(allowable_drop=spent), decisions[:done])
            assert rest == decisions[done:] and again.architecture == model.architecture


def test_what_is_liked_least_is_tried_first() -> None:
    """By the sum over the part, a pair of query and key counted twice."""
    pairs, values, hidden = torch.tensor([[1.0], [0.9]]).expand(2, 3), torch.full((2, 3), 0.5), torch.full((10,), 1.4)
    assert least_liked_first(ChannelScores(pairs, values, hidden)) == ("mlp", "attention")  # 14 to 14.4
    scores = ChannelScores(pairs, values, hidden + 0.2)
    assert least_liked_first(scores) == ("attention", "mlp")
    nothing, attention, mlp = frozenset[Any](), frozenset[Any]({"attention"}), frozenset[Any]({"mlp"})
    assert [gone_rows(scores, gone) for gone in (nothing, attention, mlp, attention | mlp)] == [0, 18, 10, 28]
    shapes = [
        choose_of_the_rest(scores, n, SMALL.model_copy(update={"align": 2}), gone).shape(9)
        for n, gone in ((0, attention), (5, attention), (0, mlp), (12, mlp), (0, attention | mlp))
    ]
    sizes = [(shape.heads, shape.qk_dim, shape.v_dim, shape.hidden) for shape in shapes]
    assert sizes == [(0, 0, 0, 10), (0, 0, 0, 6), (2, 3, 3, 0), (1, 3, 3, 0), (0, 0, 0, 0)]


def test_parts_may_go_where_time_is_the_target() -> None:
    def settled(**given: Any) -> tuple[bool, object]:
        recipe = recipe_of("digits_deit", "digits", **given)
        return recipe.sub_blocks, recipe.shaping.token_stages

    by_time: dict[str, Any] = {"target_latency": 1.0, "runtime": "onnxruntime"}
    assert settled(**by_time) == (True, "auto")
    assert settled(**by_time, sub_blocks=False, token_stages="2") == (False, 2)
    assert settled(**by_time, as_published=True) == (False, 0)
    assert settled(**by_time, prune="tokens") == (False, "auto")
    # A recipe file that says nothing of either means the same.
    recipe = make_recipe(model="digits_deit", data="digits", **by_time)
    assert recipe.sub_blocks and recipe.shaping.token_stages == "auto"
    assert not make_recipe(model="digits_deit", data="digits", **by_time, shaping=SMALL).sub_blocks
    assert settled(target_macs=0.5) == (False, 3) and settled(target_macs=0.5, sub_blocks=True) == (True, 3)
    assert settled(allowable_drop=9.5) == (False, 3)
    for given, said in (
        ({"target_macs": 0.5, "token_stages": "auto"}, "--token-stages auto goes with --target-latency"),
        (by_time | {"prune": "tokens", "sub_blocks": True}, "--sub-blocks removes channels"),
        (by_time | {"token_stages": "some"}, "token_stages.*'some' is neither a number nor auto"),
        (by_time | {"token_stages": -1}, "token_stages.*-1 is below 0"),
        (by_time | {"token_stages": "--3"}, "'--3' is neither a number nor auto"),
    ):
        with pytest.raises(InputError, match=said):
            recipe_of("digits_deit", "digits", **given)


def test_more_stages_than_asked_for_are_offered_and_those_that_pay_are_taken(dense: SlimViT, batches: Batches) -> None:
    """Where scoring costs as much as dropping saves, no token goes; where it costs nothing, some do."""

    class Costly(Macs):
        def __init__(self, architecture: Architecture, scoring: float) -> None:
            super().__init__(architecture)
            self.scoring = scoring

        def selection(self, image_tokens: int, last: bool) -> float:
            return self.scoring

    def stages(scoring: float) -> int:
        settings = asked(
            target_latency=1.0, runtime="made up", shaping=SMALL.model_copy(update={"token_stages": "auto"})
        )
        model = copy.deepcopy(dense)
        costs = Costly(dense.architecture, scoring)
        target = CostTarget(0.35 * dense.architecture.macs(), costs, "ms")
        made: list[Entry] = []
        search(model, batches, batches, settings, Path(), SearchLog([], made.append), lambda _: [target])
        assert all(curve.losses.tokens for curve in made if isinstance(curve, Curve))
        return sum(block.scores_tokens for block in model.blocks)

    assert stages(dense.architecture.macs() / 2) == 0 < stages(0.0)
