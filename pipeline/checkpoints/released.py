"""The format VTC-LFC's authors release their compressed DeiTs in: a dict with `model`, `dim_cfg` and `token_cfg`.

`model` is DeiT's state dict with thinner layers: a block's `qkv` holds its query rows, then as many key rows, then its
value rows, each head by head. `dim_cfg` gives the head count of block i as `h.i` (and widths that the tensors have
anyway), `token_cfg[i]` how many image tokens leave block i. Both are missing from a dense checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.checkpoints.files import read_checkpoint
from lowpass.pipeline.checkpoints.state_dict import find_tensors
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture, DenseViT, Preprocessing, check_blocks
from lowpass.pipeline.model.slim_vit import SlimViT

DEIT_KINDS = {192: "tiny", 384: "small", 768: "base"}  # by width
DEIT_DEPTH, DEIT_MLP_RATIO, DEIT_NORM_EPS, DEIT_CROP = 12, 4, 1e-6, 0.9
QK_SCALES = (0.01, 1.0)  # of heads of 10,000 channels and of one


@dataclass(frozen=True)
class Released:
    """A checkpoint as it was read: tensors under timm's names, what each was called, and the two tables beside them."""

    path: Path
    state: dict[str, Tensor]
    names: dict[str, str]
    dim_cfg: Mapping[str, Any]
    token_cfg: list[int] | None

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            InputError: there is no such tensor, or it has other than so many dimensions.
        """
        if key not in self.state:
            raise InputError(f"{self.path} has no {key}; is it a DeiT in VTC-LFC's released format?")
        shape = tuple(self.state[key].shape)
        if len(shape) != dimensions or 0 in shape:
            raise InputError(f"{self.path}: {self.names[key]} is {shape}; it should have {dimensions} dimensions")
        return shape


def read_released(path: Path, qk_scale: float, token_cutoff: float) -> SlimViT:
    """The model in a checkpoint of the released format, slim or dense, on the CPU, in evaluation mode.

    The dense model it came from is not in the file; it is taken to be the DeiT that `qk_scale` implies.

    Args:
        path: the checkpoint.
        qk_scale: what queries are multiplied by: the dense model's head size to the power of -0.5, 0.125 in a DeiT.
        token_cutoff: of the low-pass over tokens, in (0, 1).

    Raises:
        InputError: the file is no such checkpoint; the message names the key and the shapes.
    """
    if not QK_SCALES[0] <= qk_scale <= QK_SCALES[1]:
        raise InputError(f"--qk-scale must lie between {QK_SCALES[0]:g} and {QK_SCALES[1]:g}, not {qk_scale:g}")
    if not 0 < token_cutoff < 1:
        raise InputError(f"--cutoff must lie between 0 and 1, not {token_cutoff:g}")
    read = _read(path)
    ends = _ends(read)
    blocks = _blocks(read, ends, qk_scale)
    dense = _dense(ends, blocks, qk_scale)
    try:
        check_blocks(blocks, dense)
    except InputError as error:
        raise InputError(f"{path}, token_cfg: {error}") from None
    prep = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if dense.in_chans == 3 else ((0.5,) * dense.in_chans,) * 2
    slim = SlimViT(
        Architecture(
            dense=dense,
            preprocessing=Preprocessing(
                mean=prep[0],
                std=prep[1],
                crop_pct=DEIT_CROP,
                interpolation="bicubic",
                source="DeiT's, which VTC-LFC trains with; the file does not say",
            ),
            qk_scale=qk_scale,
            token_cutoff=token_cutoff,
            energy_norm="l1",
            token_score="full",
            blocks=blocks,
        )
    )
    _fill(slim, read)
    return slim.eval()


def _read(path: Path) -> Released:
    content = read_checkpoint(path)
    found = find_tensors(content, path)
    dim_cfg, token_cfg = content.get("dim_cfg"), content.get("token_cfg")
    if dim_cfg is not None and not isinstance(dim_cfg, Mapping):
        raise InputError(f"{path}: dim_cfg is a {type(dim_cfg).__name__}, not a table of sizes by name")
    if token_cfg is not None and not (isinstance(token_cfg, list | tuple) and all(map(_is_count, token_cfg))):
        raise InputError(f"{path}: token_cfg is {token_cfg!r}, not a list of token counts, one a block")
    return Released(
        path,
        found.state,
        {name: original.removeprefix(found.prefix) for name, original in found.names.items()},
        dim_cfg or {},
        None if token_cfg is None else list(token_cfg),
    )


def _ends(read: Released) -> DenseViT:
    """What is never pruned. Heads and hidden width are still to be found out."""
    dim, channels, *patch = read.shape("patch_embed.proj.weight", 4)
    classes, _ = read.shape("head.weight", 2)
    distilled = "dist_token" in read.state
    positions = read.shape("pos_embed", 3)
    tokens = positions[1] - 1 - distilled
    side = isqrt(max(tokens, 0))
    if side == 0 or side**2 != tokens:
        raise InputError(f"{read.path}: pos_embed is {positions}: {tokens} image tokens do not form a square")
    numbers = {
        int(key.split(".")[1]) for key in read.state if key.startswith("blocks.") and key.split(".")[1].isdigit()
    }
    if not numbers:
        raise InputError(f"{read.path} has no blocks.0.attn.qkv.weight; is it a DeiT in VTC-LFC's released format?")
    depth, size = max(numbers) + 1, side * patch[0]
    kind = DEIT_KINDS.get(dim, "") + ("_distilled" if distilled else "")
    name = f"deit_{kind}_patch{patch[0]}_{size}"
    if depth != DEIT_DEPTH or not timm.is_model(name):
        name = f"vit_{dim}x{depth}_patch{patch[0]}_{size}"
    return DenseViT(
        name=name,
        img_size=(size, side * patch[1]),
        patch_size=(patch[0], patch[1]),
        in_chans=channels,
        num_classes=classes,
        embed_dim=dim,
        num_heads=1,
        hidden=1,
        depth=depth,
        norm_eps=DEIT_NORM_EPS,
        distilled=distilled,
        layer_scale="blocks.0.ls1.gamma" in read.state,
        qkv_bias="blocks.0.attn.qkv.bias" in read.state,
    )


def _blocks(read: Released, ends: DenseViT, qk_scale: float) -> tuple[BlockShape, ...]:
    keep = read.token_cfg or [ends.num_tokens] * ends.depth
    if len(keep) != ends.depth:
        raise InputError(f"{read.path}: token_cfg has {len(keep)} counts, but the model {ends.depth} blocks")
    return tuple(_block(read, index, ends, qk_scale, keep[index]) for index in range(ends.depth))


def _block(read: Released, index: int, ends: DenseViT, qk_scale: float, keep: int) -> BlockShape:
    """One block's sizes, from its tensors; the head count is the one thing they do not tell."""
    fused, projection = f"blocks.{index}.attn.qkv.weight", f"blocks.{index}.attn.proj.weight"
    rows, _ = read.shape(fused, 2)
    _, values = read.shape(projection, 2)
    hidden, _ = read.shape(f"blocks.{index}.mlp.fc1.weight", 2)
    heads = _heads(read, index, ends.embed_dim, qk_scale)
    pairs, odd = divmod(rows - values, 2)
    if odd or pairs < 1 or pairs % heads or values % heads:
        raise InputError(
            f"{read.path}: {fused} is {tuple(read.state[fused].shape)} and {projection} "
            f"{tuple(read.state[projection].shape)}: that is not {heads} heads of equal size (dim_cfg h.{index})"
        )
    for part, size in (("q", pairs), ("k", pairs), ("v", values), ("fc1", hidden)):
        told = read.dim_cfg.get(f"{part}.{index}")
        if told is not None and _last(told) != size:
            tensor = f"blocks.{index}.mlp.fc1.weight" if part == "fc1" else fused
            raise InputError(
                f"{read.path}: dim_cfg {part}.{index} is {told!r}, but {tensor} is {tuple(read.state[tensor].shape)}, "
                f"which makes it {size}"
            )
    return BlockShape(heads=heads, qk_dim=pairs // heads, v_dim=values // heads, hidden=hidden, keep=keep)


def _heads(read: Released, index: int, dim: int, qk_scale: float) -> int:
    """The head count `dim_cfg` gives; without one the block must be a dense DeiT's, with heads that suit the scale."""
    told = read.dim_cfg.get(f"h.{index}")
    if told is not None:
        if not _is_count(heads := _last(told)):
            raise InputError(f"{read.path}: dim_cfg h.{index} is {told!r}, not a number of heads")
        return int(heads)
    fused = f"blocks.{index}.attn.qkv.weight"
    head_dim = _implied_head_dim(dim, qk_scale)
    if read.shape(fused, 2)[0] != 3 * dim or head_dim is None:
        raise InputError(
            f"{read.path}: dim_cfg has no h.{index}, and {fused} {tuple(read.state[fused].shape)} does not tell how "
            f"many heads it holds"
        )
    return dim // head_dim


def _dense(ends: DenseViT, blocks: tuple[BlockShape, ...], qk_scale: float) -> DenseViT:
    """The model that the blocks were cut out of: a DeiT with heads that suit the scale, larger where a block is."""
    head_dim = _implied_head_dim(ends.embed_dim, qk_scale)
    if head_dim is None:
        logger.info(
            f"note: --qk-scale {qk_scale:g} is that of heads of {qk_scale**-2:.4g} channels, into which "
            f"{ends.embed_dim} channels cannot be divided; is it the scale the model was trained with?",
        )
    heads = max([block.heads for block in blocks] + [ends.embed_dim // head_dim if head_dim else 1])
    head_dim = max([max(block.qk_dim, block.v_dim) for block in blocks] + [head_dim or 1])
    return ends.model_copy(
        update={
            "num_heads": heads,
            "head_dim": None if heads * head_dim == ends.embed_dim else head_dim,
            "hidden": max([block.hidden for block in blocks] + [DEIT_MLP_RATIO * ends.embed_dim]),
        }
    )


def _implied_head_dim(dim: int, qk_scale: float) -> int | None:
    """The head size that a scale is the inverse root of, if heads of it make up `dim` channels."""
    head_dim = round(qk_scale**-2)
    return head_dim if dim % head_dim == 0 else None


def _fill(slim: SlimViT, read: Released) -> None:
    """Load the weights, every one of which must have its place and its shape."""
    state = dict(read.state)
    expected = slim.vit.state_dict()
    for index in range(len(slim.blocks)):
        for kind in ("weight", "bias") if slim.architecture.dense.qkv_bias else ("weight",):
            parts = [f"blocks.{index}.attn.{part}.{kind}" for part in ("query", "key", "value")]
            fused = f"blocks.{index}.attn.qkv.{kind}"
            rows = [len(expected[part]) for part in parts]
            wanted = (sum(rows), *expected[parts[0]].shape[1:])
            if read.shape(fused, len(wanted)) != wanted:
                raise InputError(_misfit(read, fused, wanted))
            state |= zip(parts, state.pop(fused).split(rows), strict=True)
    for key, tensor in expected.items():
        if key not in state:
            raise InputError(f"{read.path} has no {key}; is it a DeiT in VTC-LFC's released format?")
        if state[key].shape != tensor.shape:
            raise InputError(_misfit(read, key, tuple(tensor.shape)))
    if unknown := sorted(set(state) - set(expected)):
        raise InputError(f"{read.path} holds {read.names[unknown[0]]}, which a DeiT does not have")
    slim.vit.load_state_dict(state)


def _misfit(read: Released, key: str, wanted: tuple[int, ...]) -> str:
    shape = tuple(read.state[key].shape)
    return f"{read.path}: {read.names[key]} is {shape}, but by the other tensors it should be {wanted}"


def _last(told: Any) -> Any:
    """A size, alone or as the last of (input, output)."""
    return told[-1] if isinstance(told, list | tuple) and told else told


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
