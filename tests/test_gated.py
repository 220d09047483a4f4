"""Gated MLPs (SwiGLU): a hidden channel is the product of two rows, which go together and are counted together."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeViT
from families import FAMILIES, ROTARY
from hypothesis import given
from hypothesis import strategies as st
from test_families import pictures
from timm.models import VisionTransformer
from torch import Tensor

from lowpass.benchmarks.peers.evit import evit
from lowpass.benchmarks.peers.vbp import prune_by_variance
from lowpass.export.batch import BatchProfile
from lowpass.export.forecast.work import attention_kernels, mlp_kernels, total_kernels, work_of, work_of_name
from lowpass.export.graph.deployable import deployable
from lowpass.export.graph.keep_fp32 import kept_layers, layer_of
from lowpass.export.onnx.half import LARGEST_HALF, rounded
from lowpass.export.onnx.overflow import find_overflow, further_layers
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.options import ExportOptions
from lowpass.export.runtimes.engine import compile_engine
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.session import logits_of
from lowpass.export.tensorrt.layers import read_layers
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.channels import ChannelChoice, choose_channels, score_threshold
from lowpass.pipeline.method.sensitivity import ChannelScores, channel_scores
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.channel_criteria import CHANNEL_CRITERIA, CriterionContext
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.log_entries import ChannelDecision
from lowpass.pipeline.search.search import search
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.shaping import SHAPINGS
from lowpass.pipeline.search.sub_blocks import choose_of_the_rest, gone_rows, least_liked_first

PACKED, LAST, PLUS, EVA02 = (
    "SwiGLU, gate and value in one layer",
    "a gated MLP, its gate last",
    "DINOv3 plus: SwiGLU",
    "EVA-02: SwiGLU",
)
gated = pytest.mark.parametrize("family", [PACKED, LAST, PLUS, EVA02])
SMALL = SHAPINGS["tensorrt"].model_copy(update={"align": 8, "token_stages": 1})


def slim_of(family: str, make_vit: MakeViT, **changes: Any) -> SlimViT:
    return SlimViT.from_timm(make_vit(**((FAMILIES | ROTARY)[family][0] | changes)), token_score="cls")


def whole(slim: SlimViT, hidden: tuple[int, ...]) -> ChannelChoice:
    """All of the attention, and some hidden channels."""
    shape = slim.blocks[0].shape
    every = (tuple(range(shape.qk_dim)),) * shape.heads
    return ChannelChoice(tuple(range(shape.heads)), every, every, hidden)


@gated
@torch.no_grad()
def test_both_rows_go_and_the_column_that_reads_them(family: str, make_vit: MakeViT) -> None:
    slim = slim_of(family, make_vit)
    block, kept = copy.deepcopy(slim.blocks[1]), (0, 3, 5, 6, 40)
    remove_channels(block, whole(slim, kept))
    before, after = slim.blocks[1].mlp, block.mlp
    assert before.gate is not None and after.gate is not None
    for old, new in ((before.gate, after.gate), (before.fc1, after.fc1)):
        assert torch.equal(new.weight, old.weight[list(kept)]) and torch.equal(new.bias, old.bias[list(kept)])
    assert torch.equal(after.fc2.weight, before.fc2.weight[:, list(kept)])
    tokens = torch.randn(2, 5, 24)
    torch.testing.assert_close(after.features(tokens), before.features(tokens)[..., list(kept)])


@gated
def test_three_matrices_are_counted(family: str, make_vit: MakeViT) -> None:
    slim = slim_of(family, make_vit)
    dense, shape = slim.architecture.dense, slim.blocks[0].shape
    assert dense.mlp_macs(10, shape.hidden) == 10 * 3 * 24 * shape.hidden
    seen = list[int]()
    for layer in (module for module in slim.modules() if isinstance(module, torch.nn.Linear)):
        layer.register_forward_hook(lambda layer, given, _: seen.append(given[0].numel() * layer.out_features))
    slim(pictures(slim, 1))
    products = 2 * 2 * 24 * (dense.num_tokens + dense.num_prefix_tokens) ** 2
    patches = dense.num_tokens * 4 * 4 * 3 * 24
    assert slim.architecture.macs() == sum(seen) + products + patches


def drawn(seed: int, gated: bool = True) -> ChannelScores:
    generator = torch.Generator().manual_seed(seed)
    pairs, values, hidden = (torch.rand(size, generator=generator) for size in ((3, 8), (3, 8), (20,)))
    return ChannelScores(pairs, values, hidden, gated=gated)


@given(st.integers(0, 10_000), st.integers(0, 111))
def test_a_hidden_channel_counts_for_both_of_its_rows(seed: int, n: int) -> None:
    scores = drawn(seed)
    assert scores.rows == 2 * 24 + 24 + 2 * 20
    threshold, hidden = score_threshold(scores, n), scores.hidden
    below = 2 * int((scores.query_key < threshold).sum()) + int((scores.value < threshold).sum())
    assert n - 1 <= below + 2 * int((hidden < threshold).sum()) <= n  # n may fall between the two of a pair
    stay = tuple((hidden >= threshold).nonzero().flatten().tolist())
    assert choose_channels(scores, n).hidden == (stay or (int(hidden.argmax()),))


@given(st.integers(0, 10_000), st.integers(0, 39))
def test_rows_of_a_part_that_goes(seed: int, n: int) -> None:
    scores = drawn(seed)
    assert gone_rows(scores, frozenset(["mlp"])) == 40 and gone_rows(scores, frozenset(["attention"])) == 72
    left = choose_of_the_rest(scores, n, SMALL.model_copy(update={"align": 1}), frozenset(["attention"]))
    assert len(left.hidden) == 20 - n // 2
    sums = 2 * float(scores.query_key.sum()) + float(scores.value.sum()), 2 * float(scores.hidden.sum())
    assert least_liked_first(scores)[0] == ("attention" if sums[0] <= sums[1] else "mlp")


def test_the_two_rows_share_their_sum() -> None:
    """By hand: eq. 5 of each row, added as those of a query and its key are."""
    query, key, value = (torch.ones(2, 3) for _ in range(3))
    gate, first = torch.tensor([[1.0, 2, 0], [0, 0, 1]]), torch.tensor([[3.0, 0, 0], [0, 2, 0]])
    scores = channel_scores((query, key, value, gate, first), num_heads=1)
    assert scores.hidden.tolist() == [1 + 4 + 9, 1 + 4] and scores.gated
    plain = channel_scores((query, key, value, first), num_heads=1)
    assert plain.hidden.tolist() == [9, 4] and not plain.gated


@gated
def test_every_criterion_says_that_hidden_channels_have_two_rows(family: str, make_vit: MakeViT) -> None:
    slim = slim_of(family, make_vit)
    with torch.no_grad():
        tokens = slim.embed(pictures(slim, 8))
    labels = torch.arange(8) % 5
    for criterion in CHANNEL_CRITERIA.values():
        scores = criterion(slim, [(tokens, tokens, labels)], 1, CriterionContext())
        assert scores.gated and scores.hidden.shape == (slim.blocks[1].shape.hidden,)
        assert bool(scores.hidden.isfinite().all())


@gated
def test_obs_knows_what_a_product_is_worth(family: str, make_vit: MakeViT) -> None:
    """A hidden channel whose gate is shut adds nothing, though its other row is large."""
    slim = slim_of(family, make_vit)
    mlp = slim.blocks[0].mlp
    assert mlp.gate is not None
    with torch.no_grad():
        mlp.gate.weight[7], mlp.gate.bias[7] = 0, 0
        mlp.fc1.weight[7] *= 30
        tokens = slim.embed(pictures(slim, 24))
    scores = CHANNEL_CRITERIA["obs"](slim, [(tokens, tokens, tokens)], 0, CriterionContext())
    assert int(scores.hidden.argmin()) == 7
    magnitude = CHANNEL_CRITERIA["magnitude"](slim, [], 0, CriterionContext())
    assert int(magnitude.hidden.argmax()) == 7


@gated
@pytest.mark.parametrize("how", [{"target_macs": 0.5}, {"allowable_drop": 30}], ids=str)
def test_recovery_refits_both_layers(family: str, how: dict[str, Any], make_vit: MakeViT, tmp_path: Path) -> None:
    slim = slim_of(family, make_vit, depth=3)
    images = pictures(slim, 24)
    with torch.no_grad():
        labels = slim(images).argmax(1)
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    entries: list[Any] = []
    settings = SearchSettings(**how, shaping=SMALL, batch_size=8)
    search(slim, batches, batches, settings, tmp_path, SearchLog([], entries.append))
    decided = [entry for entry in entries if isinstance(entry, ChannelDecision)]
    layers = {refit.layer for entry in decided for refit in entry.refits}
    assert {"mlp.gate/fc1", "mlp.fc2"} <= layers and "mlp.fc1" not in layers
    assert all(refit.after <= refit.before for entry in decided for refit in entry.refits)


@gated
def test_kernels_are_those_of_the_forecast(family: str, make_vit: MakeViT) -> None:
    """TensorRT makes one product of both layers, and one kernel more of the gate."""
    slim = slim_of(family, make_vit, embed_dim=48, depth=3)
    profile = BatchProfile.parse("4:4:4")
    traced = to_onnx(slim, ExportOptions(precision="fp16"))
    (layers,) = read_layers(compile_engine("tensorrt-rtx", traced.SerializeToString(), profile).log, traced, profile)
    fused = [kernel for kernel in layers.kernels if kernel.is_attention]
    assert len(fused) == (2 if family in (PACKED, LAST) else 3)
    block = work_of(slim.architecture).blocks[1]
    assert block.gated
    told = total_kernels(attention_kernels(block, "tensorrt", 4, 2)) + total_kernels(
        mlp_kernels(block, "tensorrt", 4, 2)
    )
    assert next(total.kernels for total in layers.blocks if total.block == 1) == told
    assert work_of(slim.architecture).macs() == slim.architecture.macs()


def test_forecasts_by_name_know_gates() -> None:
    for name, layers in (
        ("eva02_tiny_patch14_224", 3),
        ("vit_small_plus_patch16_dinov3", 4),
        ("eva02_base_patch14_224", 4),
    ):
        work = work_of_name(name, None)
        assert work.blocks[0].gated and len(work.blocks[0].layers) == layers
    plus = work_of_name("vit_small_plus_patch16_dinov3", 224)
    assert plus.blocks[0].layers == ((384, 384), (384, 1536), (384, 1536), (1536, 384))
    assert not work_of_name("deit_tiny_patch16_224", None).blocks[0].gated


def larger(which: str, factor: float) -> Callable[[SlimViT], None]:
    """A layer's channel larger, what reads it smaller: the same function, but for rounding. `product`: both layers'."""

    def change(slim: SlimViT) -> None:
        mlp = slim.blocks[0].mlp
        for name in ("gate", "fc1") if which == "product" else ("fc1",):
            layer = getattr(mlp, name)
            layer.weight[5] *= factor
            layer.bias[5] *= factor
        mlp.fc2.weight[:, 5] /= factor

    return change


@pytest.mark.parametrize(("which", "factor"), [("fc1", 1e6), ("product", 3e3)])
@torch.no_grad()
def test_what_overflows_half_precision_is_kept_wide(which: str, factor: float, make_vit: MakeViT) -> None:
    """A product may be too large where neither of its factors is."""
    slim = slim_of(PACKED, make_vit, reg_tokens=0)
    mlp = slim.blocks[0].mlp
    assert mlp.gate is not None
    mlp.gate.bias[5] = 3
    larger(which, factor)(slim)
    images = pictures(slim, 16)
    exact = slim(images)
    assert not deployable(slim, "fp16")(images).isfinite().all()
    kept: tuple[str, ...] = ()
    for _ in range(3):
        content = to_onnx(slim, ExportOptions(precision="fp16", keep_fp32=kept)).SerializeToString()
        found = find_overflow("file", content, [images.numpy()], str)
        assert found is not None
        if found.wrong is None:
            break
        kept = further_layers("file", found, kept, True)
    assert set(kept) == {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"} and found.largest.value < LARGEST_HALF
    half = deployable(slim, "fp16", kept=kept_layers(kept, 2))(images)
    assert half.isfinite().all() and (half - exact).abs().median() < 0.01 * exact.abs().max()
    np.testing.assert_allclose(logits_of(OnnxRuntime(rounded(content)), images.numpy()), exact.numpy(), atol=0.05)


def test_names_of_nodes() -> None:
    """The gate, and the product, belong to the first layer; what multiplies in attention does not."""
    for node in ("gate.MatMul", "gate.Add", "gate.linear.MatMul", "fc1.MatMul", "Mul"):
        assert layer_of(f"blocks.3.mlp.{node}") == "blocks.3.mlp.fc1"
    assert layer_of("blocks.3.mlp.fc2.MatMul") == "blocks.3.mlp.fc2"
    assert [layer_of(f"blocks.3.{node}") for node in ("attn.Mul", "mlp.act.Mul", "Mul", "mlp.Mul.x")] == [None] * 4


def test_rivals_do_not_take_them(make_vit: MakeViT) -> None:
    changes = FAMILIES[PACKED][0] | {"reg_tokens": 0}
    vit: VisionTransformer = make_vit(**changes)
    with pytest.raises(InputError, match=r"has gated MLPs \(SwiGLU\); the rivals take"):
        evit(vit, 0.7)
    slim = SlimViT.from_timm(vit)
    with pytest.raises(InputError, match=r"has gated MLPs \(SwiGLU\), which Variance-Based Pruning is not defined for"):
        prune_by_variance(slim, [pictures(slim)], 0.5)


@gated
@torch.no_grad()
def test_saved_and_loaded(family: str, make_vit: MakeViT, tmp_path: Path) -> None:
    slim = slim_of(family, make_vit)
    for block in slim.blocks:
        remove_channels(block, whole(slim, tuple(range(0, 60, 2))))
    slim.save(tmp_path)
    again, images = SlimViT.load(tmp_path), pictures(slim)
    assert again.architecture == slim.architecture and again.architecture.dense.gated
    assert torch.equal(again(images), slim(images))


@torch.no_grad()
def test_the_gate_is_the_half_that_timm_gates_by(make_vit: MakeViT) -> None:
    """Swapped, the comparisons with timm would not hold."""
    for family in (PACKED, LAST):
        slim, images = slim_of(family, make_vit), None
        images = pictures(slim)
        other = copy.deepcopy(slim)
        for block in other.blocks:
            block.mlp.gate, block.mlp.fc1 = block.mlp.fc1, block.mlp.gate  # type: ignore[assignment]
        difference: Tensor = other(images) - slim(images)
        assert difference.abs().max() > 1e-3
