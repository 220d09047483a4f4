"""Small models of which whole parts of blocks are gone, for the tests of `test_sub_blocks*.py`."""

from typing import Any

import timm
import torch
from conftest import MakeViT
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture, check_blocks
from lowpass.pipeline.model.slim_vit import SlimViT

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
