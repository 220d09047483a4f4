"""Tokens that are merged in place of dropped."""

import hypothesis.strategies as st
import pytest
import torch
from conftest import MakeViT
from hypothesis import given
from torch import Tensor

from lowpass.benchmarks.real.merging import WAYS, Select, measure_merging, merged_into_the_nearest, rest_averaged
from lowpass.pipeline.method.token_scores import keep_tokens

PREFIX = 2
ways = pytest.mark.parametrize("select", WAYS.values(), ids=list(WAYS))


def drawn(seed: int, count: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(3, PREFIX + count, 8, generator=generator, dtype=torch.float64)
    return tokens, torch.rand(3, count, generator=generator)


@ways
@given(seed=st.integers(0, 99), keep=st.integers(2, 9))
def test_as_many_stay_and_the_prefix_is_left_alone(select: Select, seed: int, keep: int) -> None:
    tokens, scores = drawn(seed)
    found = select(tokens, scores, keep)
    assert found.shape == (3, PREFIX + keep, 8)
    torch.testing.assert_close(found[:, :PREFIX], tokens[:, :PREFIX], rtol=0, atol=0)


@ways
def test_means_of_equal_tokens_are_that_token(select: Select) -> None:
    tokens, scores = drawn(0)
    same = tokens[:, :1].expand(-1, PREFIX + 9, -1)
    torch.testing.assert_close(select(same, scores, 4), same[:, : PREFIX + 4])


def test_where_all_stay_nothing_is_merged() -> None:
    tokens, scores = drawn(1)
    torch.testing.assert_close(merged_into_the_nearest(tokens, scores, 9), tokens)


def test_a_copy_goes_into_what_it_copies() -> None:
    """And the others, which nothing resembles, stay as they are but for whoever is nearest."""
    tokens, scores = drawn(2)
    tokens[:, PREFIX + 8] = tokens[:, PREFIX + 3]
    scores[:, 8] = -1
    torch.testing.assert_close(merged_into_the_nearest(tokens, scores, 8), tokens[:, : PREFIX + 8])


def test_the_sum_of_all_tokens_is_in_groups() -> None:
    tokens, scores = drawn(3)
    found = rest_averaged(tokens, scores, 4)
    torch.testing.assert_close(found[:, PREFIX:-1], keep_tokens(tokens, scores, 3)[:, PREFIX:])
    left = tokens[:, PREFIX:].sum(1) - found[:, PREFIX:-1].sum(1)
    torch.testing.assert_close(found[:, -1] * 6, left)


def test_figures_of_every_way(make_vit: MakeViT) -> None:
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = make_vit()
    with torch.no_grad():
        labels = model(images).argmax(-1)
    rows = list(measure_merging(model, [(images[:4], labels[:4]), (images[4:], labels[4:])], [{0: 0.5}]))
    assert [row.of["way"] for row in rows[::3]] == list(WAYS)
    assert {row.figure: row.value for row in rows[:3]}["top1_dense"] == 100
    assert rows[2].value == 0 and (rows[2].low, rows[2].high) == (0, 0)  # dropped against dropped
    top1s = [row.value for row in rows if row.figure == "top1"]
    gained = [row.value for row in rows if row.figure == "better_than_dropped"]
    assert gained == pytest.approx([float(one) - float(top1s[0]) for one in top1s])
    assert rows[0].of["tokens"] == "8 from block 0 on"
