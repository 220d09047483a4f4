"""The rivals do what their papers say, at the MACs their papers report, and export whole."""

import warnings
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import MakeViT
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowpass.benchmarks.peers.evit import ReorganisingBlock, evit, evit_macs, matched_keep_rate
from lowpass.benchmarks.peers.tome import MergingBlock, matched_r, tome, tome_macs
from lowpass.pipeline.base.errors import InputError

RIVALS: dict[str, tuple[Callable[[VisionTransformer], nn.Module], Callable[[VisionTransformer], int]]] = {
    "evit": (lambda vit: evit(vit, 0.7), lambda vit: evit_macs(vit, 0.7)),
    "evit, one token fused": (lambda vit: evit(vit, 0.99), lambda vit: evit_macs(vit, 0.99)),
    "tome": (lambda vit: tome(vit, 4), lambda vit: tome_macs(vit, 4)),
    "tome, more than half asked": (lambda vit: tome(vit, 9), lambda vit: tome_macs(vit, 9)),
    "tome, none at first": (lambda vit: tome(vit, (0, 0, *[5] * 10)), lambda vit: tome_macs(vit, (0, 0, *[5] * 10))),
}


@pytest.fixture(scope="module")
def vit(make_vit: MakeViT) -> VisionTransformer:
    """Twelve blocks, 64 tokens; scaled layers, lest one be left out."""
    return make_vit(img_size=32, embed_dim=48, depth=12, init_values=0.5)


@pytest.fixture(scope="module")
def deit_small() -> VisionTransformer:
    """Of the right shape; its weights are not looked at."""
    with torch.device("meta"):
        return VisionTransformer(embed_dim=384, num_heads=6)


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("keep_rate", "published"), [(1, 4.6), (0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)]
)
def test_evit_macs_are_the_published_ones(keep_rate: float, published: float, deit_small: VisionTransformer) -> None:
    assert round(evit_macs(deit_small, keep_rate) / 1e9, 1) == published


@pytest.mark.parametrize(("r", "published"), [(0, 4.6), (8, 3.4), (13, 2.7), (16, 2.3)])
def test_tome_macs_are_the_published_ones(r: int, published: float, deit_small: VisionTransformer) -> None:
    assert round(tome_macs(deit_small, r) / 1e9, 1) == published


@pytest.mark.parametrize(("make", "macs"), RIVALS.values(), ids=RIVALS.keys())
def test_macs_equal_a_flop_counter(
    make: Callable[[VisionTransformer], nn.Module], macs: Callable[[VisionTransformer], int], vit: VisionTransformer
) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        make(vit)(pictures(1))
    assert macs(vit) == counter.get_total_flops() // 2


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.5, 0.4, 0.35])
def test_matched_settings_come_near_from_below(share: float, deit_small: VisionTransformer) -> None:
    target = int(share * tome_macs(deit_small, 0))
    for macs in (
        evit_macs(deit_small, matched_keep_rate(deit_small, target)),
        tome_macs(deit_small, matched_r(deit_small, target)),
    ):
        assert 0.98 * target <= macs <= target


def test_matched_settings_find_the_setting_that_was_measured(vit: VisionTransformer) -> None:
    assert matched_keep_rate(vit, evit_macs(vit, 1)) == 1
    assert evit_macs(vit, matched_keep_rate(vit, evit_macs(vit, 0.7))) == evit_macs(vit, 0.7)
    assert matched_r(vit, tome_macs(vit, 0)) == (0,) * 12
    assert matched_r(vit, tome_macs(vit, 3)) == (3,) * 12
    assert matched_r(vit, tome_macs(vit, (3,) * 8 + (4,) * 4)) == (3,) * 8 + (4,) * 4


@torch.no_grad()
def test_nothing_reduced_is_the_dense_model(vit: VisionTransformer) -> None:
    for rival in (evit(vit, 1), tome(vit, 0)):
        torch.testing.assert_close(rival(pictures(2)), vit(pictures(2)), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_norm_before_the_blocks_is_run(make_vit: MakeViT) -> None:
    vit = make_vit(img_size=32, depth=12, pre_norm=True)
    torch.testing.assert_close(tome(vit, 0)(pictures(2)), vit(pictures(2)), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_dense_model_is_left_alone(vit: VisionTransformer) -> None:
    before = vit(pictures(1))
    for rival in (evit(vit, 0.5), tome(vit, 4)):
        for parameter in rival.parameters():
            parameter.zero_()
    assert torch.equal(vit(pictures(1)), before)


def naive_attention(
    block: nn.Module, tokens: torch.Tensor, sizes: list[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One image's tokens [T, C] after the attention residual, attention [H, T, T] and keys [H, T, D], head by head."""
    attention, width = block.attn, tokens.shape[1]
    size = width // attention.num_heads
    query, key, value = attention.qkv(block.norm1(tokens)).chunk(3, 1)
    mixed, weights, keys = [], [], []
    for start in range(0, width, size):
        q, k, v = (part[:, start : start + size] for part in (query, key, value))
        drawn = torch.exp(q @ k.T / size**0.5) * torch.tensor(sizes)
        weights.append(drawn / drawn.sum(1, keepdim=True))
        mixed.append(weights[-1] @ v)
        keys.append(k)
    return tokens + block.ls1(attention.proj(torch.cat(mixed, 1))), torch.stack(weights), torch.stack(keys)


def naive_mlp(block: nn.Module, tokens: list[torch.Tensor]) -> torch.Tensor:
    stacked = torch.stack(tokens)
    return stacked + block.ls2(block.mlp(block.norm2(stacked)))


def in_one_order(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [T, C] with CLS first and the others by their first channel: neither paper orders them."""
    return torch.cat([tokens[:1], tokens[1:][tokens[1:, 0].argsort()]])


@torch.no_grad()
def test_evit_s_block_is_the_paper_s(vit: VisionTransformer) -> None:
    block, x = vit.blocks[3], torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(3))
    done = ReorganisingBlock(block, 12)(x)
    for image, got in zip(x, done, strict=True):
        tokens, weights, _ = naive_attention(block, image, [1.0] * 20)
        seen = {j: float(weights[:, 0, j].mean()) for j in range(1, 20)}
        ranking = sorted(seen, key=lambda j: -seen[j])
        fused = torch.zeros(48)
        for j in ranking[12:]:
            fused += seen[j] * tokens[j]
        expected = naive_mlp(block, [tokens[0], *(tokens[j] for j in ranking[:12]), fused])
        torch.testing.assert_close(in_one_order(got), in_one_order(expected), rtol=0, atol=1e-5)
        torch.testing.assert_close(got[-1], expected[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("length", "r"), [(20, 5), (20, 9), (21, 10), (3, 1)])
@pytest.mark.parametrize("merged_before", [False, True])
@torch.no_grad()
def test_tome_s_block_is_the_paper_s(length: int, r: int, merged_before: bool, vit: VisionTransformer) -> None:
    generator = torch.Generator().manual_seed(4)
    block, x = vit.blocks[0], torch.randn(2, length, 48, generator=generator)
    sizes = torch.randint(1, 5, (2, length), generator=generator).float() if merged_before else None
    done, sizes_done = MergingBlock(block, r)(x, sizes)
    for i in range(2):
        size = [1.0] * length if sizes is None else sizes[i].tolist()
        tokens, _, keys = naive_attention(block, x[i], size)
        metric = keys.mean(0)
        pairs = []
        for a in range(2, length, 2):
            likeness = {b: float(F.cosine_similarity(metric[a], metric[b], dim=0)) for b in range(1, length, 2)}
            best = max(likeness, key=lambda b: likeness[b])
            pairs.append((likeness[best], a, best))
        groups = {j: [j] for j in range(length)}
        for _, a, b in sorted(pairs, reverse=True)[:r]:
            groups[b] += groups.pop(a)
        merged = [sum(size[j] * tokens[j] for j in group) / sum(size[j] for j in group) for group in groups.values()]
        held = torch.tensor([[sum(size[j] for j in group)] for group in groups.values()])
        expected = torch.cat([naive_mlp(block, merged), held], 1)
        got = torch.cat([done[i], sizes_done[i, :, None]], 1)
        torch.testing.assert_close(in_one_order(got), in_one_order(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rival", ["evit", "tome"])
@torch.no_grad()
def test_images_do_not_touch_each_other(rival: str, vit: VisionTransformer) -> None:
    model, images, order = RIVALS[rival][0](vit), pictures(5), [3, 0, 4, 1, 2]
    logits = model(images)
    torch.testing.assert_close(model(images[order]), logits[order], rtol=0, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("rival", "depth"), [("evit", 12), ("tome", 3)])  # the exporter is slow; ToMe's blocks repeat
def test_onnx_agrees_with_pytorch(rival: str, depth: int, make_vit: MakeViT) -> None:
    model = RIVALS[rival][0](make_vit(img_size=32, embed_dim=48, depth=depth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, 32, 32),),
            dynamo=True,
            opset_version=23,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in program.model_proto.graph.node]
    assert kinds.count("Attention") == depth  # fused in every block, those that reduce too
    for batch in (1, 3):
        (logits,) = session.run(["logits"], {"images": pictures(batch).numpy()})
        with torch.no_grad():
            assert np.abs(logits - model(pictures(batch)).numpy()).max() <= 1e-4


def test_what_cannot_be_is_refused(make_vit: MakeViT, vit: VisionTransformer) -> None:
    for wrong in (make_vit(kind=VisionTransformerDistilled, depth=12), make_vit(reg_tokens=2, depth=12)):
        for build in (lambda m: evit(m, 0.7), lambda m: tome(m, 1)):
            with pytest.raises(InputError, match="prefix tokens"):
                build(wrong)
    for build in (lambda m: evit(m, 0.7), lambda m: tome(m, 1)):
        with pytest.raises(InputError, match="'avg' pooling"):
            build(make_vit(depth=12, global_pool="avg"))
    with pytest.raises(InputError, match="has 9 blocks"):
        evit(make_vit(depth=9), 0.7)
    for keep_rate in (0, 1.1):
        with pytest.raises(ValueError, match="keep rate"):
            evit(vit, keep_rate)
    for r in (-1, (1, 2)):
        with pytest.raises(ValueError, match="non-negative"):
            tome(vit, r)
    for matched in (matched_keep_rate, matched_r):
        with pytest.raises(InputError, match="MACs"):
            matched(vit, 1000)
