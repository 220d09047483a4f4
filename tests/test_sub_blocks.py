"""Blocks without attention, without an MLP, or without either: nothing is left of what is gone, but its mean."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import MakeViT
from gone_parts import MODELS, NO_ATTENTION, NO_MLP, NOTHING, cut_from, images_for, some_vit, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.model.architecture import check_blocks, read_blocks
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.model.whole_parts import Part, add_below, mean_added, take_out
from lowpass.pipeline.search.channel_criteria import CHANNEL_CRITERIA, CriterionContext, low_frequency_sensitivity
from lowpass.pipeline.search.costs import total
from lowpass.pipeline.search.latency_table import LatencyTable
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.search import search
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.state import SearchState
from lowpass.pipeline.search.table import apply_table
from lowpass.pipeline.train.drop_path import dropped_paths


def entering(slim: SlimViT, images: Tensor, index: int) -> Tensor:
    tokens = slim.embed(images)
    for block in slim.blocks[:index]:
        tokens = block(tokens)
    return tokens


def mean_of(slim: SlimViT, index: int, part: Part, images: Tensor) -> Tensor:
    last = index == len(slim.blocks) - 1
    return mean_added(slim.blocks[index], slim.architecture.dense, last, part, [entering(slim, images, index)])


def remove_part(slim: SlimViT, index: int, part: Part, added: Tensor) -> int | None:
    """Which block has taken the constant; None: the embedding."""
    left = take_out(slim.blocks[index], part, added)
    return index if left is None else add_below(slim, index, left)


def adding_the_mean(slim: SlimViT, index: int, part: Part, added: Tensor) -> None:
    """The block's part adds a constant, in its own place."""
    block = slim.blocks[index]

    def mix(x: Tensor) -> tuple[Tensor, None]:
        return block.stream.add(x, added), None

    def feed(x: Tensor) -> Tensor:
        return block.stream.add(x, added)

    setattr(block, *(("mix", mix) if part == "attention" else ("feed", feed)))


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", [*MODELS, "rotary"])
@torch.no_grad()
def test_the_mean_stands_for_the_part(make_vit: MakeViT, name: str, part: Part) -> None:
    """Of the first, a middle and the last block: the logits are those of the dense model with its part replaced."""
    for index in (0, 1, 2):
        slim = some_vit(make_vit, name)
        images = images_for(slim)
        added = mean_of(slim, index, part, images)
        assert bool(added.abs().max() > 1e-3)
        expected = copy.deepcopy(slim)
        adding_the_mean(expected, index, part, added)
        taken = remove_part(slim, index, part, added)
        assert taken == (index if part == "mlp" else index - 1 if index else None)
        torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)
        gone = NO_ATTENTION if part == "attention" else NO_MLP
        assert slim.architecture == cut_from(expected.architecture, {index: gone})
        words = ("attn", "norm1", "ls1") if part == "attention" else ("mlp", "norm2", "ls2")
        assert not [k for k in slim.state_dict() for word in words if k.startswith(f"vit.blocks.{index}.{word}")]


@pytest.mark.parametrize("name", ["plain", "layer scale", "mean of tokens"])
@torch.no_grad()
def test_many_parts_one_after_the_other(make_vit: MakeViT, name: str) -> None:
    """All of the first block, attention of the second, the MLP of the third: constants pass what is gone already."""
    slim = some_vit(make_vit, name)
    images, expected = images_for(slim), copy.deepcopy(slim)
    parts: Sequence[tuple[int, Part, int | None]] = (
        (0, "attention", None),
        (0, "mlp", None),
        (1, "attention", None),
        (2, "mlp", 2),
    )
    for index, part, into in parts:
        added = mean_of(slim, index, part, images)
        adding_the_mean(expected, index, part, added)
        assert remove_part(slim, index, part, added) == into
        torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)
    assert not list(slim.blocks[0].parameters())


@torch.no_grad()
def test_a_channel_that_layer_scale_switches_off_takes_its_constant(make_vit: MakeViT) -> None:
    slim = some_vit(make_vit, "layer scale")
    slim.blocks[1].ls1.gamma[:5] = torch.tensor([0.0, 1e-9, -1e-8, 1e-7, 0.0])
    images, expected = images_for(slim), copy.deepcopy(slim)
    added = mean_of(slim, 1, "mlp", images)
    adding_the_mean(expected, 1, "mlp", added)
    remove_part(slim, 1, "mlp", added)
    torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_block_without_an_mlp_drops_tokens(make_vit: MakeViT) -> None:
    """Chosen by attention alone, the constant is as good before the choice."""
    architecture = some_vit(make_vit, "plain").architecture
    torch.manual_seed(0)
    slim = SlimViT(architecture.model_copy(update={"token_criterion": "attention"})).eval().double()
    slim.set_keep(1, 9)
    images, expected = images_for(slim), copy.deepcopy(slim)
    added = mean_of(slim, 1, "mlp", images)
    adding_the_mean(expected, 1, "mlp", added)
    assert remove_part(slim, 1, "mlp", added) == 1
    torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="the block drops tokens, for which it needs its attention"):
        remove_part(slim, 1, "attention", added)
    with pytest.raises(ValueError, match="the block has no mlp"):
        remove_part(slim, 1, "mlp", added)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 0}, "heads is 0, qk_dim is 8, v_dim is 8: without attention all three are 0"),
        ({"heads": 0, "v_dim": 0, "qk_dim": 5}, "heads is 0, qk_dim is 5, v_dim is 0"),
        ({"qk_dim": 0}, "heads is 3, qk_dim is 0"),
        (NO_ATTENTION | {"keep": 15}, "block 1: keep is 15, but 16 image tokens enter it, and without attention"),
        ({"hidden": -1}, "hidden"),
        ({"keep": 0}, "keep"),
    ],
)
def test_tables_that_cannot_be(make_vit: MakeViT, tmp_path: Path, changes: dict[str, int], said: str) -> None:
    architecture = SlimViT.from_timm(make_vit()).architecture
    table = [shape.model_dump() for shape in architecture.blocks]
    table[1] |= changes
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"blocks": table}))
    with pytest.raises(InputError, match=said):
        check_blocks(read_blocks(path), architecture.dense)


def test_tokens_cannot_be_dropped_without_attention(make_vit: MakeViT) -> None:
    architecture = cut_from(SlimViT.from_timm(make_vit(depth=3)).architecture, {1: NO_ATTENTION})
    slim = SlimViT(architecture)
    with pytest.raises(ValueError, match="without attention passes on all 16 image tokens, not 9"):
        slim.set_keep(1, 9)
    for keep in (9, 12, 16):  # fewer and more again: it passes on what reaches it
        slim.set_keep(0, keep)
        assert slim.architecture.blocks == architecture.with_keep(0, keep).blocks[:2] + slim.architecture.blocks[2:]
        assert slim.blocks[1].tokens_in == slim.blocks[1].keep == keep


@given(st.data())
@torch.no_grad()
def test_any_table_runs_and_its_macs_add_up(make_vit: MakeViT, data: st.DataObject) -> None:
    architecture = data.draw(tables(SlimViT.from_timm(make_vit(depth=3)).architecture))
    torch.manual_seed(0)
    slim = SlimViT(architecture).eval()
    assert slim.architecture == architecture
    assert slim(images_for(slim)).isfinite().all()
    dense, macs = architecture.dense, architecture.dense.end_macs()
    for index, (block, shape) in enumerate(zip(slim.blocks, architecture.blocks, strict=True)):
        tokens = architecture.tokens_in(index) + dense.num_prefix_tokens
        if block.has_attention:
            attention = block.attn
            rows = sum(layer.out_features for layer in (attention.query, attention.key, attention.value))
            macs += tokens * dense.embed_dim * (rows + attention.proj.in_features)
            macs += tokens * tokens * shape.heads * (shape.qk_dim + shape.v_dim)
        if block.has_mlp:
            macs += 2 * (shape.keep + dense.num_prefix_tokens) * dense.embed_dim * shape.hidden
        if block.scores_tokens:
            macs += architecture.selection_macs(architecture.tokens_in(index))
    assert architecture.macs() == macs


@given(st.data())
@settings(max_examples=15)
def test_saved_and_loaded(make_vit: MakeViT, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    slim = SlimViT(data.draw(tables(SlimViT.from_timm(make_vit(depth=3)).architecture))).eval()
    folder = tmp_path_factory.mktemp("slim")
    slim.save(folder)
    again = SlimViT.load(folder)
    assert again.architecture == slim.architecture
    assert torch.equal(again(images_for(slim)), slim(images_for(slim)))


@torch.no_grad()
def test_channels_of_the_other_part_go_as_before(make_vit: MakeViT) -> None:
    every = tuple(range(8))
    slim = some_vit(make_vit, "layer scale")
    for index, part in ((0, "attention"), (1, "mlp"), (2, "attention"), (2, "mlp")):
        remove_part(slim, index, part, torch.zeros(24))  # type: ignore[arg-type]
    images, expected = images_for(slim), copy.deepcopy(slim)
    hidden = tuple(range(40, 96))
    expected.blocks[0].mlp.fc1.weight[:40] = 0
    expected.blocks[0].mlp.fc1.bias[:40] = 0
    expected.blocks[1].attn.value.weight[:8] = 0
    expected.blocks[1].attn.value.bias[:8] = 0
    remove_channels(slim.blocks[0], ChannelChoice((), (), (), hidden))
    remove_channels(slim.blocks[1], ChannelChoice((1, 2), (every, every), (every, every), ()))
    remove_channels(slim.blocks[2], ChannelChoice((), (), (), ()))
    assert [b.shape.heads for b in slim.blocks] == [0, 2, 0] and [b.shape.hidden for b in slim.blocks] == [56, 0, 0]
    torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="has no attention, of which 1"):
        remove_channels(slim.blocks[0], ChannelChoice((1,), (every,), (every,), hidden))
    with pytest.raises(ValueError, match="has an attention, of which 0"):
        remove_channels(slim.blocks[1], ChannelChoice((), (), (), ()))


def test_what_searches_refuses_a_model_that_was_cut(digits_slim: SlimViT, tmp_path: Path) -> None:
    """Costs, criteria and recovery are those of whole blocks."""
    images, asked = [(images_for(digits_slim), torch.arange(4))], SearchSettings(target_macs=0.5)
    for gone, said in ((NO_ATTENTION, "block 3 has no attention"), (NO_MLP, "block 3 has no MLP")):
        slim = SlimViT(cut_from(digits_slim.architecture, {3: gone})).eval()
        with pytest.raises(InputError, match=said):
            search(slim, images, images, asked, tmp_path, cast(SearchLog, None))
        with pytest.raises(InputError, match=said):
            low_frequency_sensitivity(slim, images, 3)
        assert low_frequency_sensitivity(slim, images, 2).hidden.shape == (384,)  # others are scored as ever
        for criterion in CHANNEL_CRITERIA.values():
            with pytest.raises(InputError, match=said):
                criterion(
                    slim, [(torch.zeros(1, 65, 96), torch.zeros(1, 65, 96), images[0][1][:1])], 3, CriterionContext()
                )


@pytest.mark.parametrize("order", ["bottom-up", "top-down", "one-shot"])
@pytest.mark.parametrize("recovery", [True, False])
def test_a_table_is_applied_in_any_order(make_vit: MakeViT, tmp_path: Path, order: Any, recovery: bool) -> None:
    slim = SlimViT.from_timm(make_vit(depth=4, init_values=0.5))
    shape = slim.architecture.blocks[0].model_dump()
    table = [BlockShape(**shape | some) for some in (NO_ATTENTION, NO_MLP | {"heads": 2}, NOTHING, {"hidden": 40})]
    batches = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 5)]
    asked = SearchSettings(order=order, recovery=recovery, score_images=8)
    state = SearchState(slim, batches, batches, asked, tmp_path)
    apply_table(state, table)
    assert slim.architecture.blocks == tuple(table)
    with torch.no_grad():  # what the search keeps of the images is what the model makes of them
        for kept, (images, _) in zip(state.clean, batches, strict=True):
            torch.testing.assert_close(kept, slim.vit.blocks(slim.embed(images)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", ["bottom-up", "top-down", "one-shot"])
def test_so_is_one_whose_attention_is_gone_where_tokens_are(make_vit: MakeViT, tmp_path: Path, order: Any) -> None:
    slim = SlimViT.from_timm(make_vit(depth=4))
    shape = slim.architecture.blocks[0].model_dump()
    table = [BlockShape(**shape | {"keep": 11} | some) for some in ({}, NO_MLP, NO_ATTENTION, NOTHING)]
    state = SearchState(
        slim, [(torch.randn(8, 3, 16, 16), torch.arange(8) % 5)], [], SearchSettings(order=order), tmp_path
    )
    apply_table(state, table)
    assert slim.architecture.blocks == tuple(table)


def test_skipped_paths_are_of_the_parts_that_are_there(make_vit: MakeViT) -> None:
    slim = SlimViT(cut_from(SlimViT.from_timm(make_vit()).architecture, {0: NO_ATTENTION, 1: NO_MLP})).train()
    with dropped_paths(slim, 0.5):
        assert [len(b.ls2._forward_hooks) for b in slim.blocks if b.has_mlp] == [1]
        assert [len(b.ls1._forward_hooks) for b in slim.blocks if b.has_attention] == [1]
        slim(images_for(slim)).sum().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())


def test_what_is_gone_takes_no_time(digits_slim: SlimViT) -> None:
    dense = digits_slim.architecture.dense
    table = LatencyTable.model_validate(
        {"dense": dense, "runtime": "r", "precision": "fp32", "batch": 1, "token_score": "cls", "machine": {}}
        | {"token_criterion": "attention", "ends_ms": 1.0, "tokens": (10, 65), "rows": (64, 192), "hidden": (32, 384)}
        | {"attention_ms": ((1.0, 2.0), (2.0, 3.0)), "mlp_ms": ((1.0, 2.0), (2.0, 3.0)), "selection_ms": (1.0, 2.0)}
        | {"last_ms": ((1.0, 1.0), (2.0, 2.0))}
    )
    whole = dense.blocks()[0]
    nothing = BlockShape(**whole.model_dump() | NOTHING)
    assert table.attention(65, nothing, last=False) == table.mlp(65, 0, last=False) == 0
    assert table.attention(65, whole, last=True) == 2.0
    assert table.attention(65, nothing, last=True) == table.mlp(65, 384, last=True) == 0
    # The last block with attention is the one that is computed for a row alone, as is all that lies above it.
    slim = cut_from(digits_slim.architecture, {5: NO_ATTENTION, 4: NO_MLP})
    assert total(table, slim) == 1.0 + 4 * (3.0 + 3.0) + 2.0
