"""Rivals that prune channels without training: what their equations promise, and that they reach their targets."""

import copy

import pytest
import torch
from conftest import MakeViT
from timm.models import VisionTransformer
from torch import Tensor, nn

from lowpass.benchmarks.peers import isomorphic
from lowpass.benchmarks.peers.corp import Moments, match_logits, moments_of, predict, prune_by_corp, shrinkage
from lowpass.benchmarks.peers.isomorphic import accumulated_gradients, counted_macs, prune_isomorphic, pruned_by
from lowpass.benchmarks.peers.vbp import hidden_statistics, prune_by_variance
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.data.datasets import Batches, load_data
from lowpass.pipeline.model.slim_vit import SlimViT


@pytest.fixture(scope="module")
def digits(digits_slim: SlimViT) -> Batches:
    """Calibration images, and labels."""
    return load_data("digits", digits_slim.architecture).calibration_batches(128, 64, 0, "reading")


@pytest.fixture
def small(make_vit: MakeViT) -> SlimViT:
    """Two blocks with layer scale, so that one be not left out."""
    return SlimViT.from_timm(make_vit(num_heads=2, init_values=0.5))


def pictures(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def error(model: nn.Module, dense: nn.Module, images: Tensor) -> float:
    """Mean squared, of the logits."""
    return float((model(images) - dense(images)).square().mean())


@torch.no_grad()
def test_vbp_removes_constant_channels_exactly(small: SlimViT) -> None:
    """A third of the hidden channels of the first block give the same for every token; they go, and no logit moves."""
    constant = torch.arange(0, 96, 3)
    first = small.blocks[0].mlp.fc1
    first.weight[constant] = 0
    first.bias[constant] = torch.linspace(-1, 2, 32)
    dense, images = copy.deepcopy(small), pictures(8)
    before = small.architecture
    channels = 32 * before.dense.mlp_macs(17, 1)
    prune_by_variance(small, [images], 1 - channels / before.macs() + 1e-9)
    assert [block.hidden for block in small.architecture.blocks] == [64, 96]
    torch.testing.assert_close(small(pictures(4, 2)), dense(pictures(4, 2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(first.weight, dense.blocks[0].mlp.fc1.weight[[i for i in range(96) if i % 3]])


@torch.no_grad()
def test_vbp_ranks_all_layers_together(small: SlimViT) -> None:
    """Statistics are those of the hidden activations; what stays varies more than what goes, whichever the block."""
    images, dense = pictures(6), copy.deepcopy(small)
    found = hidden_statistics(small, [images[:2], images[2:]])
    seen: list[Tensor] = []
    for block in dense.blocks:
        block.mlp.fc2.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1).double()))
    dense(images)
    for mean, variance, hidden in zip(found.mean, found.variance, seen, strict=True):
        torch.testing.assert_close(mean, hidden.mean(0))
        torch.testing.assert_close(variance, hidden.var(0, correction=0))
    target = 0.7
    prune_by_variance(small, [images], target)
    assert target - 0.01 < small.architecture.macs() / dense.architecture.macs() <= target
    widths = [block.hidden for block in small.architecture.blocks]
    ranked = torch.stack([hidden.var(0, correction=0) for hidden in seen])
    threshold = ranked.flatten().sort(descending=True).values[sum(widths) - 1]
    assert widths == (ranked >= threshold).sum(1).tolist()


@torch.no_grad()
def test_corp_removes_affine_channels_without_loss(small: SlimViT) -> None:
    """Half of the hidden channels repeat the weakest, and half of a head's queries and keys are weak mixtures of its
    others."""
    generator = torch.Generator().manual_seed(3)
    for block in small.blocks:
        first, attention = block.mlp.fc1, block.attn
        first.weight[7] *= 0.1
        first.bias[7] *= 0.1
        first.weight[48:], first.bias[48:] = first.weight[7], first.bias[7]
        for layer in (attention.query, attention.key):
            for head in range(2):
                own = slice(12 * head, 12 * head + 6), slice(12 * head + 6, 12 * head + 12)
                mixture = 0.1 * torch.randn(6, 6, generator=generator)
                layer.weight[own[1]] = mixture @ layer.weight[own[0]]
                layer.bias[own[1]] = mixture @ layer.bias[own[0]]
    dense, images = copy.deepcopy(small), pictures(32)
    cut = [block.model_copy(update={"hidden": 48, "qk_dim": 8}) for block in small.architecture.blocks]
    share = small.architecture.model_copy(update={"blocks": tuple(cut)}).macs() / small.architecture.macs()
    prune_by_corp(small, [images[:16], images[16:]], share + 1e-6, ridge=1e-12)
    assert [(block.hidden, block.qk_dim) for block in small.architecture.blocks] == [(48, 8)] * 2
    test = pictures(4, 2)
    torch.testing.assert_close(small(test), dense(test), rtol=0, atol=1e-4)


def test_corp_s_equations_are_solved() -> None:
    """Against least squares of the activations themselves, and of all logits between tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 5, generator=generator, dtype=torch.double) @ torch.randn(
        5, 5, generator=generator, dtype=torch.double
    )
    rows = rows + torch.randn(5, generator=generator, dtype=torch.double)
    kept, gone = [0, 2, 3], [1, 4]
    slope, offset = predict(moments_of([rows[None, :20], rows[None, 20:]]), kept, gone, 0.0)
    ones = torch.cat([rows[:, kept], torch.ones(60, 1, dtype=torch.double)], 1)
    torch.testing.assert_close(
        torch.cat([slope, offset[:, None]], 1).T, torch.linalg.lstsq(ones, rows[:, gone]).solution
    )

    keys = torch.randn(60, 5, generator=generator, dtype=torch.double)
    left, right = match_logits(moments_of([rows[None]]), moments_of([keys[None]]), kept, 1e-14)
    products = torch.einsum("ia,jb->ijab", rows[:, kept], keys[:, kept]).reshape(3600, 9)
    logits = (rows[:, gone] @ keys[:, gone].T).reshape(3600, 1)
    best = torch.linalg.lstsq(products, logits).solution.reshape(3, 3)
    torch.testing.assert_close(left @ right.T - torch.eye(3, dtype=torch.double), best, rtol=1e-6, atol=1e-8)


def test_corp_s_ridge_is_that_of_oracle_approximating_shrinkage() -> None:
    covariance = torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=torch.double))
    # By hand, for p = 3, n = 10: (1/3 * 18 + 36) / ((11 - 2/3) * (18 - 12)) = 42 / 62, times the mean variance of 2.
    assert shrinkage(covariance, 10) == pytest.approx(2 * 42 / 62)
    assert shrinkage(covariance * 1e-9, 10**6) == 1e-3
    assert shrinkage(torch.eye(3, dtype=torch.double), 10) == pytest.approx(1.0)
    assert isinstance(moments_of([torch.ones(1, 2, 3)]), Moments)


def test_corp_makes_up_for_what_it_removes(digits_slim: SlimViT, digits: Batches) -> None:
    calibration, (test, _) = [images for images, _ in digits[:1]], digits[1]
    errors = []
    for compensate in (True, False):
        slim = copy.deepcopy(digits_slim)
        prune_by_corp(slim, calibration, 0.6, compensate=compensate)
        assert 0.59 < slim.architecture.macs() / digits_slim.architecture.macs() <= 0.6
        errors.append(error(slim, digits_slim, test))
    assert errors[0] < 0.2 * errors[1], errors


@pytest.mark.parametrize(("inside", "target"), [(False, 0.6), (True, 0.5)])
def test_isomorphic_pruning_reaches_its_target(
    inside: bool, target: float, digits: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isomorphic, "TRIES", 7)
    monkeypatch.setattr(isomorphic, "FINER_TRIES", 6)
    model = load_model("digits_deit")
    assert isinstance(model, VisionTransformer)
    assert counted_macs(model) == SlimViT.from_timm(model).architecture.macs()
    before = model(digits[0][0][:2])
    pruned = prune_isomorphic(model, digits, target, inside)
    assert 0.98 * target <= counted_macs(pruned) / counted_macs(model) <= target
    assert pruned(digits[0][0][:3]).shape == (3, 10) and torch.equal(model(digits[0][0][:2]), before)
    width = pruned.patch_embed.proj.out_channels
    assert (width == 96) == inside
    for block in pruned.blocks:
        attention = block.attn
        assert attention.head_dim == 32 and attention.qkv.out_features == 3 * 32 * attention.num_heads
        assert attention.proj.in_features == attention.attn_dim == 32 * attention.num_heads
        assert block.mlp.fc1.in_features == attention.proj.out_features == width


@torch.no_grad()
def test_whole_heads_go_with_their_queries_keys_and_values(make_vit: MakeViT) -> None:
    """Every head that stays is one of the dense model's."""
    model = make_vit(num_heads=3, depth=3)
    with torch.enable_grad():
        gradients = accumulated_gradients(model, [(pictures(8), torch.arange(8) % 5)])
        pruned = pruned_by(model, gradients, 0.1, 0.5, inside=True)
    assert sum(block.attn.num_heads for block in pruned.blocks) < 9
    for block, dense in zip(pruned.blocks, model.blocks, strict=True):
        parts = dense.attn.qkv.weight.unflatten(0, (3, 3, 8))
        kept = block.attn.qkv.weight.unflatten(0, (3, block.attn.num_heads, 8))
        columns = dense.attn.proj.weight.unflatten(1, (3, 8))
        for head in range(block.attn.num_heads):
            (own,) = [h for h in range(3) if torch.equal(parts[0, h], kept[0, head])]
            assert torch.equal(parts[:, own], kept[:, head])
            assert torch.equal(columns[:, own], block.attn.proj.weight.unflatten(1, (-1, 8))[:, head])


def test_what_is_out_of_reach_is_refused(small: SlimViT, make_vit: MakeViT) -> None:
    for prune in (prune_by_variance, prune_by_corp):
        with pytest.raises(InputError, match="out of reach"):
            prune(small, [pictures(4)], 0.05)
        with pytest.raises(InputError, match="a norm before its second MLP layer"):
            prune(SlimViT.from_timm(make_vit(scale_mlp_norm=True)), [pictures(4)], 0.5)
    with pytest.raises(InputError, match="prefix tokens"):
        prune_isomorphic(make_vit(reg_tokens=2), [(pictures(4), torch.arange(4))], 0.5)
