"""What makes up a dense timm ViT, and what a ViT may have that stands in the way."""

from collections.abc import Callable
from functools import partial
from typing import cast

from timm.layers import Attention, LayerScale, Mlp, PatchEmbed
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.architecture import DenseViT


def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
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
        InputError: it is not a plain ViT read out through its CLS token, which is all the method is defined for.
    """
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise InputError(
            f"{name} is a {type(model).__name__}, not a plain ViT; use a DeiT or ViT such as deit_small_patch16_224"
        )
    vit = cast(VisionTransformer, model)
    for obstacle, present in obstacles(vit):
        if present:
            raise InputError(f"{name} is not a plain ViT: {obstacle}; use one such as deit_small_patch16_224")
    block = cast(Block, vit.blocks[0])
    grid = cast(tuple[int, int], vit.patch_embed.grid_size)
    patch = cast(tuple[int, int], vit.patch_embed.patch_size)
    return DenseViT(
        name=name,
        img_size=(grid[0] * patch[0], grid[1] * patch[1]),
        patch_size=patch,
        in_chans=vit.in_chans,
        num_classes=vit.num_classes,
        embed_dim=vit.embed_dim,
        num_heads=block.attn.num_heads,
        hidden=block.mlp.fc1.out_features,
        depth=len(vit.blocks),
        norm_eps=block.norm1.eps,
        distilled=isinstance(vit, VisionTransformerDistilled),
        reg_tokens=vit.num_reg_tokens,
        no_embed_class=vit.no_embed_class,
        layer_scale=isinstance(block.ls1, LayerScale),
        qkv_bias=block.attn.qkv.bias is not None,
    )


def _norms(vit: VisionTransformer) -> list[nn.Module]:
    norms = [getattr(block, name) for block in vit.blocks if type(block) is Block for name in ("norm1", "norm2")]
    return [*norms, cast(nn.Module, vit.norm)]


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None


def obstacles(vit: VisionTransformer) -> list[tuple[str, bool]]:
    """What a ViT may have that the method or the slim blocks do not cover."""

    def any_block(test: Callable[[Block], bool]) -> bool:
        return any(type(block) is not Block or test(block) for block in vit.blocks)

    def is_identity(module: nn.Module) -> bool:
        return isinstance(module, nn.Identity)

    return [
        ("it has no blocks", len(vit.blocks) == 0),
        ("it has no CLS token", vit.cls_token is None),
        (f"it reads out by {vit.global_pool!r} pooling, not the CLS token", vit.global_pool != "token"),
        ("it has no classifier", not isinstance(vit.head, nn.Linear)),
        ("its position embedding is not a learned table", vit.pos_embed is None or vit.dynamic_img_size),
        ("it normalises before the blocks", not is_identity(vit.norm_pre) or not is_identity(vit.fc_norm)),
        ("its norm is not a LayerNorm", not all(map(_is_layer_norm, _norms(vit)))),
        (
            "its patch embedding is not a convolution over whole patches",
            type(vit.patch_embed) is not PatchEmbed
            or not is_identity(vit.patch_embed.norm)
            or any(
                size % patch for size, patch in zip(vit.patch_embed.img_size, vit.patch_embed.patch_size, strict=True)
            ),
        ),
        (
            "it is distilled and has register tokens, which timm leaves out",
            isinstance(vit, VisionTransformerDistilled) and vit.num_reg_tokens > 0,
        ),
        ("its blocks are not timm's standard Block", any_block(lambda block: False)),
        ("its attention is not timm's standard Attention", any_block(lambda block: type(block.attn) is not Attention)),
        (
            "its attention is normalised or gated",
            any_block(
                lambda block: (
                    type(block.attn) is Attention
                    and (
                        not all(is_identity(m) for m in (block.attn.q_norm, block.attn.k_norm, block.attn.norm))
                        or block.attn.gate is not None
                    )
                )
            ),
        ),
        (
            "its projections have no bias",
            any_block(lambda block: type(block.attn) is Attention and block.attn.proj.bias is None),
        ),
        (
            "its MLP is not two linear layers with GELU between",
            any_block(
                lambda block: (
                    type(block.mlp) is not Mlp
                    or not isinstance(block.mlp.act, nn.GELU)
                    or block.mlp.act.approximate != "none"
                    or not is_identity(block.mlp.norm)
                )
            ),
        ),
    ]


def embedding_and_head(dense: DenseViT) -> VisionTransformer:
    """timm's ViT without blocks: embedding, prefix tokens, last norm and head."""
    kind = VisionTransformerDistilled if dense.distilled else VisionTransformer
    return kind(
        img_size=dense.img_size,
        patch_size=dense.patch_size,
        in_chans=dense.in_chans,
        num_classes=dense.num_classes,
        embed_dim=dense.embed_dim,
        num_heads=dense.num_heads,
        depth=0,
        reg_tokens=dense.reg_tokens,
        no_embed_class=dense.no_embed_class,
        norm_layer=partial(nn.LayerNorm, eps=dense.norm_eps),
    )
