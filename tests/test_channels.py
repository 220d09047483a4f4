"""Choosing channels: the laws of a choice, and a plain reading of the method's text."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import ChannelChoice, choose_channels, choose_for_shape
from lowpass.pipeline.method.sensitivity import ChannelScores


@st.composite
def blocks_scores(draw: st.DrawFn) -> ChannelScores:
    """Scores of a small block. Half the time small whole numbers, so that ties are common and sums are exact."""
    heads, qk_dim, v_dim, hidden = (draw(st.integers(1, limit)) for limit in (4, 6, 6, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shapes = ((heads, qk_dim), (heads, v_dim), (hidden,))
    if draw(st.booleans()):
        top = draw(st.integers(1, 12))
        return ChannelScores(*(torch.randint(0, top + 1, shape, generator=generator).float() for shape in shapes))
    spread = draw(st.floats(0.1, 3))  # the scores of trained models span orders of magnitude
    return ChannelScores(*((spread * torch.randn(shape, generator=generator)).exp() for shape in shapes))


def count(scores: ChannelScores) -> int:
    """Channels of a block, a query/key pair counted twice."""
    return 2 * scores.query_key.numel() + scores.value.numel() + scores.hidden.numel()


def ascending_within(indices: tuple[int, ...], limit: int) -> bool:
    return list(indices) == sorted(set(indices)) and all(0 <= i < limit for i in indices)


def naive_choice(scores: ChannelScores, n: int) -> ChannelChoice:
    """The method's text, number by number and in exact arithmetic."""
    pairs = [[Fraction(x) for x in row] for row in scores.query_key.tolist()]
    values = [[Fraction(x) for x in row] for row in scores.value.tolist()]
    hidden = [Fraction(x) for x in scores.hidden.tolist()]

    def best(row: list[Fraction], k: int) -> list[int]:
        return sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k])

    ranked = sorted([x for row in pairs for x in row] * 2 + [x for row in values for x in row] + hidden)
    threshold = ranked[n]
    kept_hidden = [i for i, x in enumerate(hidden) if x >= threshold] or best(hidden, 1)
    kept_pairs = [x for row in pairs for x in row if x >= threshold]
    kept_values = [x for row in values for x in row if x >= threshold]
    by_threshold = 2 * sum(kept_pairs) + sum(kept_values)
    query_key_rows, value_rows = 2 * len(kept_pairs), len(kept_values)
    options = []
    lowest = max(math.ceil(len(kept_pairs) / len(pairs[0])), math.ceil(value_rows / len(values[0])), 1)
    for h in range(lowest, len(pairs) + 1):
        dqk = max(round(Fraction(query_key_rows, 2 * h)), 1)
        dv = max(round(Fraction(value_rows, h)), 1)
        worth = [
            2 * sum(row[i] for i in best(row, dqk)) + sum(other[i] for i in best(other, dv))
            for row, other in zip(pairs, values, strict=True)
        ]
        heads = best(worth, h)
        options.append((by_threshold - sum(worth[i] for i in heads), h, heads, dqk, dv))
    _, _, heads, dqk, dv = min(options)  # least lost score, then fewest heads
    return ChannelChoice(
        heads=tuple(heads),
        query_key=tuple(tuple(best(pairs[i], dqk)) for i in heads),
        value=tuple(tuple(best(values[i], dv)) for i in heads),
        hidden=tuple(kept_hidden),
    )


@given(blocks_scores(), st.data())
@settings(max_examples=200)
def test_equals_the_text(scores: ChannelScores, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, count(scores) - 1))
    assert choose_channels(scores, n) == naive_choice(scores, n)


@given(blocks_scores(), st.data())
def test_a_choice_is_a_block(scores: ChannelScores, data: st.DataObject) -> None:
    choice = choose_channels(scores, data.draw(st.integers(0, count(scores) - 1)))
    assert ascending_within(choice.heads, len(scores.query_key))
    assert ascending_within(choice.hidden, len(scores.hidden))
    for per_head, scored in ((choice.query_key, scores.query_key), (choice.value, scores.value)):
        assert len(per_head) == len(choice.heads)
        assert len({len(kept) for kept in per_head}) == 1
        assert all(ascending_within(kept, scored.shape[1]) for kept in per_head)
    shape = choice.shape(7)  # at least one of each, or this would be refused
    assert shape == BlockShape(
        heads=len(choice.heads),
        qk_dim=len(choice.query_key[-1]),
        v_dim=len(choice.value[-1]),
        hidden=len(choice.hidden),
        keep=7,
    )


@given(blocks_scores())
@settings(max_examples=20)
def test_dropping_more_keeps_no_more_hidden_channels(scores: ChannelScores) -> None:
    choices = [choose_channels(scores, n) for n in range(count(scores))]
    for fewer, more in pairwise(choices):
        assert len(more.hidden) <= len(fewer.hidden)
        assert set(more.hidden) <= set(fewer.hidden)


@given(blocks_scores())
def test_dropping_nothing_keeps_everything(scores: ChannelScores) -> None:
    choice = choose_channels(scores, 0)
    heads, qk_dim = scores.query_key.shape
    assert choice.shape(1) == BlockShape(
        heads=heads, qk_dim=qk_dim, v_dim=scores.value.shape[1], hidden=len(scores.hidden), keep=1
    )


def test_a_pair_counts_twice() -> None:
    scores = ChannelScores(torch.tensor([[1.0, 9.0]]), torch.tensor([[8.0, 7.0]]), torch.tensor([2.0, 6.0, 5.0]))
    # In order: 1, 1 (a query and its key), 2, 5, 6, 7, 8, 9, 9.
    assert choose_channels(scores, 2).query_key == ((1,),)
    assert choose_channels(scores, 2).hidden == (0, 1, 2)
    assert choose_channels(scores, 3).hidden == (1, 2)
    assert choose_channels(scores, 4).hidden == (1,)


def test_whole_heads_go_when_they_are_worth_little() -> None:
    weak, strong = torch.full((1, 4), 0.1), torch.arange(5.0, 9.0)[None]
    scores = ChannelScores(torch.cat([weak, strong, weak]), torch.cat([weak, strong, weak]), torch.ones(4))
    choice = choose_channels(scores, 28)
    assert choice.heads == (1,)
    assert choice.query_key == ((0, 1, 2, 3),)
    assert choice.value == ((0, 1, 2, 3),)


@given(blocks_scores(), st.data())
def test_a_negative_or_whole_amount_is_refused(scores: ChannelScores, data: st.DataObject) -> None:
    total = count(scores)
    for n in (data.draw(st.integers(-3, -1)), data.draw(st.integers(total, total + 3))):
        with pytest.raises(ValueError, match=f"cannot drop {n} of {total} channels"):
            choose_channels(scores, n)


@given(blocks_scores(), st.data())
def test_a_given_shape_is_met_with_the_best(scores: ChannelScores, data: st.DataObject) -> None:
    heads, qk_dim = scores.query_key.shape
    shape = BlockShape(
        heads=data.draw(st.integers(1, heads)),
        qk_dim=data.draw(st.integers(1, qk_dim)),
        v_dim=data.draw(st.integers(1, scores.value.shape[1])),
        hidden=data.draw(st.integers(1, len(scores.hidden))),
        keep=5,
    )
    choice = choose_for_shape(scores, shape)
    assert choice.shape(5) == shape
    left = [float(scores.hidden[i]) for i in range(len(scores.hidden)) if i not in choice.hidden]
    assert min(float(scores.hidden[i]) for i in choice.hidden) >= max(left, default=0)
    worth = 2 * scores.query_key.double().sort(descending=True).values[:, : shape.qk_dim].sum(1)
    worth += scores.value.double().sort(descending=True).values[:, : shape.v_dim].sum(1)
    kept = sum(
        2 * float(scores.query_key[head, list(pairs)].double().sum())
        + float(scores.value[head, list(values)].double().sum())
        for head, pairs, values in zip(choice.heads, choice.query_key, choice.value, strict=True)
    )
    assert kept == pytest.approx(float(worth.sort(descending=True).values[: shape.heads].sum()))


@pytest.mark.parametrize("field", ["heads", "qk_dim", "v_dim", "hidden"])
def test_too_large_a_shape_is_refused(field: str) -> None:
    scores = ChannelScores(torch.rand(2, 3), torch.rand(2, 4), torch.rand(5))
    whole = {"heads": 2, "qk_dim": 3, "v_dim": 4, "hidden": 5, "keep": 1}
    assert choose_for_shape(scores, BlockShape(**whole)).shape(1) == BlockShape(**whole)
    whole[field] += 1
    with pytest.raises(ValueError, match=r"cannot be cut out of \(2, 3, 4, 5\)"):
        choose_for_shape(scores, BlockShape(**whole))
