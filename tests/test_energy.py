"""LFE, token scores and the selection of tokens, against loops that follow the formulas letter by letter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowpass.pipeline.method.energy import low_frequency_energy
from lowpass.pipeline.method.frequency import token_lowpass_matrix
from lowpass.pipeline.method.token_choices import EnergyNorm
from lowpass.pipeline.method.token_scores import (
    attention_importance,
    cls_importance,
    keep_tokens,
    kept_indices,
    token_scores,
)

NORMS: tuple[EnergyNorm, ...] = ("l2", "l1")
seeds = st.integers(0, 2**16)
cutoffs = st.floats(0.1, 0.95)


def draw(seed: int, batch: int, heads: int, prefix: int, count: int) -> tuple[Tensor, Tensor]:
    """Image tokens [B, N, 5] and softmax attention [B, H, P + N, P + N]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, count, 5, generator=generator)
    length = prefix + count
    return tokens, (2 * torch.randn(batch, heads, length, length, generator=generator)).softmax(-1)


def naive_energy(tokens: Tensor, cutoff: float, norm: EnergyNorm) -> Tensor:
    batch, count, _ = tokens.shape
    result = torch.empty(batch, count)
    for b in range(batch):
        low = token_lowpass_matrix(count, cutoff) @ tokens[b]
        for j in range(count):
            if norm == "l2":
                result[b, j] = (low[j] ** 2).sum().sqrt() / (tokens[b, j] ** 2).sum().sqrt()
            else:
                result[b, j] = low[j].abs().sum() / (tokens[b].abs().sum() / count)
    return result


def naive_scores(tokens: Tensor, attention: Tensor, prefix: int, cutoff: float, norm: EnergyNorm) -> Tensor:
    """Eq. 8-9: mean_h(A_h[0, j] mean_i A_h[i, 0] + A_h[0, 0] mean_i A_h[i, j]) times LFE, i over image tokens."""
    batch, count, _ = tokens.shape
    heads = attention.shape[1]
    energy = naive_energy(tokens, cutoff, norm)
    result = torch.empty(batch, count)
    for b in range(batch):
        for j in range(count):
            total = 0.0
            for a in attention[b]:
                to_cls = sum(float(a[prefix + i, 0]) for i in range(count)) / count
                to_j = sum(float(a[prefix + i, prefix + j]) for i in range(count)) / count
                total += float(a[0, prefix + j]) * to_cls + float(a[0, 0]) * to_j
            result[b, j] = total / heads * energy[b, j]
    return result


@given(seeds, st.integers(1, 3), st.integers(2, 12), cutoffs, st.sampled_from(NORMS))
def test_energy_equals_the_loop(seed: int, batch: int, count: int, cutoff: float, norm: EnergyNorm) -> None:
    tokens, _ = draw(seed, batch, 1, 1, count)
    energy = low_frequency_energy(tokens, cutoff, norm)
    assert energy.shape == (batch, count)
    torch.testing.assert_close(energy, naive_energy(tokens, cutoff, norm), rtol=1e-4, atol=1e-6)


@given(
    seeds, st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(2, 8), cutoffs, st.sampled_from(NORMS)
)
def test_scores_equal_the_loop(
    seed: int, batch: int, heads: int, prefix: int, count: int, cutoff: float, norm: EnergyNorm
) -> None:
    tokens, attention = draw(seed, batch, heads, prefix, count)
    expected = naive_scores(tokens, attention, prefix, cutoff, norm)
    scores = token_scores(tokens, attention, cutoff, norm)
    assert scores.shape == (batch, count)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    # The same tokens behind their prefix tokens, which are not scored.
    whole = torch.cat([torch.full((batch, prefix, 5), 9.0), tokens], 1)
    assert torch.equal(token_scores(whole, attention, cutoff, norm, num_prefix_tokens=prefix), scores)


def test_the_paper_norm_is_the_default() -> None:
    tokens, attention = draw(0, 2, 2, 1, 9)
    assert torch.equal(token_scores(tokens, attention, 0.85), token_scores(tokens, attention, 0.85, "l2"))
    assert torch.equal(low_frequency_energy(tokens, 0.85), low_frequency_energy(tokens, 0.85, "l2"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_energy_does_not_depend_on_an_image_s_scale(scale: float, norm: EnergyNorm) -> None:
    tokens, _ = draw(0, 2, 1, 1, 9)
    scaled = low_frequency_energy(scale * tokens, 0.85, norm)
    torch.testing.assert_close(scaled, low_frequency_energy(tokens, 0.85, norm))


@pytest.mark.parametrize("norm", NORMS)
def test_energy_of_half_precision_stays_finite(norm: EnergyNorm) -> None:
    tokens = 300 * torch.ones(1, 8, 64, dtype=torch.float16)  # the square of one such norm is beyond FP16
    energy = low_frequency_energy(tokens, 0.5, norm)
    assert energy.dtype == torch.float32
    torch.testing.assert_close(energy, low_frequency_energy(tokens.float(), 0.5, norm), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("norm", NORMS)
def test_energy_of_empty_tokens_is_zero(norm: EnergyNorm) -> None:
    assert torch.equal(low_frequency_energy(torch.zeros(1, 4, 3), 0.5, norm), torch.zeros(1, 4))


def test_unknown_norm_refused() -> None:
    with pytest.raises(ValueError, match="'l2' or 'l1', not 'l3'"):
        low_frequency_energy(torch.zeros(1, 4, 3), 0.5, "l3")  # type: ignore[arg-type]


def test_too_little_attention_refused() -> None:
    tokens, attention = draw(0, 1, 1, 1, 4)
    with pytest.raises(ValueError, match="covers 3 tokens, but 4 are given"):
        token_scores(tokens, attention[..., :3, :3], 0.85)


@st.composite
def selections(draw_from: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """Tokens [B, P + N, 3], distinct scores [B, N], P, and how many to keep."""
    batch, prefix, count = draw_from(st.integers(1, 4)), draw_from(st.integers(0, 3)), draw_from(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw_from(seeds))
    tokens = torch.randn(batch, prefix + count, 3, generator=generator)
    scores = torch.stack([torch.randperm(count, generator=generator) for _ in range(batch)]).float()
    return tokens, scores, prefix, draw_from(st.integers(1, count))


@given(selections())
def test_the_best_tokens_stay_in_raster_order(selection: tuple[Tensor, Tensor, int, int]) -> None:
    tokens, scores, prefix, keep = selection
    kept = keep_tokens(tokens, scores, keep)
    assert kept.shape == (len(tokens), prefix + keep, 3)
    assert torch.equal(kept[:, :prefix], tokens[:, :prefix])
    for image, image_scores, left, index in zip(tokens, scores, kept, kept_indices(scores, keep), strict=True):
        best = sorted(range(len(image_scores)), key=lambda j: -float(image_scores[j]))[:keep]
        assert index.tolist() == sorted(best)
        assert torch.equal(left[prefix:], image[[prefix + j for j in sorted(best)]])


@given(selections(), seeds)
def test_images_are_selected_from_one_by_one(selection: tuple[Tensor, Tensor, int, int], seed: int) -> None:
    tokens, scores, _, keep = selection
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(keep_tokens(tokens[order], scores[order], keep), keep_tokens(tokens, scores, keep)[order])


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(2, 8))
def test_the_order_of_heads_does_not_matter(seed: int, heads: int, prefix: int, count: int) -> None:
    _, attention = draw(seed, 2, heads, prefix, count)
    torch.testing.assert_close(attention_importance(attention.flip(1), prefix), attention_importance(attention, prefix))


@given(batch=st.integers(1, 3), heads=st.integers(1, 4), prefix=st.integers(1, 3), count=st.integers(1, 9))
def test_the_cls_score_is_what_cls_attends_to(batch: int, heads: int, prefix: int, count: int) -> None:
    attention = torch.rand(batch, heads, prefix + count, prefix + count).softmax(-1)
    expected = torch.stack([attention[:, :, 0, prefix + j].mean(1) for j in range(count)], 1)
    torch.testing.assert_close(cls_importance(attention, prefix), expected)
    torch.testing.assert_close(cls_importance(attention[:, :, :1], prefix), expected)  # its row alone will do
