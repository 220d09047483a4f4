"""What makes up a dense timm ViT, and what a ViT may have that stands in the way. `from_eva.py` has those with rotary
positions."""

from collections.abc import Iterator
from typing import Any, cast

from timm.layers import Attention, DiffAttention, LayerScale
from timm.models import Eva, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.architecture import DenseViT
from lowpass.pipeline.model.from_eva import describe_eva, eva_state
from lowpass.pipeline.model.readout import TokenAndMeanEva, TokenAndMeanViT
from lowpass.pipeline.model.timm_parts import (
    NO_MLP,
    alike,
    in_common,
    is_gated,
    is_identity,
    is_layer_norm,
    is_mlp,
    is_whole_patches,
    mlp_state,
)


def slim_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a timm model that `describe_dense` takes, under a `SlimViT`'s names."""
    state = eva_state(model) if isinstance(model, Eva) else _split_qkv(model.state_dict())
    for index, block in enumerate(cast(Any, model).blocks):
        stem = f"blocks.{index}.mlp."
        own = {name.removeprefix(stem): state.pop(name) for name in list(state) if name.startswith(stem)}
        state |= {stem + name: tensor for name, tensor in mlp_state(block.mlp, own).items()}
    return state


def _split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict with each fused `qkv` layer as `query`, `key` and `value`."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        before, fused, after = name.partition("attn.qkv.")
        if fused:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                split[f"{before}attn.{part}.{after}"] = rows
        else:
            split[name] = tensor
    return split


def describe_dense(model: nn.Module) -> DenseViT:
    """What makes up a dense timm ViT.

    Raises:
        InputError: it is not a plain ViT, which is all the method is defined for.
    """
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    if type(model) in (Eva, TokenAndMeanEva) and cast(Eva, model).rope is not None:
        pool: Any = "token+avg" if isinstance(model, TokenAndMeanEva) else cast(Eva, model).global_pool
        return describe_eva(model, name, pool)
    if type(model) not in (VisionTransformer, VisionTransformerDistilled, TokenAndMeanViT):
        raise InputError(
            f"{name} is a {type(model).__name__}, not a plain ViT; use a DeiT or ViT such as deit_small_patch16_224"
        )
    vit = cast(VisionTransformer, model)
    for obstacle, present in obstacles(vit):
        if present:
            raise InputError(f"{name} is not a plain ViT: {obstacle}; use one such as deit_small_patch16_224")
    block = cast(Block, vit.blocks[0])
    return DenseViT(
        **in_common(vit, name),
        distilled=isinstance(vit, VisionTransformerDistilled),
        reg_tokens=vit.num_reg_tokens,
        layer_scale=isinstance(block.ls1, LayerScale),
        qkv_bias=block.attn.qkv.bias is not None,
        class_token=vit.cls_token is not None,
        global_pool="token+avg" if isinstance(vit, TokenAndMeanViT) else vit.global_pool,
        pool_prefix=vit.pool_include_prefix,
        attn_norm=not is_identity(block.attn.norm),
        mlp_norm=not is_identity(block.mlp.norm),
        differential=isinstance(block.attn, DiffAttention),
    )


def _norms(vit: VisionTransformer) -> list[nn.Module]:
    """Every norm there is, in and around the blocks."""
    around = [vit.norm_pre, vit.norm, vit.fc_norm]
    inside = [part for block in vit.blocks for part in (block.norm1, block.norm2, block.attn.norm, block.mlp.norm)]
    return [norm for norm in (*around, *inside) if not is_identity(norm)]


def obstacles(vit: VisionTransformer) -> Iterator[tuple[str, bool]]:
    """What a ViT may have that the method or the slim blocks do not cover. Later ones take the earlier to be absent."""
    yield "it has no blocks", len(vit.blocks) == 0
    kinds = {type(block).__name__ for block in vit.blocks} - {Block.__name__}
    parallel = sorted(kind for kind in kinds if "Parallel" in kind)
    yield f"its attention and MLP run side by side ({', '.join(parallel)})", bool(parallel)
    yield f"its blocks are {', '.join(sorted(kinds))}, not timm's standard Block", bool(kinds)
    pool = vit.global_pool
    yield f"it reads out by {pool!r} pooling, not 'token', 'avg' or 'map'", pool not in ("token", "avg", "map")
    yield "it has no classifier", not isinstance(vit.head, nn.Linear)
    heads = [head for name in ("head", "head_dist") if isinstance(head := getattr(vit, name, None), nn.Linear)]
    yield (
        "its classifier has one output, of which neither top-1 nor a divergence says anything",
        any(head.out_features == 1 for head in heads),
    )
    yield "its classifier has no bias", any(head.bias is None for head in heads)
    yield "its position embedding is not a learned table", vit.pos_embed is None
    yield "its patch embedding is not a convolution over whole patches", not is_whole_patches(vit.patch_embed)
    yield (
        "it is distilled and has register tokens, which timm leaves out",
        isinstance(vit, VisionTransformerDistilled) and vit.num_reg_tokens > 0,
    )
    blocks: list[Block] = list(vit.blocks)
    yield (
        "its attention is not timm's standard or differential Attention",
        any(type(block.attn) not in (Attention, DiffAttention) for block in blocks),
    )
    yield (
        "its differential attention has a dual lambda or a norm before its projection",
        any(
            isinstance(block.attn, DiffAttention) and (block.attn.dual_lambda or not is_identity(block.attn.norm))
            for block in blocks
        ),
    )
    yield (
        "the queries and keys of its attention are normalised, or its output gated",
        any(
            not is_identity(block.attn.q_norm)
            or not is_identity(block.attn.k_norm)
            or getattr(block.attn, "gate", None) is not None
            for block in blocks
        ),
    )
    yield "its projections have no bias", any(block.attn.proj.bias is None for block in blocks)
    yield NO_MLP, not all(is_mlp(block.mlp) for block in blocks)
    gated = any(is_gated(block.mlp) for block in blocks)
    yield (
        "its gated MLP has a norm over hidden channels, which each that goes would change for the others",
        gated and any(not is_identity(block.mlp.norm) for block in blocks),
    )
    yield "it reads out by attention pooling, and its MLP is gated", gated and pool == "map"
    yield "its norm is not a LayerNorm", not all(map(is_layer_norm, _norms(vit)))
    yield "its blocks, or the epsilons of its norms, are not all alike", not alike(vit.blocks, _norms(vit))
