"""Shapes that hardware likes: amounts are shaped, importance decides."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import MakeViT
from hypothesis import given
from hypothesis import strategies as st

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.datasets import Batches, made_batches
from lowpass.pipeline.method.channels import choose_channels
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.log_entries import Entry, TokenDecision
from lowpass.pipeline.search.search import search
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.shaping import AS_PUBLISHED, SHAPINGS, Shaping, choose_shaped, make_shaping
from lowpass.pipeline.search.target import check_target

shapings = st.builds(
    Shaping,
    align=st.sampled_from([1, 8, 16, 24, 32, 64]),
    avoid=st.sampled_from([0, 32, 64]),
    whole_heads=st.booleans(),
    token_stages=st.integers(0, 6),
    token_score=st.sampled_from(["full", "cls"]),
)


@given(shaping=shapings, depth=st.integers(1, 24))
def test_stages_are_blocks_evenly_spread(shaping: Shaping, depth: int) -> None:
    stages = shaping.stages(depth)
    assert list(stages) == sorted(set(stages)) and all(0 <= block < depth for block in stages)
    assert len(stages) == (min(shaping.token_stages, depth) or depth)
    if 0 < shaping.token_stages < depth:
        ends = (0, *stages, depth)
        gaps = [b - a for a, b in pairwise(ends)]
        assert max(gaps) - min(gaps) <= 1


def test_deits_stages() -> None:
    """Three stages of twelve blocks are where EViT drops tokens, too."""
    assert SHAPINGS["tensorrt"].stages(12) == (3, 6, 9)


@given(shaping=shapings, have=st.integers(1, 300), data=st.data())
def test_amounts_round_upwards(shaping: Shaping, have: int, data: st.DataObject) -> None:
    wanted, prefix = data.draw(st.integers(1, have)), data.draw(st.integers(0, 3))
    keep, width = shaping.keep(wanted, have, prefix), shaping.width(wanted, have)
    step = max(1, shaping.align // 8)
    assert wanted <= keep <= have and (keep == have or ((keep + prefix) % step == 0 and keep - wanted < step))
    assert wanted <= width <= have
    assert width == have or width % shaping.align == 0
    avoidable = shaping.avoid and shaping.align % shaping.avoid
    assert width == have or not avoidable or width % shaping.avoid
    passed = [w for w in range(wanted, width) if w % shaping.align == 0]
    assert len(passed) <= 1 and all(avoidable and w % shaping.avoid == 0 for w in passed)


@given(seed=st.integers(0, 999), align=st.sampled_from([1, 4, 8]), data=st.data())
def test_whole_heads(seed: int, align: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, size, hidden = 4, 6, 32
    scores = ChannelScores(
        query_key=torch.rand(heads, size, generator=generator),
        value=torch.rand(heads, size, generator=generator),
        hidden=torch.rand(hidden, generator=generator),
    )
    n = data.draw(st.integers(0, 2 * heads * size + heads * size + hidden - 1))
    shaping = Shaping(align=align, whole_heads=True, token_stages=3, token_score="cls")
    choice = choose_shaped(scores, n, shaping)
    assert choice.query_key == choice.value == (tuple(range(size)),) * len(choice.heads)
    # LFS says which heads and which hidden channels.
    worth = 2 * scores.query_key.sum(1) + scores.value.sum(1)
    assert set(choice.heads) == set(worth.topk(len(choice.heads)).indices.tolist())
    assert set(choice.hidden) == set(scores.hidden.topk(len(choice.hidden)).indices.tolist())
    # Never fewer rows than the threshold leaves, and less than one head and one step more.
    rows = torch.cat([scores.query_key.flatten(), scores.query_key.flatten(), scores.value.flatten()])
    threshold = torch.cat([rows, scores.hidden]).sort().values[n]
    left, stays = int((rows >= threshold).sum()), int((scores.hidden >= threshold).sum())
    assert left <= 3 * size * len(choice.heads) < left + 3 * size or len(choice.heads) == 1
    assert stays <= len(choice.hidden) < max(1, stays) + align


@given(seed=st.integers(0, 99), n=st.integers(0, 50))
def test_as_published_is_the_papers_choice(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = ChannelScores(*(torch.rand(shape, generator=generator) for shape in ((3, 4), (3, 4), (20,))))
    assert choose_shaped(scores, n, AS_PUBLISHED) == choose_channels(scores, n)


@pytest.fixture(scope="module")
def dense(make_vit: MakeViT) -> SlimViT:
    model = SlimViT.from_timm(make_vit(img_size=32, embed_dim=48, depth=4), token_score="cls")
    assert model.architecture.dense.num_tokens == 64 and model.architecture.dense.hidden == 192
    return model


def searched(dense: SlimViT, target: float, shaping: Shaping) -> tuple[SlimViT, list[Entry]]:
    made = made_batches(dense.architecture, 32, 16, seed=0)
    with torch.no_grad():  # labelled with what the dense model sees: it starts at 100%
        batches: Batches = [(images, dense(images).argmax(-1)) for images, _ in made]
    model, decisions = copy.deepcopy(dense), list[Entry]()
    recipe = Recipe(model="tiny", data="digits", target_macs=target, shaping=shaping)
    search(model, batches[:1], batches, recipe, Path(), SearchLog([], decisions.append))
    return model, decisions


@pytest.mark.parametrize("target", [0.8, 0.5, 0.3])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_search_keeps_to_its_shaping(dense: SlimViT, target: float, stages: int) -> None:
    shaping = Shaping(align=16, whole_heads=True, token_stages=stages, token_score="cls")
    model, decisions = searched(dense, target, shaping)
    architecture = model.architecture
    head = architecture.dense.blocks()[0]
    for index, block in enumerate(architecture.blocks):
        assert (block.qk_dim, block.v_dim) == (head.qk_dim, head.v_dim)
        assert block.hidden % 16 == 0
        if block.keep < architecture.tokens_in(index):
            assert index in shaping.stages(4) and (block.keep + 1) % 2 == 0
    for decision in decisions:
        assert not isinstance(decision, TokenDecision) or decision.block in shaping.stages(4)
    left = architecture.macs() / dense.architecture.macs()
    assert target - 0.01 <= left <= target  # one step of 16 hidden channels of one of these four blocks is 0.02


def lowest(architecture: Architecture, shaping: Shaping) -> float:
    share = 1.0
    for hundredths in range(99, 0, -1):
        try:
            check_target(architecture, hundredths / 100, SearchSettings(shaping=shaping))
        except InputError:
            return share
        share = hundredths / 100
    return share


@pytest.mark.parametrize("shaping", [AS_PUBLISHED, *(s.model_copy(update={"align": 16}) for s in SHAPINGS.values())])
def test_what_is_not_refused_is_reached(dense: SlimViT, shaping: Shaping) -> None:
    target = lowest(dense.architecture, shaping)
    model, _ = searched(dense, target, shaping)
    assert model.architecture.macs() <= target * dense.architecture.macs()


def test_options_change_the_default_of_the_runtime() -> None:
    assert make_shaping("openvino", False) == SHAPINGS["openvino"]
    assert make_shaping("openvino", True) == AS_PUBLISHED
    changed = make_shaping("tensorrt", False, align=8, token_score="full", whole_heads=None)
    assert changed == SHAPINGS["tensorrt"].model_copy(update={"align": 8, "token_score": "full"})
    with pytest.raises(InputError, match="align"):
        make_shaping("tensorrt", False, align=0)
