"""Every attention of every FP16 and BF16 export fuses: TensorRT-RTX refuses to build otherwise (see test_export)."""

import itertools
from collections.abc import Sequence

import pytest
import timm
import torch
from marks import few

from lowpass.export.batch import BatchProfile
from lowpass.export.graph.deployable import deployable
from lowpass.export.onnx.trace import trace
from lowpass.export.options import Precision
from lowpass.export.runtimes.engine import compile_engine
from lowpass.pipeline.method.token_choices import TokenScore
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.shaping import SHAPINGS

MODELS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
PROFILES = ("1:8:8", "8")  # dynamic and static batch
DEPTH = 6  # blocks of a kind fuse alike: half as many as DeiT has


def build(slim: SlimViT, precision: Precision, profiles: Sequence[str] = PROFILES[:1]) -> int:
    """How many fused attentions the built graph has."""
    size = slim.architecture.dense.img_size
    model = trace(deployable(slim, precision), torch.zeros(2, 3, *size))
    for profile in profiles:
        assert compile_engine("tensorrt-rtx", model.SerializeToString(), BatchProfile.parse(profile)).plan
    return sum(node.op_type == "Attention" for node in model.graph.node)


def dropping(slim: SlimViT, stages: int) -> int:
    """Drop tokens as `--token-stages` does and thin a head; how many blocks score."""
    depth = len(slim.blocks)
    chosen = SHAPINGS["tensorrt"].model_copy(update={"token_stages": stages}).stages(depth)
    for index in chosen:
        slim.set_keep(index, max(1, slim.blocks[index].tokens_in * 7 // 8))
    return sum(block.scores_tokens for block in slim.blocks)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("stages", few(range(6), 3))
def test_digits(digits_slim: SlimViT, precision: Precision, stages: int) -> None:
    slim = SlimViT(digits_slim.architecture.model_copy(update={"token_score": "cls"})).eval()
    assert dropping(slim, stages) == (stages or 6)
    profiles = PROFILES if stages == 3 else PROFILES[:1]
    assert build(slim, precision, profiles) == 6 - 1  # the last asks for CLS alone, and has that row written out


def test_the_smallest_heads(digits_slim: SlimViT) -> None:
    """Thinner than any that TensorRT fuses, and unequal: padded, they fuse."""
    thin = [block.model_copy(update={"qk_dim": 9, "v_dim": 10}) for block in digits_slim.architecture.blocks]
    assert build(SlimViT(digits_slim.architecture.model_copy(update={"blocks": tuple(thin)})).eval(), "fp16") == 6 - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "stages", "precision"),
    [
        *itertools.product(MODELS, (3,), ("fp16", "bf16")),
        *itertools.product(("small",), (0, 1, 2, 4, 5), ("fp16",)),
    ],
)
def test_deit(model: str, stages: int, precision: Precision) -> None:
    width, heads = MODELS[model]
    vit = timm.create_model("deit_small_patch16_224", embed_dim=width, num_heads=heads, depth=DEPTH).eval()
    slim = SlimViT.from_timm(vit, token_score="cls")
    assert dropping(slim, stages) == (stages or DEPTH)
    assert build(slim, precision, PROFILES if stages == 3 else PROFILES[:1]) == DEPTH - 1


@pytest.mark.slow
@pytest.mark.parametrize("score", ["full", "cls"])
def test_the_full_score_builds_too(score: TokenScore) -> None:
    """Blocks that score in full have no `Attention`; the others keep theirs."""
    slim = SlimViT.from_timm(timm.create_model("deit_tiny_patch16_224", depth=DEPTH).eval(), token_score=score)
    dropping(slim, 3)
    scoring = sum(block.scores_tokens for block in slim.blocks[:-1])
    assert build(slim, "fp16") == DEPTH - 1 - (scoring if score == "full" else 0)
