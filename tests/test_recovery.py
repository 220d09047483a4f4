"""Recovery: ridge regression against a solver of its own, and what it does to a pruned block."""

import copy
from pathlib import Path
from typing import cast

import pytest
import torch
from conftest import MakeViT
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import LayerScale
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.data.datasets import Batches, made_batches
from lowpass.pipeline.method.channels import ChannelChoice, choose_channels, choose_for_shape
from lowpass.pipeline.method.query_key_recovery import refit_query_key
from lowpass.pipeline.method.recovery import (
    HELD_OUT_EVERY,
    RIDGE_TOLERANCE,
    RIDGES,
    Readout,
    moments,
    refit,
    token_weights,
    unscaled,
)
from lowpass.pipeline.method.token_scores import kept_indices
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.loss_curves import measure_loss_curves
from lowpass.pipeline.search.recovery_targets import query_key_of
from lowpass.pipeline.search.state import SearchState


def rows(seed: int, images: int = 16, tokens: int = 9, width: int = 6, out: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, tokens, width, generator=generator)
    mix = torch.randn(width, out, generator=generator)
    targets = features @ mix + 0.3 + 0.1 * torch.randn(images, tokens, out, generator=generator)
    return features, targets, torch.rand(tokens, generator=generator)


@given(seed=st.integers(0, 1000), chunk=st.integers(1, 16))
def test_refit_is_weighted_ridge_regression_that_beats_what_was_there(seed: int, chunk: int) -> None:
    features, targets, weights = rows(seed)
    parts = zip(features.split(chunk), targets.split(chunk), strict=True)
    fitted, judged = moments((x, y, weights) for x, y in parts)
    torch.manual_seed(seed)
    layer = nn.Linear(6, 4)
    before = copy.deepcopy(layer)
    done = refit(layer, "layer", fitted, judged)
    held = torch.arange(len(features)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    x = torch.cat([features, torch.ones_like(features[..., :1])], -1).double()
    y, now = targets.double(), torch.cat([before.weight.T, before.bias[None]]).detach().double()

    def error(solution: Tensor) -> float:
        squared = (x[held] @ solution - y[held]).square().sum(-1)
        return float((squared * weights).sum() / (weights.sum() * held.sum()))

    def stacked(seen: Tensor, ridge: float) -> Tensor:
        """The same by least squares on stacked rows: sqrt-weighted data above, the ridge's pull below."""
        root = weights.sqrt().double()[None, :, None]
        inputs, wanted = ((part * root)[seen].flatten(0, 1) for part in (x, y))
        pull = (ridge * inputs[:, :-1].square().sum() / 6) ** 0.5 * torch.eye(7, dtype=torch.float64)
        pull[-1, -1] = 0
        return torch.linalg.lstsq(torch.cat([inputs, pull]), torch.cat([wanted, pull @ now])).solution

    errors = {ridge: error(stacked(~held, ridge)) for ridge in RIDGES}
    assert done.ridge in RIDGES and done.after < done.before == pytest.approx(error(now), rel=1e-4)
    assert done.after == pytest.approx(errors[done.ridge], rel=1e-3)
    # The largest ridge that is about as good as the best, then all images.
    assert errors[done.ridge] <= min(errors.values()) * (1 + RIDGE_TOLERANCE) * (1 + 1e-6)
    assert all(
        e > min(errors.values()) * (1 + RIDGE_TOLERANCE) * (1 - 1e-6) for r, e in errors.items() if r > done.ridge
    )
    solution = stacked(torch.ones_like(held), done.ridge)
    torch.testing.assert_close(layer.weight.double(), solution[:-1].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.double(), solution[-1], rtol=1e-4, atol=1e-5)


def test_a_refit_that_does_not_help_is_not_taken() -> None:
    """Held-out images that follow another rule than those fitted on: what is there stays, to the bit."""
    features, targets, weights = rows(0)
    held = torch.arange(len(features)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        targets[held] = layer(features[held])
    before = copy.deepcopy(layer)
    done = refit(layer, "layer", *moments([(features, targets, weights)]))
    assert done.ridge is None and done.after == done.before
    assert torch.equal(layer.weight, before.weight) and torch.equal(layer.bias, before.bias)


@given(seed=st.integers(0, 100), kept=st.sets(st.integers(0, 5), min_size=1))
def test_moments_of_some_features_are_part_of_those_of_all(seed: int, kept: set[int]) -> None:
    features, targets, weights = rows(seed)
    chosen = sorted(kept)
    for part, whole in zip(
        moments([(features[..., chosen], targets, weights)]), moments([(features, targets, weights)]), strict=True
    ):
        taken = whole.take(chosen)
        torch.testing.assert_close(taken.gram, part.gram)
        torch.testing.assert_close(taken.cross, part.cross)


def test_too_few_images_are_refused() -> None:
    features, targets, weights = rows(0, images=HELD_OUT_EVERY - 1)
    with pytest.raises(ValueError, match="at least"):
        moments([(features, targets, weights)])


def test_only_what_is_read_counts() -> None:
    like = torch.zeros(1)
    cls, mean, both = Readout(1, False, True), Readout(0, True, False), Readout(1, True, True)
    assert token_weights(6, 1, cls, True, like).tolist() == [1, 0, 0, 0, 0, 0]
    assert token_weights(6, 1, cls, False, like).tolist() == [5, 1, 1, 1, 1, 1]
    assert token_weights(6, 2, Readout(2, False, True), False, like).tolist() == [2, 2, 1, 1, 1, 1]
    # Where the mean of the image tokens is read, alone or with CLS, and where there are no prefix tokens at all.
    assert token_weights(6, 1, mean, True, like).tolist() == [0, 1, 1, 1, 1, 1]
    assert token_weights(6, 1, both, True, like).tolist() == [5, 1, 1, 1, 1, 1]
    assert token_weights(6, 1, mean, False, like).tolist() == [1, 1, 1, 1, 1, 1]
    assert token_weights(6, 0, mean, True, like).tolist() == [1, 1, 1, 1, 1, 1]
    # Registers are read by attention alone, unless a pool takes all tokens in.
    assert token_weights(7, 3, cls, True, like).tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert token_weights(7, 3, cls, False, like).tolist() == [4, 1, 1, 1, 1, 1, 1]
    assert token_weights(7, 3, Readout(3, True, False), True, like).tolist() == [1, 1, 1, 1, 1, 1, 1]


def test_what_a_model_reads_is_known(make_vit: MakeViT) -> None:
    def readout(**changes: object) -> Readout:
        return SlimViT.from_timm(make_vit(**changes)).architecture.dense.readout

    assert readout() == readout(reg_tokens=4) == Readout(1, False, True)
    assert readout(kind=VisionTransformerDistilled) == Readout(2, False, True)
    pooled = {"reg_tokens": 4, "global_pool": "avg"}
    assert readout(**pooled) == Readout(0, True, False)
    assert readout(**pooled, pool_include_prefix=True) == Readout(5, True, False)


def test_a_channel_that_hardly_reaches_the_stream_does_not_decide() -> None:
    """Layer scale: the error of the last channel, divided by next to nothing, would be all that counts."""
    features, targets, weights = rows(0)
    unit = torch.tensor([1.0, 1.0, 1.0, 1e-6])
    generator = torch.Generator().manual_seed(1)
    targets[..., 3] = 1e4 * torch.randn(targets.shape[:2], generator=generator)  # nothing to be learned
    fitted, judged = moments([(features, targets, weights)])
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    assert refit(copy.deepcopy(layer), "layer", fitted, judged).ridge is None
    seeing = refit(layer, "layer", fitted, judged, unit)
    assert seeing.ridge is not None and seeing.after < 0.01 * seeing.before


def test_layer_scale_is_divided_out_where_it_is_on() -> None:
    scale, layer = LayerScale(3), nn.Linear(2, 3)
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([2.0, 0.0, -0.5]))
    features = torch.randn(4, 2)
    wanted = unscaled(torch.ones(4, 3), scale.gamma.detach(), layer, features)
    assert torch.equal(wanted[:, 0], torch.full((4,), 0.5)) and torch.equal(wanted[:, 2], torch.full((4,), -2.0))
    assert torch.equal(wanted[:, 1], layer(features)[:, 1])
    assert torch.equal(unscaled(torch.ones(4, 3), None, layer, features), torch.ones(4, 3))


@pytest.fixture(scope="module")
def dense(make_vit: MakeViT) -> SlimViT:
    return SlimViT.from_timm(make_vit(img_size=24, embed_dim=48, depth=3, init_values=0.5))


@pytest.fixture(scope="module")
def images(dense: SlimViT) -> Batches:
    return made_batches(dense.architecture, 96, 24, seed=0)


def state_of(dense: SlimViT, images: Batches, recovery: bool = True) -> SearchState:
    recipe = Recipe(model="tiny", data="digits", target_macs=0.5, recovery=recovery)
    return SearchState(copy.deepcopy(dense), images, images[:1], recipe, Path())


def test_pairing_keeps_logits_nearer_than_the_best_channels_do(dense: SlimViT, images: Batches) -> None:
    at = state_of(dense, images)
    block = copy.deepcopy(at.model.blocks[0])
    shape = block.shape.model_copy(update={"heads": 2, "qk_dim": 5})
    choice = choose_for_shape(at.channel_scores(), shape)
    remove_channels(block, choice)
    inputs = [block.norm1(tokens) for tokens in at.clean]
    done = refit_query_key(query_key_of(block), inputs, query_key_of(dense.blocks[0]), choice.heads)
    assert done.ridge is not None and done.after < 0.8 * done.before
    assert block.shape == shape


def test_pairing_of_what_is_whole_is_exact(dense: SlimViT, images: Batches) -> None:
    """All channels of some heads: nothing is lost, and whatever is done leaves the logits as they were."""
    block = copy.deepcopy(dense.blocks[0])
    whole = tuple(range(16))
    remove_channels(block, ChannelChoice((0, 2), (whole,) * 2, (whole,) * 2, tuple(range(192))))
    x = block.norm1(dense.embed(images[0][0]))
    before, _ = block.attn.features(x, "full")
    refit_query_key(query_key_of(block), [x], query_key_of(dense.blocks[0]), (0, 2))
    torch.testing.assert_close(block.attn.features(x, "full")[0], before, rtol=1e-3, atol=1e-4)


def test_a_dead_head_is_thinned(make_vit: MakeViT) -> None:
    """One that masking has switched off."""
    vit = make_vit(img_size=24, embed_dim=48, depth=2)
    with torch.no_grad():
        vit.blocks[0].attn.qkv.weight[:16], vit.blocks[0].attn.qkv.bias[:16] = 0, 0
    dead = SlimViT.from_timm(vit)
    at = state_of(dead, made_batches(dead.architecture, 32, 16, seed=0))
    shape = at.model.blocks[0].shape.model_copy(update={"qk_dim": 5})
    block = at.cut(choose_for_shape(at.channel_scores(), shape)).block
    assert block.shape == shape and all(bool(p.isfinite().all()) for p in block.parameters())


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("dropping", [False, True])
def test_a_cut_block_comes_nearer_to_the_dense_stream(
    dense: SlimViT, images: Batches, index: int, dropping: bool
) -> None:
    """On images that recovery has not seen, tokens matched, through layer scale; also above blocks that were cut."""
    fresh = made_batches(dense.architecture, 64, 64, seed=9)
    left = {}
    for recovery in (False, True):
        at = state_of(dense, images, recovery)
        if dropping:
            at.model.set_keep(0, 20)
        if index:
            at.accept(at.cut(choose_channels(at.channel_scores(), 150)))
            at.ascend()
            at.ascend()
        at.refit_attention()
        cut = at.cut(choose_channels(at.channel_scores(), 200))
        at.accept(cut)
        done = [*(["query/key/value"] if index else []), "query/key", "attn.proj", "mlp.fc1", "mlp.fc2"]
        assert [r.layer for r in cut.refits] == (done if recovery else [])
        assert all(r.after <= r.before for r in cut.refits)
        tokens, reference = at.model.embed(fresh[0][0]), dense.embed(fresh[0][0])
        for slim, whole in zip(at.model.blocks[: index + 1], dense.blocks, strict=False):
            tokens, reference = slim(tokens), whole(reference)
        left[recovery] = float((tokens[:, 0] - reference[:, 0]).square().mean())  # CLS is the same token in both
    assert left[True] < 0.9 * left[False]


def test_tokens_are_followed_through_drops(dense: SlimViT, images: Batches) -> None:
    """`alive` says which tokens of the dense model the slim one still has: with whole blocks they are the same."""
    at = state_of(dense, images)
    at.model.set_keep(0, 20)
    at.model.set_keep(2, 7)
    for keep in (20, 20, 7):
        at.ascend()
        for tokens, alive in zip(at.clean, at.targets.alive, strict=True):
            assert tokens.shape[1] == alive.shape[1] == keep + 1
            assert torch.equal(alive, alive.sort(1).values) and torch.equal(alive[:, 0], torch.zeros(len(alive)).long())
    # Block 0 drops after its attention, so up to there both streams are one.
    first = state_of(dense, images)
    first.model.set_keep(0, 20)
    middle, alive = first.targets._selected(first.model.blocks[0], first.clean[0], first.targets.alive[0])
    expected = first.targets.middle[0].gather(1, alive[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(middle, expected)


def test_tokens_are_followed_in_the_precision_of_the_search(make_vit: MakeViT) -> None:
    """Rounded to BF16 near ties go the other way: what is said to be kept must be what was kept."""
    dense = SlimViT.from_timm(make_vit(img_size=64, embed_dim=48, depth=2))
    images = made_batches(dense.architecture, 32, 16, seed=0)
    recipe = Recipe(model="tiny", data="digits", target_macs=0.5, mixed_precision=True, channel_criterion="taylor")
    at = SearchState(copy.deepcopy(dense), images, images[:1], recipe, Path())
    at.model.set_keep(0, 128)
    entering = at.clean[0].clone()
    at.ascend()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        middle, weights = at.model.blocks[0].mix(entering)
        kept = kept_indices(at.model.blocks[0].scores(middle, weights), 128) + 1
    assert torch.equal(at.targets.alive[0][:, 1:], kept)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_stream_that_is_not_finite_is_refused(bad: float, dense: SlimViT, images: Batches) -> None:
    at = state_of(dense, images)
    with torch.no_grad():
        cast(nn.Linear, at.model.blocks[0].mlp.fc2).bias[0] = bad
    with pytest.raises(RunError, match=r"block 0: what leaves it is not finite"):
        at.ascend()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_refused(bad: float, dense: SlimViT, images: Batches) -> None:
    at = state_of(dense, images)
    with torch.no_grad():
        at.model.vit.head.bias[0] = bad
    with pytest.raises(RunError, match=r"block 0: the classes of the cut model are no numbers"):
        measure_loss_curves(at, SearchLog())


def test_an_adaptation_that_costs_top1_is_undone(
    dense: SlimViT, images: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = state_of(dense, images)
    at.accept(at.cut(choose_channels(at.channel_scores(), 200)))
    at.ascend()
    before = copy.deepcopy(at.model.blocks[1].state_dict())
    for after, stays in ((50.0, False), (75.0, True)):
        monkeypatch.setattr(at, "top1", lambda blocks, after=after: after)
        assert at.refit_attention_unless_worse(75.0) == 75.0
        now = at.model.blocks[1].state_dict()
        assert all(torch.equal(now[name], before[name]) for name in before) != stays
        assert bool(at.cut(None).refits[0].layer == "query/key/value") == stays
        at._cuts.clear()


@pytest.mark.parametrize("index", [1, 2])
def test_attention_is_adapted_to_what_enters_it(dense: SlimViT, images: Batches, index: int) -> None:
    """On unseen images its queries, keys and values come nearer to the dense model's, those of the image tokens in the
    last block, too; on the dense stream they stay."""
    fresh = made_batches(dense.architecture, 64, 64, seed=9)[0][0]
    at = state_of(dense, images)
    at.refit_attention()
    both = zip(at.model.state_dict().values(), dense.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in both)
    at.accept(at.cut(choose_channels(at.channel_scores(), 200)))
    for _ in range(index):
        at.ascend()

    def errors() -> list[float]:
        """Of queries, keys and values, of the image tokens."""
        now, wanted = at.model.embed(fresh), dense.embed(fresh)
        for slim, whole in zip(at.model.blocks[:index], dense.blocks, strict=False):
            now, wanted = slim(now), whole(wanted)
        block, whole = at.model.blocks[index], dense.blocks[index]
        now, wanted = block.norm1(now)[:, 1:], whole.norm1(wanted)[:, 1:]
        layers = ("query", "key", "value")
        return [float((getattr(block.attn, n)(now) - getattr(whole.attn, n)(wanted)).square().mean()) for n in layers]

    before = errors()
    at.refit_attention()
    assert all(after < 0.95 * error for after, error in zip(errors(), before, strict=True))


def test_the_classifier_comes_nearer_to_the_dense_logits(dense: SlimViT, images: Batches) -> None:
    fresh = made_batches(dense.architecture, 64, 64, seed=9)[0][0]
    at = state_of(dense, images)
    for _ in dense.blocks:
        at.accept(at.cut(choose_channels(at.channel_scores(), 300)))
        at.ascend()
    wanted = dense(fresh)
    before = float((at.model(fresh) - wanted).square().mean())
    (done,) = at.refit_classifier()
    assert done.layer == "head" and done.after < done.before
    assert float((at.model(fresh) - wanted).square().mean()) < before
    assert not state_of(dense, images, recovery=False).refit_classifier()


def test_both_classifiers_of_a_distilled_model_are_refitted(make_vit: MakeViT) -> None:
    model = SlimViT.from_timm(make_vit(VisionTransformerDistilled))
    at = state_of(model, made_batches(model.architecture, 32, 16, seed=3))
    for _ in model.blocks:
        at.accept(at.cut(choose_channels(at.channel_scores(), 100)))
        at.ascend()
    assert [done.layer for done in at.refit_classifier()] == ["head", "head_dist"]
