"""The comparison of lowerings and precisions: real crops, the model of the recipe, and figures that can fail."""

import pytest
import torch

import benchmarks.agreement
from benchmarks.agreement import agreement, crops, slim_model


def test_crops_are_of_photographs_and_the_same_again() -> None:
    first, again, other = (torch.cat([batch for batch, _ in crops(20, 64, seed)]) for seed in (0, 0, 1))
    assert first.shape == (20, 3, 64, 64) and torch.equal(first, again) and not torch.equal(first, other)
    assert first.std((1, 2, 3)).min() > 0.01  # not of one colour


@pytest.mark.slow
def test_what_is_compared_is_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.agreement, "SETTINGS", (("fp32", "gather"), ("fp32", "onehot")))
    assert sum(block.scores_tokens for block in slim_model("deit_tiny").blocks) >= 2
    classes, compared = agreement("deit_tiny", 12)
    assert classes > 1 and list(compared) == ["fp32, gather", "fp32, onehot"]
    for one in compared.values():
        assert one.images == 12 and one.same_top1 == 100 and 0 < one.largest_difference < 1e-3 < one.largest_logit
