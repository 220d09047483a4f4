"""Blocks without attention, without an MLP, or without either: nothing is left of what is gone, but its mean."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import MakeViT
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.model.architecture import Architecture, check_blocks, read_blocks
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.model.whole_parts import Part, mean_added, remove_part

NO_ATTENTION = {"heads": 0, "qk_dim": 0, "v_dim": 0}
NO_MLP = {"hidden": 0}
NOTHING = NO_ATTENTION | NO_MLP


def cut_from(architecture: Architecture, gone: dict[int, dict[str, int]]) -> Architecture:
    """With parts of some blocks gone."""
    blocks = [
        BlockShape.model_validate(shape.model_dump() | gone.get(i, {})) for i, shape in enumerate(architecture.blocks)
    ]
    return Architecture.model_validate(architecture.model_dump() | {"blocks": [b.model_dump() for b in blocks]})


def images_for(slim: SlimViT, count: int = 4) -> Tensor:
    dense = slim.architecture.dense
    made = torch.randn(count, dense.in_chans, *dense.img_size, generator=torch.Generator().manual_seed(1))
    return made.to(next(slim.parameters()).dtype)


def entering(slim: SlimViT, images: Tensor, index: int) -> Tensor:
    tokens = slim.embed(images)
    for block in slim.blocks[:index]:
        tokens = block(tokens)
    return tokens


def adding_the_mean(slim: SlimViT, index: int, part: Part, added: Tensor) -> None:
    """The block's part adds a constant, in its own place."""
    block = slim.blocks[index]

    def mix(x: Tensor) -> tuple[Tensor, None]:
        return block.stream.add(x, added), None

    def feed(x: Tensor) -> Tensor:
        return block.stream.add(x, added)

    setattr(block, *(("mix", mix) if part == "attention" else ("feed", feed)))


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"init_values": 0.5},
    "CLIP": {"pre_norm": True},
    "mean of tokens": {"global_pool": "avg", "class_token": False},
    "registers without positions": {"reg_tokens": 2, "no_embed_class": True},
    "norms inside": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "differential": {"attn_layer": "diff"},
    "distilled": {"kind": VisionTransformerDistilled},
}


def some_vit(make_vit: MakeViT, name: str) -> SlimViT:
    if name == "rotary":
        torch.manual_seed(0)
        model = timm.create_model("tiny_dinov3")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return SlimViT.from_timm(model).eval().double()
    return SlimViT.from_timm(make_vit(depth=3, **MODELS[name])).double()


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", [*MODELS, "rotary"])
@torch.no_grad()
def test_the_mean_stands_for_the_part(make_vit: MakeViT, name: str, part: Part) -> None:
    """Of the first, a middle and the last block: the logits are those of the dense model with its part replaced."""
    for index in (0, 1, 2):
        slim = some_vit(make_vit, name)
        images = images_for(slim)
        added = mean_added(slim, index, part, [entering(slim, images, index)])
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
        added = mean_added(slim, index, part, [entering(slim, images, index)])
        adding_the_mean(expected, index, part, added)
        assert remove_part(slim, index, part, added) == into
        torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)
    assert not list(slim.blocks[0].parameters())


@torch.no_grad()
def test_a_channel_that_layer_scale_switches_off_takes_its_constant(make_vit: MakeViT) -> None:
    slim = some_vit(make_vit, "layer scale")
    slim.blocks[1].ls1.gamma[:5] = torch.tensor([0.0, 1e-9, -1e-8, 1e-7, 0.0])
    images, expected = images_for(slim), copy.deepcopy(slim)
    added = mean_added(slim, 1, "mlp", [entering(slim, images, 1)])
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
    added = mean_added(slim, 1, "mlp", [entering(slim, images, 1)])
    adding_the_mean(expected, 1, "mlp", added)
    assert remove_part(slim, 1, "mlp", added) == 1
    torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="block 1 drops tokens, for which it needs its attention"):
        remove_part(slim, 1, "attention", added)
    with pytest.raises(ValueError, match="block 1 has no mlp"):
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


@st.composite
def tables(draw: st.DrawFn, dense: Architecture) -> Architecture:
    """Any slim model, each part of each block there or not."""
    whole, tokens, blocks = dense.blocks[0], dense.dense.num_tokens, []
    for _ in dense.blocks:
        sizes = {name: draw(st.integers(1, getattr(whole, name))) for name in ("heads", "qk_dim", "v_dim", "hidden")}
        sizes |= NO_ATTENTION if draw(st.booleans()) else {}
        sizes |= NO_MLP if draw(st.booleans()) else {}
        tokens = draw(st.integers(1, tokens)) if sizes["heads"] else tokens
        blocks.append(BlockShape(**sizes, keep=tokens))
    check_blocks(tuple(blocks), dense.dense)
    return dense.model_copy(update={"blocks": tuple(blocks)})


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
