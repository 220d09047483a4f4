"""The comparison of lowerings and precisions: real crops, the model of the recipe, and figures that can fail."""

import pytest
import torch

from benchmarks.agreement import classes_of, compared_with, crops, slim_model
from export.selection import SELECTIONS


def test_crops_are_of_photographs_and_the_same_again() -> None:
    first, again, other = (torch.cat([batch for batch, _ in crops(20, 64, seed)]) for seed in (0, 0, 1))
    assert first.shape == (20, 3, 64, 64) and torch.equal(first, again) and not torch.equal(first, other)
    assert first.std((1, 2, 3)).min() > 0.01  # not of one colour


@pytest.mark.slow
def test_what_is_compared_is_the_recipe() -> None:
    slim = slim_model("deit_tiny")
    assert sum(block.scores_tokens for block in slim.blocks) >= 2 and classes_of(slim, 12) > 1
    for selection in SELECTIONS:
        one = compared_with(slim, 12, "fp32", selection)
        assert one.file == f"fp32, {selection}"
        assert one.images == 12 and one.same_top1 == 100 and 0 < one.largest_difference < 1e-3 < one.largest_logit
