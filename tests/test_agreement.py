"""The comparison of lowerings and precisions: real crops, the model of the recipe, and figures that can fail."""

import pytest
import torch

from lowpass.benchmarks.precision.agreement import compared_with, crops, read_out, slim_model
from lowpass.export.graph.selection import SELECTIONS


def test_crops_are_of_photographs_and_the_same_again() -> None:
    first, again, other = (torch.cat([batch for batch, _ in crops(20, 64, seed)]) for seed in (0, 0, 1))
    assert first.shape == (20, 3, 64, 64) and torch.equal(first, again) and not torch.equal(first, other)
    assert first.std((1, 2, 3)).min() > 0.01  # not of one colour


@pytest.mark.slow
def test_what_is_compared_is_the_recipe() -> None:
    slim = slim_model("deit_tiny")
    assert sum(block.scores_tokens for block in slim.blocks) >= 2 and read_out(slim, 12, "random").classes > 1
    for selection in SELECTIONS:
        one, left_out = compared_with(slim, 12, "fp32", selection)
        assert one.file == f"fp32, {selection}" and not left_out
        assert one.images == 12 and one.same_top1 == 100 and 0 < one.largest_difference < 1e-3 < one.largest_logit


@pytest.mark.slow
def test_fitted_classifier_knows_where_crops_are_from() -> None:
    slim = slim_model("deit_tiny", "fitted")
    assert slim.architecture.dense.num_classes == 8
    seen = read_out(slim, 64, "fitted")
    assert seen.right is not None and seen.right > 50  # an eighth by chance
