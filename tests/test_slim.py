"""The slim ViT: exact while nothing is removed, whole on disk, honest about its MACs, and picky about what it takes."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeViT
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention, DiffAttention, PatchEmbed, SwiGLUPacked
from timm.models import Eva, ResNet, SwinTransformer, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.energy import EnergyNorm
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


@pytest.fixture
def run(make_vit: MakeViT, tmp_path: Path) -> Path:
    """A run directory whose blocks drop tokens and are thin."""
    slim = SlimViT.from_timm(make_vit())
    blocks = (
        BlockShape(heads=2, qk_dim=4, v_dim=6, hidden=50, keep=10),
        BlockShape(heads=3, qk_dim=8, v_dim=8, hidden=96, keep=7),
    )
    SlimViT(slim.architecture.model_copy(update={"blocks": blocks})).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [ARCHITECTURE_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_files_refused(name: str, share: float, run: Path) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: int(share * (len(content) - 1))])
    with pytest.raises(InputError, match=name):
        SlimViT.load(run)


@pytest.mark.parametrize("name", [ARCHITECTURE_FILE, WEIGHTS_FILE])
def test_missing_files_refused(name: str, run: Path) -> None:
    (run / name).unlink()
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        SlimViT.load(run)


@pytest.mark.parametrize("name", [ARCHITECTURE_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("content", [b"\x00" * 100, b"\xff" * 100, b"{}", b"[]", b'{"blocks": []}'])
def test_damaged_files_refused(name: str, content: bytes, run: Path) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        SlimViT.load(run)


Table = dict[str, Any]


def _set(field: str, value: object, block: int = 0) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        table["blocks"][block][field] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("heads", 4), "block 0: heads is 4, but VisionTransformer has only 3"),
        (_set("qk_dim", 9, 1), "block 1: qk_dim is 9, but VisionTransformer has only 8"),
        (_set("v_dim", 9), "block 0: v_dim is 9, but VisionTransformer has only 8"),
        (_set("hidden", 97, 1), "block 1: hidden is 97, but VisionTransformer has only 96"),
        (_set("keep", 17), "block 0: keep is 17, but only 16 image tokens enter it"),
        (_set("keep", 11, 1), "block 1: keep is 11, but only 10 image tokens enter it"),
        (_set("keep", 0), r"blocks\.0\.keep"),
        (_set("hidden", "many"), r"blocks\.0\.hidden"),
        (_set("width", 3), r"blocks\.0\.width"),
        (lambda table: table["blocks"].pop(), "has 2 blocks, the architecture 1"),
        (lambda table: table.pop("qk_scale"), "qk_scale"),
        (lambda table: table["dense"].update(depth=0), "depth"),
        (lambda table: table.update(token_cutoff=1.0), "token_cutoff"),
        (lambda table: table.update(energy_norm="l3"), "energy_norm"),
    ],
)
def test_impossible_tables_refused(change: Callable[[Table], None], message: str, run: Path) -> None:
    table = json.loads((run / ARCHITECTURE_FILE).read_text())
    change(table)
    (run / ARCHITECTURE_FILE).write_text(json.dumps(table))
    with pytest.raises(InputError, match=message):
        SlimViT.load(run)


@pytest.mark.parametrize("field", ["heads", "qk_dim", "v_dim", "hidden"])
def test_weights_of_another_table_refused(field: str, run: Path) -> None:
    table = json.loads((run / ARCHITECTURE_FILE).read_text())
    table["blocks"][0][field] -= 1
    (run / ARCHITECTURE_FILE).write_text(json.dumps(table))
    with pytest.raises(InputError, match=f"{WEIGHTS_FILE} does not hold the weights of its architecture"):
        SlimViT.load(run)


class Dual(DiffAttention):
    """timm's own, told to weigh by two numbers."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings, dual_lambda=True)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "average and maximum pooling": ({"global_pool": "avgmax"}, "'avgmax' pooling"),
    "no pooling": ({"global_pool": ""}, "'' pooling"),
    "no classifier": ({"num_classes": 0}, "no classifier"),
    "no blocks": ({"depth": 0}, "no blocks"),
    "no positions": ({"pos_embed": "none"}, "position embedding"),
    "RMS norm": ({"norm_layer": "rmsnorm"}, "norm"),
    "normalised patches": ({"embed_norm_layer": "layernorm"}, "patch embedding"),
    "another patch embedding": ({"embed_layer": type("Other", (PatchEmbed,), {})}, "patch embedding"),
    "an image cut short": ({"img_size": 18}, "patch"),
    "a padded image": ({"img_size": 18, "dynamic_img_pad": True}, "patch"),
    "normalised queries": ({"qk_norm": True}, "are normalised, or its output gated"),
    "another attention": ({"attn_layer": type("Own", (Attention,), {})}, "attention is not timm's standard"),
    "other differential attention": ({"attn_layer": Dual}, "attention is not timm.s standard"),
    "normalised differential attention": ({"attn_layer": DiffAttention, "scale_attn_norm": True}, "dual lambda"),
    "no projection bias": ({"proj_bias": False}, "bias"),
    "ReLU": ({"act_layer": "relu"}, "GELU"),
    "SwiGLU": ({"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}, "MLP"),
    "norm after the branches": ({"block_fn": ResPostBlock, "init_values": 0.1}, "standard Block"),
    "parallel branches": ({"block_fn": ParallelScalingBlock}, r"side by side \(ParallelScalingBlock\)"),
    "distilled with registers": ({"kind": VisionTransformerDistilled, "reg_tokens": 1}, "register"),
}


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_other_vits_refused(settings: dict[str, Any], reason: str, make_vit: MakeViT) -> None:
    model = make_vit(**settings)
    with pytest.raises(InputError, match=f"not a plain ViT: .*{reason}.*; use one such as deit_small"):
        SlimViT.from_timm(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SwinTransformer(img_size=16, patch_size=2, embed_dim=8, depths=(1,), num_heads=(2,), window_size=4),
        lambda: ResNet(BasicBlock, [1, 1, 1, 1], channels=(8, 8, 8, 8), num_classes=5),
        lambda: Eva(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=5),
        lambda: nn.Linear(3, 5),
    ],
    ids=["Swin", "ResNet", "EVA", "Linear"],
)
def test_other_models_refused(make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(InputError, match=f"is a {type(model).__name__}, not a plain ViT; use a DeiT or ViT such as"):
        SlimViT.from_timm(model)


def test_a_refusal_names_the_timm_model(make_vit: MakeViT) -> None:
    model = make_vit(qk_norm=True)
    model.pretrained_cfg = {"architecture": "vit_small_normalised"}
    with pytest.raises(InputError, match=r"^vit_small_normalised is not a plain ViT"):
        describe_dense(model)
