"""The rivals of LFS and LFE: whatever scores, shapes and selection are the same; each is what it says."""

import copy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import MakeViT
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor
from torch.nn import functional as F

from lowpass.export.graph.deployable import deployable
from lowpass.export.onnx.trace import trace
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.session import logits_of
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.datasets import Batches, made_batches
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import choose_for_shape
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.method.token_choices import TokenCriterion, TokenScore
from lowpass.pipeline.method.token_scores import TOKEN_CRITERIA, keep_tokens
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.recipe import Recipe, make_recipe
from lowpass.pipeline.search.channel_criteria import (
    CHANNEL_CRITERIA,
    CriterionContext,
    ScoringBatch,
    low_frequency_sensitivity,
)
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.log_entries import Entry
from lowpass.pipeline.search.order import chooser
from lowpass.pipeline.search.search import search
from lowpass.pipeline.search.shaping import AS_PUBLISHED
from lowpass.pipeline.search.state import SearchState
from lowpass.pipeline.search.table import apply_table

SCORES: tuple[TokenScore, ...] = get_args(TokenScore)
CRITERIA = [(criterion, score) for criterion in TOKEN_CRITERIA for score in SCORES]
SHAPES = [  # of the blocks of `dense`
    BlockShape(heads=3, qk_dim=8, v_dim=8, hidden=60, keep=13),
    BlockShape(heads=2, qk_dim=5, v_dim=7, hidden=96, keep=13),
    BlockShape(heads=3, qk_dim=8, v_dim=8, hidden=96, keep=6),
]


def a_block(seed: int, heads: int, grid: int, distilled: bool, criterion: TokenCriterion, score: TokenScore) -> SlimViT:
    """A random model of one block, heads of unequal sizes."""
    torch.manual_seed(seed)
    kind = VisionTransformerDistilled if distilled else VisionTransformer
    sizes = {"img_size": 4 * grid, "patch_size": 4, "embed_dim": 8 * heads, "depth": 1, "num_heads": heads}
    return SlimViT.from_timm(kind(**sizes, num_classes=3).eval(), 0.85, "l2", score, criterion, seed)


@pytest.mark.parametrize(("criterion", "score"), CRITERIA)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 999),
    heads=st.integers(1, 3),
    grid=st.integers(2, 6),
    distilled=st.booleans(),
    batch=st.integers(1, 4),
    data=st.data(),
)
def test_any_token_criterion(
    criterion: TokenCriterion,
    score: TokenScore,
    seed: int,
    heads: int,
    grid: int,
    distilled: bool,
    batch: int,
    data: st.DataObject,
) -> None:
    """Finite scores of the documented shape; exactly `keep` tokens in raster order; prefix tokens survive; permuting
    the batch permutes the result."""
    model = a_block(seed, heads, grid, distilled, criterion, score)
    block, count, prefix = model.blocks[0], grid * grid, 1 + distilled
    keep = data.draw(st.integers(1, count - 1))
    model.set_keep(0, keep)
    tokens = torch.randn(batch, prefix + count, 8 * heads, generator=torch.Generator().manual_seed(seed))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def selecting(x: Tensor, scores: Tensor, number: int) -> Tensor:
        kept = keep_tokens(x, scores, number)
        seen.append((x, scores, kept))
        return kept

    block.keep_tokens = selecting
    with torch.no_grad():
        out = block(tokens)
        order = torch.tensor(data.draw(st.permutations(range(batch))))
        permuted = block(tokens[order])
    (x, scores, kept), _ = seen
    assert scores.shape == (batch, count) and bool(scores.isfinite().all())
    assert out.shape == kept.shape == (batch, prefix + keep, 8 * heads)
    assert torch.equal(kept[:, :prefix], x[:, :prefix])
    for row, all_of_it, its_scores in zip(kept, x, scores, strict=True):
        places = [int((all_of_it == token).all(1).nonzero()[0]) for token in row]
        assert places == sorted(set(places))
        stays = torch.zeros(count, dtype=torch.bool)
        stays[torch.tensor(places[prefix:]) - prefix] = True
        assert its_scores[stays].min() >= its_scores[~stays].max()
    torch.testing.assert_close(permuted, out[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
@settings(max_examples=10)
@given(seed=st.integers(0, 999), heads=st.integers(1, 3), data=st.data())
def test_any_channel_criterion(criterion: Any, seed: int, heads: int, data: st.DataObject) -> None:
    """Finite scores, none negative, of the documented shapes whatever the block's own; one image order is as good as
    another."""
    model = a_block(seed, heads, 3, False, "lfe-attention", "full")
    shape = BlockShape(
        heads=data.draw(st.integers(1, heads)),
        qk_dim=data.draw(st.integers(1, 8)),
        v_dim=data.draw(st.integers(1, 8)),
        hidden=data.draw(st.integers(1, 32 * heads)),
        keep=9,
    )
    drawn = CHANNEL_CRITERIA["random"](model, [], 0, CriterionContext(seed=seed))
    remove_channels(model.blocks[0], choose_for_shape(drawn, shape))
    generator = torch.Generator().manual_seed(seed)
    images = 128  # more than there are channels, or it hangs on rounding which of them make up for the others
    clean, low = torch.randn(2, images, 10, 8 * heads, generator=generator)
    labels = torch.randint(3, (images,), generator=generator)
    order = torch.tensor(data.draw(st.permutations(range(images))))
    scores, other = (
        CHANNEL_CRITERIA[criterion](model, [(clean[i], low[i], labels[i])], 0, CriterionContext(seed=seed))
        for i in (torch.arange(images), order)
    )
    assert scores.query_key.shape == (shape.heads, shape.qk_dim)
    assert scores.value.shape == (shape.heads, shape.v_dim)
    assert scores.hidden.shape == (shape.hidden,)
    every = (
        (one, two)
        for one, two in zip(vars(scores).values(), vars(other).values(), strict=True)
        if isinstance(one, torch.Tensor)
    )
    for one, two in every:
        assert bool(one.isfinite().all()) and float(one.min()) >= 0
        if scores.cumulative:  # of channels that cost the same either may go first, and then has the lower sum
            torch.testing.assert_close(one, two, rtol=0.1, atol=0.01)
            one, two = one.flatten().sort().values, two.flatten().sort().values
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-9)


@pytest.fixture(scope="module")
def dense(make_vit: MakeViT) -> SlimViT:
    """To be copied, not changed."""
    return SlimViT.from_timm(make_vit(depth=3))


@pytest.fixture(scope="module")
def batches(dense: SlimViT) -> Batches:
    made = made_batches(dense.architecture, 32, 16, seed=0)
    with torch.no_grad():
        return [(images, dense(images).argmax(-1)) for images, _ in made]


def streams(model: SlimViT, batches: Batches, block: int) -> list[ScoringBatch]:
    found = []
    for images, labels in batches:
        with torch.no_grad():
            tokens = model.embed(images)
            for below in model.blocks[:block]:
                tokens = below(tokens)
        found.append((tokens, torch.full_like(tokens, torch.nan), labels))  # nothing low-passed is read
    return found


def test_taylor_is_the_squared_product_on_unfiltered_images(dense: SlimViT, batches: Batches) -> None:
    model = copy.deepcopy(dense)
    for images, labels in batches:
        (F.cross_entropy(model(images), labels) / len(batches)).backward()
    layer: Any = model.blocks[1].mlp.fc1
    expected = (layer.weight.grad * layer.weight).square().sum(1)
    query, key = model.blocks[1].attn.query, model.blocks[1].attn.key
    pairs = sum((part.weight.grad * part.weight).square().sum(1) for part in (query, key))  # type: ignore[operator]
    scores = CHANNEL_CRITERIA["taylor"](dense, streams(dense, batches, 1), 1, CriterionContext())
    torch.testing.assert_close(scores.hidden, expected.detach(), rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(scores.query_key.flatten(), pairs.detach(), rtol=1e-3, atol=1e-12)


def test_magnitude_looks_at_weights_alone(dense: SlimViT) -> None:
    scores, attention = CHANNEL_CRITERIA["magnitude"](dense, [], 2, CriterionContext()), dense.blocks[2].attn
    assert scores.value[1, 3] == pytest.approx(float(attention.value.weight[8 + 3].square().sum().item()))
    pair = attention.query.weight[5].square().sum() + attention.key.weight[5].square().sum()
    assert scores.query_key[0, 5] == pytest.approx(float(pair.item()))


def test_chance_hangs_on_seed_and_block(dense: SlimViT, make_vit: MakeViT) -> None:
    def hidden(block: int, seed: int) -> list[float]:
        return CHANNEL_CRITERIA["random"](dense, [], block, CriterionContext(seed=seed)).hidden.tolist()

    assert hidden(0, 1) == hidden(0, 1) and len({tuple(hidden(b, s)) for b in range(3) for s in range(3)}) == 9

    def chance(seed: int) -> list[list[float]]:
        model = SlimViT.from_timm(make_vit(depth=3), token_criterion="random", token_seed=seed)
        for block, keep in enumerate((12, 9, 5)):
            model.set_keep(block, keep)
        return [block.chance.tolist() for block in model.blocks]

    assert chance(3) == chance(3) and [len(values) for values in chance(3)] == [16, 12, 9]
    assert chance(3)[0] != chance(4)[0] and chance(3)[0][:9] != chance(3)[2]


@pytest.mark.parametrize(("criterion", "score"), CRITERIA)
def test_only_attention_keeps_attention_from_fusing(
    criterion: TokenCriterion, score: TokenScore, make_vit: MakeViT
) -> None:
    model = SlimViT.from_timm(make_vit(depth=3), token_score=score, token_criterion=criterion)
    for block, shape in enumerate(SHAPES):
        model.set_keep(block, shape.keep)
    reads = [block.reads_attention for block in model.blocks]
    assert reads == ([score, None, score] if "attention" in criterion else [None] * 3)


def test_only_lfe_costs_its_filter(dense: SlimViT) -> None:
    shapes = {"blocks": tuple(SHAPES)}
    macs = {
        criterion: dense.architecture.model_copy(update={**shapes, "token_criterion": criterion}).macs()
        for criterion in TOKEN_CRITERIA
    }
    filters = (16 * 16 + 13 * 13) * 24
    assert macs["lfe"] == macs["lfe-attention"] == macs["attention"] + filters == macs["random"] + filters


@pytest.mark.parametrize(("criterion", "score"), [("attention", "cls"), ("lfe", "full"), ("random", "full")])
def test_an_export_scores_alike(criterion: TokenCriterion, score: TokenScore, make_vit: MakeViT) -> None:
    model = SlimViT.from_timm(make_vit(depth=3), token_score=score, token_criterion=criterion, token_seed=5)
    for block, shape in enumerate(SHAPES):
        model.set_keep(block, shape.keep)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images).numpy()
    found = logits_of(
        OnnxRuntime(trace(deployable(model), torch.zeros(2, 3, 16, 16)).SerializeToString()), images.numpy()
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def state_of(dense: SlimViT, batches: Batches, **settings: object) -> SearchState:
    recipe = make_recipe(
        model="tiny", data="digits", target_macs=0.6, recovery=False, channel_criterion="lfs", **settings
    )
    return SearchState(copy.deepcopy(dense), batches, [], recipe, Path())


def lfs(model: SlimViT, batches: Batches, block: int) -> ChannelScores:
    return low_frequency_sensitivity(model, batches, block)


def test_one_shot_scores_the_dense_model(dense: SlimViT, batches: Batches) -> None:
    choose = chooser(state_of(dense, batches, order="one-shot"), SHAPES)
    for block in (0, 1):
        assert choose(block) == choose_for_shape(lfs(dense, batches, block), SHAPES[block])
    assert choose(2) is None


def test_top_down_scores_below_what_is_cut(dense: SlimViT, batches: Batches) -> None:
    model = copy.deepcopy(dense)
    expected = {}
    for block in (2, 1, 0):
        model.set_keep(block, SHAPES[block].keep)
        if block < 2:
            expected[block] = choose_for_shape(lfs(model, batches, block), SHAPES[block])
            remove_channels(model.blocks[block], expected[block])
    choose = chooser(state_of(dense, batches, order="top-down"), SHAPES)
    assert {block: choose(block) for block in (0, 1)} == expected and choose(2) is None


def test_bottom_up_scores_above_what_is_cut(dense: SlimViT, batches: Batches) -> None:
    model = copy.deepcopy(dense)
    for block in (0, 1):
        model.set_keep(block, SHAPES[block].keep)
        remove_channels(model.blocks[block], choose_for_shape(lfs(model, batches, block), SHAPES[block]))
    model.set_keep(2, SHAPES[2].keep)
    found = state_of(dense, batches)
    apply_table(found, tuple(SHAPES))
    assert found.model.architecture.blocks == model.architecture.blocks == tuple(SHAPES)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


def pruned(dense: SlimViT, batches: Batches, recipe: Recipe) -> Architecture:
    model, made = copy.deepcopy(dense), list[Entry]()
    search(model, batches[:1], batches, recipe, Path(), SearchLog([], made.append))
    return model.architecture


@pytest.mark.parametrize("goal", [{"target_macs": 0.7}, {"allowable_drop": 30.0}])
@pytest.mark.parametrize("prune", ["channels", "tokens"])
def test_only_what_may_go_goes(prune: str, goal: dict[str, float], make_vit: MakeViT) -> None:
    model = SlimViT.from_timm(make_vit(img_size=24, embed_dim=48, depth=3))  # enough tokens that their filter pays
    made = made_batches(model.architecture, 32, 16, seed=0)
    with torch.no_grad():
        batches = [(images, model(images).argmax(-1)) for images, _ in made]
    recipe = make_recipe(model="tiny", data="digits", shaping=AS_PUBLISHED, prune=prune, **goal)
    slim, whole = pruned(model, batches, recipe), model.architecture
    for block, before in zip(slim.blocks, whole.blocks, strict=True):
        kept = {"channels": {"keep": before.keep}, "tokens": before.model_dump(exclude={"keep"})}[prune]
        assert kept.items() <= block.model_dump().items()
    share = slim.macs() / whole.macs()
    assert 0.99 * 0.7 <= share <= 0.7 if "target_macs" in goal else share < 1


def test_an_order_needs_a_target() -> None:
    with pytest.raises(InputError, match="--order top-down goes with a target"):
        make_recipe(model="tiny", data="digits", allowable_drop=9.5, order="top-down")
