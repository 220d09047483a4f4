"""What makes up a dense ViT with rotary positions, timm's `Eva`: DINOv3, RoPE-ViT, Perception Encoder and its own.

There are two orders of a head's channels. In one a pair that turns together is (i, i + D/2), as in DINOv3 and in slim
models; in the other it is (2 i, 2 i + 1). Logits do not depend on the order of query and key channels, so that these
are brought into the first order as they are read.
"""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.rotary import Rotary, rotary_table
from lowpass.pipeline.model.architecture import DenseViT, GlobalPool
from lowpass.pipeline.model.stream import MOST
from lowpass.pipeline.model.timm_parts import (
    NO_MLP,
    alike,
    in_common,
    is_identity,
    is_layer_norm,
    is_mlp,
    is_whole_patches,
)

# Every part that is looked at here, or that does nothing in evaluation mode.
PARTS = {"patch_embed", "pos_drop", "patch_drop", "rope", "norm_pre", "blocks", "norm", "fc_norm", "head_drop", "head"}
BLOCK_PARTS = {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}
ATTENTION_PARTS = {"qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
TENSORS = {"cls_token", "reg_token", "pos_embed", "gamma_1", "gamma_2", "q_bias", "v_bias", "k_bias"}
NEAR = 1e-4  # of timm's own cosines and sines, which are FP32 all the way


def describe_eva(model: nn.Module, name: str, pool: GlobalPool) -> DenseViT:
    """What makes up a dense `Eva` with rotary positions, whose classifier reads what `pool` says.

    Raises:
        InputError: it has what the method or the slim blocks do not cover.
    """
    vit: Any = model
    for obstacle, present in _obstacles(vit):
        if present:
            raise InputError(f"{name} is not a plain ViT: {obstacle}; use one such as deit_small_patch16_224")
    block = vit.blocks[0]
    return DenseViT(
        **in_common(vit, name),
        reg_tokens=0 if vit.reg_token is None else vit.reg_token.shape[1],
        layer_scale=block.gamma_1 is not None,
        qkv_bias=_has_bias(block.attn),
        class_token=vit.cls_token is not None,
        global_pool=pool,
        rotary=rotary_of(vit.rope, vit.patch_embed.grid_size),
        learned_positions=vit.pos_embed is not None,
    )


def rotary_of(rope: nn.Module, grid: tuple[int, int]) -> Rotary:
    """The angles that timm's module makes for an image of `grid` tokens."""
    made: Any = rope
    temperature, offset = float(made.temperature), float(made.grid_offset)
    columns_first = made.grid_indexing == "xy"
    if isinstance(rope, RotaryEmbeddingDinoV3):  # from -1 to 1, a token's middle counts
        step = tuple(4 * math.pi / size for size in grid)
        offsets = tuple(0.5 + offset - size / 2 for size in grid)
    else:
        step = tuple(of / size for of, size in zip(made.ref_feat_shape or grid, grid, strict=True))
        offsets = (offset, offset)
    return Rotary(temperature=temperature, step=step, offset=offsets, columns_first=columns_first)


def eva_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of an `Eva` that `describe_eva` takes, under a `SlimViT`'s names."""
    vit: Any = model
    state: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        before, inside, _ = name.partition(".attn.")
        if not inside or name.startswith(f"{before}.attn.proj."):
            state[name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")] = tensor
    for index, block in enumerate(vit.blocks):
        attention, stem = block.attn, f"blocks.{index}.attn"
        order = _order(attention)
        for part, (weight, bias) in zip(("query", "key", "value"), _layers(attention), strict=True):
            rows = torch.arange(len(weight), device=weight.device) if part == "value" else order.to(weight.device)
            state[f"{stem}.{part}.weight"] = weight[rows]
            if _has_bias(attention):  # a key may have none where the others do
                state[f"{stem}.{part}.bias"] = weight.new_zeros(len(weight)) if bias is None else bias[rows]
        pairs = torch.arange(attention.head_dim // 2)
        state[f"{stem}.pairs"] = pairs.repeat(attention.num_heads, 1)
    return state


def _layers(attention: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of query, key and value, which may be one layer or three, with biases of their own or not."""
    if attention.qkv is None:
        return [(layer.weight, layer.bias) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    weights = attention.qkv.weight.chunk(3)
    if attention.qkv.bias is not None:
        return list(zip(weights, attention.qkv.bias.chunk(3), strict=True))
    biases = [getattr(attention, name, None) for name in ("q_bias", "k_bias", "v_bias")]  # the key's is a buffer of 0
    return list(zip(weights, biases, strict=True))


def _has_bias(attention: Any) -> bool:
    return any(bias is not None for _, bias in _layers(attention))


def _order(attention: Any) -> Tensor:
    """The rows of query and key with pairs (i, i + D/2) in each head."""
    size = attention.head_dim
    head = torch.arange(size)
    if not attention.rotate_half:
        head = torch.cat([head[::2], head[1::2]])
    heads: Tensor = torch.arange(attention.num_heads)[:, None] * size + head
    return heads.flatten()


def _obstacles(vit: Any) -> Iterator[tuple[str, bool]]:
    """What a model may have that is not covered. Later ones take the earlier to be absent."""
    blocks: list[Any] = list(vit.blocks)
    yield "it has no blocks", not blocks
    yield "its norms are behind attention and MLP, not before", any(type(block) is not EvaBlock for block in blocks)
    yield (
        "its rotary frequencies are learned, of each block and head (mixed RoPE)",
        isinstance(vit.rope, RotaryEmbeddingMixed),
    )
    kind = type(vit.rope)
    yield f"its rotary positions are of another kind ({kind.__name__})", not _is_known(vit.rope)
    yield (
        "it reads out by attention pooling, of heads and a width of its own",
        vit.attn_pool is not None or vit.global_pool == "map",
    )
    pool = vit.global_pool
    yield f"it reads out by {pool!r} pooling, not 'token' or 'avg'", pool not in ("token", "avg")
    yield "it has no classifier", not isinstance(vit.head, nn.Linear)
    yield (
        "its classifier has one output, of which neither top-1 nor a divergence says anything",
        vit.head.out_features == 1,
    )
    yield "its classifier has no bias", vit.head.bias is None
    yield "its patch embedding is not a convolution over whole patches", not is_whole_patches(vit.patch_embed)
    yield f"its grid of tokens has more than {MOST} rows or columns", max(vit.patch_embed.grid_size) > MOST
    yield "it has a norm before pooling and one behind", not (is_identity(vit.norm) or is_identity(vit.fc_norm))
    attentions = [block.attn for block in blocks]
    yield (
        "its attention is not timm's EvaAttention or AttentionRope",
        any(type(attention) not in (EvaAttention, AttentionRope) for attention in attentions),
    )
    yield (
        "several of its query heads share a key and a value",
        any(getattr(attention, "num_kv_groups", 1) != 1 for attention in attentions),
    )
    yield (
        "the queries and keys of its attention are normalised, or its output gated",
        any(
            not (is_identity(attention.q_norm) and is_identity(attention.k_norm))
            or getattr(attention, "gate", None) is not None
            for attention in attentions
        ),
    )
    yield NO_MLP, not all(is_mlp(block.mlp) for block in blocks)
    yield (
        "it has norms inside attention or MLP, which each channel that goes would change for the others",
        any(not (is_identity(block.attn.norm) and is_identity(block.mlp.norm)) for block in blocks),
    )
    yield (
        "its heads do not make up its width, or are not of whole pairs on both axes",
        any(a.head_dim * a.num_heads != vit.embed_dim or a.head_dim % 4 for a in attentions),
    )
    yield "its projections have no bias", any(attention.proj.bias is None for attention in attentions)
    yield (
        "its attention and its MLP are not both scaled, or both not",
        any((block.gamma_1 is None) != (block.gamma_2 is None) for block in blocks),
    )
    norms = [norm for norm in (vit.norm_pre, vit.norm, vit.fc_norm) if not is_identity(norm)]
    norms += [norm for block in blocks for norm in (block.norm1, block.norm2)]
    yield "its norm is not a LayerNorm", not all(map(is_layer_norm, norms))
    yield "its blocks, or the epsilons of its norms, are not all alike", not alike(vit.blocks, norms)
    unknown = sorted(_unknown(vit))
    yield f"it has parts that lowpass does not know ({', '.join(unknown)})", bool(unknown)
    yield "its rotary positions are not what their settings say", not _as_told(vit)


def _is_known(rope: Any) -> bool:
    """Whether angles are a coordinate times a frequency, all of it told by settings that `rotary_of` reads."""
    if type(rope) is RotaryEmbeddingDinoV3:
        told = (rope.temperature, rope.min_period, rope.max_period, rope.normalize_coords)
        return told[0] is not None and told[1:] == (None, None, "separate")
    return type(rope) is RotaryEmbeddingCat and not rope.in_pixels


def _unknown(vit: Any) -> Iterator[str]:
    """Parts and tensors beside those that are looked at."""
    known = [(vit, "", PARTS)]
    for index, block in enumerate(vit.blocks):
        known += [(block, f"blocks.{index}.", BLOCK_PARTS), (block.attn, f"blocks.{index}.attn.", ATTENTION_PARTS)]
    for module, prefix, parts in known:
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        yield from (prefix + name for name, _ in module.named_children() if name not in parts)
        yield from (prefix + name for name, _ in own if name not in TENSORS)
    yield from (f"rope.{name}" for name, _ in vit.rope.named_parameters())


def _as_told(vit: Any) -> bool:
    """Whether timm's own table of angles is ours. A model on the meta device has none."""
    grid, size, half = vit.patch_embed.grid_size, vit.blocks[0].attn.head_dim, vit.blocks[0].attn.rotate_half
    if getattr(vit.rope, "rotate_half", half) != half or any(b.attn.rotate_half != half for b in vit.blocks):
        return False
    theirs = vit.rope.get_embed(shape=list(grid))
    if theirs.is_meta:
        return True
    sine, cosine = (part[:, : size // 2] if half else part[:, ::2] for part in theirs.detach().float().chunk(2, -1))
    ours = rotary_table(rotary_of(vit.rope, grid), grid, size // 2)
    return torch.allclose(ours, torch.stack([cosine, sine]).cpu(), rtol=0, atol=NEAR)
