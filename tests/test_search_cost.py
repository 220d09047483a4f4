"""The cost of a search is counted rightly, and the authors' schedule is compared fairly."""

from pathlib import Path

import pytest
import torch
from conftest import MakeViT

from lowpass.benchmarks.search_cost.benchmark import (
    _scores,
    authors_schedule,
    compare,
    counted,
    random_model,
    sweep_point,
)
from lowpass.pipeline.data.datasets import Batches, made_batches
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.search.channel_criteria import low_frequency_sensitivity
from lowpass.pipeline.search.shaping import AS_PUBLISHED
from lowpass.pipeline.train.evaluate import top1

RECIPE = Recipe(model="tiny", data="made", allowable_drop=30, shaping=AS_PUBLISHED, recovery=False)


def labelled(make_vit: MakeViT) -> tuple[SlimViT, Batches]:
    model = SlimViT.from_timm(make_vit(img_size=24, embed_dim=48, depth=3))
    made = made_batches(model.architecture, 32, 16, seed=0)
    with torch.no_grad():
        return model, [(images, model(images).argmax(-1)) for images, _ in made]


def test_a_forward_of_n_images_counts_as_n(make_vit: MakeViT) -> None:
    model, batches = labelled(make_vit)

    def forward(copied: SlimViT) -> Architecture:
        for images, _ in batches:
            copied(images)
        return copied.architecture

    cost = counted(model, forward)
    assert abs(cost.image_forwards - 32) < 0.5 and cost.macs == 1


def test_scores_by_plain_backward_passes_are_the_same(make_vit: MakeViT) -> None:
    model, batches = labelled(make_vit)
    plain, kept = _scores(model, batches, 1, RECIPE), low_frequency_sensitivity(model, batches, 1)
    for name in ("query_key", "value", "hidden"):
        torch.testing.assert_close(getattr(plain, name), getattr(kept, name), rtol=1e-3, atol=1e-9)


def test_the_authors_schedule_keeps_to_the_allowance(make_vit: MakeViT) -> None:
    model, batches = labelled(make_vit)
    before = top1(model, batches)
    left = authors_schedule(model, batches, batches, RECIPE)
    assert (
        left == model.architecture
        and left.macs() < SlimViT.from_timm(make_vit(img_size=24, embed_dim=48, depth=3)).architecture.macs()
    )
    assert before - top1(model, batches) <= 30


@pytest.mark.slow
def test_ours_costs_less(make_vit: MakeViT, tmp_path: Path) -> None:
    model, batches = labelled(make_vit)
    done = compare("tiny", model, batches[:1], batches, 30.0, tmp_path)
    assert done.scored == 16 and done.measured == 32
    assert done.saved > 2 and done.ours.image_forwards < done.ours_with_recovery.image_forwards
    assert done.to_a_target is not None and 0.49 < done.to_a_target.macs <= 0.5
    assert len(list(tmp_path.iterdir())) == 4
    assert compare("tiny", model, batches[:1], batches, 30.0, tmp_path) == done  # seconds, too: not counted again


def test_random_models_see_several_classes() -> None:
    _, batches = random_model("digits_deit", 64, 32, depth=2)
    assert len(torch.cat([labels for _, labels in batches]).unique()) > 3


@pytest.mark.slow
def test_a_sweep_point_counts_blocks() -> None:
    one, more = sweep_point(2, 32), sweep_point(2, 64)
    assert (one.depth, one.images) == (2, 32) and one.block_forwards < more.block_forwards
