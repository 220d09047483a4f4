"""Structured OBS: its costs are what a refit by brute force leaves, and as a criterion it finds what is spare."""

import copy

import pytest
import torch
from conftest import MakeViT
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from test_families import dense_of, pictures
from torch import Tensor

from lowpass.pipeline.method.structured_obs import DAMPING, logit_gram, removal_costs
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.channel_criteria import CHANNEL_CRITERIA, CriterionContext, ScoringBatch


def damped(gram: Tensor, columns: int) -> Tensor:
    return gram + DAMPING * gram.diagonal()[:columns].mean() * torch.eye(len(gram), dtype=gram.dtype)


def refit_error(gram: Tensor, weight: Tensor, gone: list[int]) -> float:
    """The least of `tr((W - V) G (W - V)^T)` over V that reads none of the columns that are gone."""
    stay = [column for column in range(len(gram)) if column not in gone]
    best = torch.zeros_like(weight)
    best[:, stay] = torch.linalg.solve(gram[stay][:, stay], gram[stay] @ weight.T).T
    return float(((weight - best) @ gram * (weight - best)).sum())


@given(
    st.integers(0, 10_000), st.integers(2, 9), st.sampled_from([1, 2, 3]), st.sampled_from([0, 1]), st.integers(1, 4)
)
def test_costs_are_those_of_a_refit(seed: int, groups: int, group: int, always: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = groups * group
    rows = torch.randn(200, columns + always, generator=generator, dtype=torch.float64)
    rows[:, 1:] += rows[:, :-1]  # correlated, so that others can take over
    gram = rows.T @ rows
    weight = torch.randn(outputs, columns + always, generator=generator, dtype=torch.float64)
    costs = removal_costs(gram, weight, group, always)
    assert costs.shape == (groups,)
    true = damped(gram, columns)
    gone = list[int]()
    for which in costs.argsort().tolist():
        others = {
            other: refit_error(true, weight, [*gone, *range(other * group, (other + 1) * group)])
            for other in range(groups)
            if other * group not in gone
        }
        gone += range(which * group, (which + 1) * group)
        assert float(costs[which]) == pytest.approx(others[which], rel=1e-6)
        assert others[which] <= min(others.values()) * (1 + 1e-9)  # none would have cost less


def test_groups_must_divide() -> None:
    with pytest.raises(ValueError, match="groups of 2 do not divide 3"):
        removal_costs(torch.eye(4), torch.ones(1, 4), group=2, always=1)


def test_logits_of_a_pair() -> None:
    """The Gram matrix gives the squared change of the logits when pairs go, but for what softmax does not see."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 2, 7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    gram = logit_gram(query, key, weights)
    kept = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    change = ((1 - kept) * query) @ key.mT
    change = change - change.mean(-1, keepdim=True)
    wanted = (change.square().sum(-1) * weights).sum((0, 2))
    torch.testing.assert_close(torch.einsum("c,hcd,d->h", 1 - kept, gram, 1 - kept), wanted)
    torch.testing.assert_close(logit_gram(query, key + 3, weights), gram)


@pytest.fixture
def slim(make_vit: MakeViT) -> SlimViT:
    return SlimViT.from_timm(make_vit())


def streams(slim: SlimViT, block: int) -> list[ScoringBatch]:
    images = torch.randn(400, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = slim.embed(images)
        for earlier in slim.blocks[:block]:
            tokens = earlier(tokens)
    return [(tokens, tokens, torch.zeros(400, dtype=torch.long))]


@pytest.mark.parametrize("block", [0, 1])
def test_what_is_spare_goes_first(slim: SlimViT, block: int) -> None:
    """A hidden channel that another equals, a value channel nobody reads, a query that is zero, a head likewise."""
    slim = copy.deepcopy(slim)
    part = slim.blocks[block]
    with torch.no_grad():
        part.mlp.fc1.weight[7] = part.mlp.fc1.weight[3]
        part.mlp.fc1.bias[7] = part.mlp.fc1.bias[3]
        part.attn.proj.weight[:, 5] = 0
        part.attn.query.weight[2], part.attn.query.bias[2] = 0, 0
        part.attn.proj.weight[:, 8:16] = 0  # all of head 1
    scores = CHANNEL_CRITERIA["obs"](slim, streams(slim, block), block, CriterionContext())
    assert {3, 7} & set(scores.hidden.argsort()[:5].tolist())  # CLS hardly moves some others
    assert int(scores.value[0].argmin()) == 5
    assert int(scores.query_key[0].argmin()) == 2
    assert scores.heads is not None and int(scores.heads.argmin()) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored(family: str, make_vit: MakeViT) -> None:
    """The first block and the last, of which less is read."""
    slim = SlimViT.from_timm(dense_of(family, make_vit))
    tokens = slim.embed(pictures(slim, 12)).detach()
    for block in (0, len(slim.blocks) - 1):
        scores, attention = (
            CHANNEL_CRITERIA["obs"](slim, [(tokens, tokens, tokens)], block, CriterionContext()),
            slim.blocks[0].attn,
        )
        heads = attention.num_heads
        assert scores.query_key.shape == (heads, attention.qk_dim) and scores.value.shape == (heads, attention.v_dim)
        assert scores.heads is not None and scores.heads.shape == (heads,)
        for part in (scores.query_key, scores.value, scores.hidden, scores.heads):
            assert bool(part.isfinite().all()) and float(part.min()) >= 0 and float(part.max()) > 0


def test_without_images_it_is_refused(slim: SlimViT) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        CHANNEL_CRITERIA["obs"](slim, [], 0, CriterionContext())
