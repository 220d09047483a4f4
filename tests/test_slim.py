"""The slim ViT: exact while nothing is removed, whole on disk, and honest about its MACs."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeViT
from hypothesis import given
from hypothesis import strategies as st
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.token_choices import EnergyNorm
from lowpass.pipeline.method.token_scores import keep_tokens, token_scores
from lowpass.pipeline.model.architecture import Architecture, check_blocks
from lowpass.pipeline.model.from_timm import describe_dense
from lowpass.pipeline.model.slim_vit import ARCHITECTURE_FILE, DENSE_WEIGHTS_FILE, WEIGHTS_FILE, SlimViT

PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": {"kind": VisionTransformerDistilled},
    "layer scale": {"init_values": 0.5},
    "registers": {"reg_tokens": 3},
    "registers without position": {"reg_tokens": 3, "no_embed_class": True},
    "no qkv bias": {"qkv_bias": False},
    "oblong image": {"img_size": (16, 24)},
    "one channel": {"in_chans": 1},
    "other epsilon": {"norm_layer": partial(nn.LayerNorm, eps=0.1)},
}


def pictures(model: SlimViT, count: int = 3) -> torch.Tensor:
    dense = model.architecture.dense
    return torch.randn(count, dense.in_chans, *dense.img_size, generator=torch.Generator().manual_seed(1))


def slimmed(model: SlimViT, seed: int) -> SlimViT:
    """A model of random widths and token counts with random weights, on the dense model of another."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(1, limit + 1, (1,), generator=generator))

    architecture, blocks, tokens = model.architecture, [], model.architecture.dense.num_tokens
    for limit in architecture.dense.blocks():
        tokens = draw(tokens)
        blocks.append(
            BlockShape(
                heads=draw(limit.heads),
                qk_dim=draw(limit.qk_dim),
                v_dim=draw(limit.v_dim),
                hidden=draw(limit.hidden),
                keep=tokens,
            )
        )
    torch.manual_seed(seed)
    slim = SlimViT(architecture.model_copy(update={"blocks": tuple(blocks)}))
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return slim.eval()


def same_weights(one: SlimViT, two: SlimViT) -> bool:
    first, second = one.vit.state_dict(), two.vit.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN.keys())
def test_nothing_removed_is_the_dense_model(settings: dict[str, Any], make_vit: MakeViT) -> None:
    dense = make_vit(**settings)
    slim = SlimViT.from_timm(dense)
    images = pictures(slim)
    with torch.no_grad():
        torch.testing.assert_close(slim(images), dense(images), rtol=0, atol=1e-5)
        # The search runs the model in three parts.
        torch.testing.assert_close(slim.classify(slim.vit.blocks(slim.embed(images))), dense(images), rtol=0, atol=1e-5)
    assert slim.architecture.blocks == slim.architecture.dense.blocks()
    assert slim.architecture.dense.num_prefix_tokens == dense.num_prefix_tokens
    assert slim.embed(images).shape[1] == dense.num_prefix_tokens + slim.architecture.dense.num_tokens
    assert not slim.training


def test_attention_written_out_equals_fused_attention(make_vit: MakeViT) -> None:
    slim = slimmed(SlimViT.from_timm(make_vit()), 3)
    attention = slim.blocks[0].attn
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    fused, nothing = attention(x)
    written, weights = attention(x, score="full")
    assert nothing is None
    torch.testing.assert_close(written, fused, rtol=0, atol=1e-6)
    assert weights.shape == (2, attention.num_heads, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, attention.num_heads, 7))


def test_the_attention_scale_is_the_dense_model_s(make_vit: MakeViT) -> None:
    slim = slimmed(SlimViT.from_timm(make_vit()), 3)
    assert [block.attn.weights.scale for block in slim.blocks] == [8**-0.5] * 2
    assert slim.blocks[0].attn.qk_dim < 8


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("cutoff", [0.5, 0.95])
@torch.no_grad()
def test_tokens_are_scored_as_the_architecture_says(cutoff: float, norm: EnergyNorm, make_vit: MakeViT) -> None:
    slim = SlimViT.from_timm(make_vit(reg_tokens=2, init_values=0.5), token_cutoff=cutoff, energy_norm=norm)
    slim.set_keep(0, 7)
    block, x = slim.blocks[0], slim.embed(pictures(slim))
    mixed, weights = block.attn(block.norm1(x), score="full")
    after = x + block.ls1(mixed)
    kept = keep_tokens(after, token_scores(after, weights, cutoff, norm, num_prefix_tokens=3), 7)
    assert kept.shape == (3, 10, 24)
    torch.testing.assert_close(block(x), kept + block.ls2(block.mlp(block.norm2(kept))), rtol=0, atol=1e-5)


def test_from_timm_leaves_the_dense_model_alone(make_vit: MakeViT) -> None:
    dense = make_vit()
    before = copy.deepcopy(dense.state_dict())
    slim = SlimViT.from_timm(dense)
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_from_timm_keeps_preprocessing_and_precision(make_vit: MakeViT) -> None:
    dense = make_vit()
    dense.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1, 2, 3), "crop_pct": 0.9, "interpolation": "bilinear"}
    slim = SlimViT.from_timm(dense.double().train(), token_cutoff=0.7, energy_norm="l1")
    assert slim.architecture.preprocessing.model_dump(exclude={"source", "crop_mode"}) == dense.pretrained_cfg
    assert (slim.architecture.token_cutoff, slim.architecture.energy_norm) == (0.7, "l1")
    assert slim.training
    assert all(parameter.dtype == torch.float64 for parameter in slim.parameters())
    slim.set_keep(0, 9)
    assert slim(pictures(slim).double()).dtype == torch.float64


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN.keys())
def test_macs_equal_a_flop_counter(settings: dict[str, Any], make_vit: MakeViT) -> None:
    dense = SlimViT.from_timm(make_vit(**settings))
    assert dense.architecture.macs() == counted_macs(dense)
    for seed in range(4):
        slim = slimmed(dense, seed)
        assert slim.architecture.macs() == counted_macs(slim)


def counted_macs(model: SlimViT) -> int:
    """What PyTorch counts in every convolution, matrix product and fused attention; it has two operations a MAC."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pictures(model, 1))
    return int(counter.get_total_flops()) // 2


def test_deit_tiny_macs_are_the_published_ones() -> None:
    dense = describe_dense(VisionTransformer(embed_dim=192, num_heads=3))
    architecture = Architecture(
        dense=dense,
        preprocessing={"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9, "interpolation": "bicubic"},
        qk_scale=0.125,
        blocks=dense.blocks(),
    )
    assert architecture.macs() / 1e9 == pytest.approx(1.26, abs=0.01)


token_changes = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 16)), min_size=1, max_size=6)


@given(token_changes)
def test_set_keep_is_the_table_s_with_keep(make_vit: MakeViT, changes: list[tuple[int, int]]) -> None:
    slim = SlimViT.from_timm(make_vit(depth=4))
    for block, keep in changes:
        keep = min(keep, slim.blocks[block].tokens_in)
        before = slim.architecture
        slim.set_keep(block, keep)
        assert slim.architecture == before.with_keep(block, keep)
        keeps = [shape.keep for shape in slim.architecture.blocks]
        assert keeps[block] == keep
        assert keeps[:block] == [shape.keep for shape in before.blocks[:block]]
        assert keeps[block:] == [keep, *(min(shape.keep, keep) for shape in before.blocks[block + 1 :])]
        assert [b.tokens_in for b in slim.blocks] == [16, *keeps[:-1]]
        check_blocks(slim.architecture.blocks, slim.architecture.dense)
    x = slim.embed(pictures(slim))
    for layer in slim.blocks:
        x = layer(x)
        assert x.shape == (3, 1 + layer.keep, 24)


def test_set_keep_can_be_taken_back(make_vit: MakeViT) -> None:
    slim = SlimViT.from_timm(make_vit())
    images = pictures(slim)
    with torch.no_grad():
        whole = slim(images)
        slim.set_keep(0, 5)
        assert not torch.allclose(slim(images), whole)
        for block in range(2):
            slim.set_keep(block, 16)
        assert torch.equal(slim(images), whole)


def test_set_keep_stays_on_the_model_s_device(make_vit: MakeViT) -> None:
    slim = SlimViT.from_timm(make_vit()).to("meta")  # a device that every machine has
    slim.set_keep(0, 5)
    assert slim(pictures(slim).to("meta")).shape == (3, 5)
    assert slim.blocks[0].lowpass.device.type == "meta"


def test_a_low_pass_is_the_model_s_own(make_vit: MakeViT) -> None:
    """It is computed once for all; whoever changes one model's must not change those to come."""
    one, other = SlimViT.from_timm(make_vit()), SlimViT.from_timm(make_vit())
    one.set_keep(0, 5)
    before = one.blocks[0].lowpass.clone()
    one.blocks[0].lowpass.zero_()
    other.set_keep(0, 5)
    assert before.any() and torch.equal(other.blocks[0].lowpass, before)


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN.keys())
def test_a_saved_model_comes_back_bit_for_bit(settings: dict[str, Any], make_vit: MakeViT, tmp_path: Path) -> None:
    slim = slimmed(SlimViT.from_timm(make_vit(**settings), token_cutoff=0.7, energy_norm="l1"), 5)
    slim.train().save(tmp_path / "run")
    loaded = SlimViT.load(tmp_path / "run")
    assert loaded.architecture == slim.architecture
    assert same_weights(loaded, slim)
    assert not loaded.training
    images = pictures(slim)
    with torch.no_grad():
        assert torch.equal(loaded(images), slim.eval()(images))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [ARCHITECTURE_FILE, WEIGHTS_FILE]


def test_the_same_weights_make_the_same_file(make_vit: MakeViT, tmp_path: Path) -> None:
    slim = slimmed(SlimViT.from_timm(make_vit()), 5)
    slim.save(tmp_path / "one")
    SlimViT.load(tmp_path / "one").save(str(tmp_path / "two"))
    for name in (ARCHITECTURE_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_dense_model_is_kept_beside_the_slim_one(make_vit: MakeViT, tmp_path: Path) -> None:
    dense = SlimViT.from_timm(make_vit())
    slim = slimmed(dense, 5)
    slim.save(tmp_path)
    dense.save(tmp_path, DENSE_WEIGHTS_FILE)
    again = SlimViT.load(tmp_path, DENSE_WEIGHTS_FILE)
    assert again.architecture == dense.architecture
    assert same_weights(again, dense)
    assert SlimViT.load(tmp_path).architecture == slim.architecture
