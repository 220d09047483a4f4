"""What there is to compute: the kernels of a ViT in an engine, from its shape alone.

An engine by TensorRT has the seven kernels a block that `layers.json` shows; one more where the MLP is gated, whose
first two layers it makes one. torch.compile leaves GELU and both norms alone and keeps the residual stream in FP32
(autocast); eager PyTorch casts and moves besides.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import timm
import torch
from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture, DenseViT

Engine = Literal["tensorrt", "pytorch-compiled", "pytorch-eager"]
ENGINES: tuple[Engine, ...] = ("tensorrt", "pytorch-compiled", "pytorch-eager")
TILE = 128  # rows and columns that one multiprocessor works on at a time
HALF, FULL = 2, 4  # bytes
# Bytes that the other kernels of attention, and of the MLP, read and write an element of the stream ("e") or of the
# hidden layer ("m").
OF_ATTENTION: dict[Engine, tuple[tuple[str, int], ...]] = {
    "tensorrt": (("e", 2 * HALF),),
    "pytorch-compiled": (("e", FULL + HALF),),
    "pytorch-eager": (("e", 2 * FULL), ("e", FULL + HALF), ("e", 2 * HALF), ("e", 2 * FULL + HALF)),
}
OF_MLP: dict[Engine, tuple[tuple[str, int], ...]] = {
    "tensorrt": (("e", 2 * HALF),),
    "pytorch-compiled": (("e", 2 * (FULL + HALF)), ("m", 2 * HALF), ("e", 2 * FULL + HALF)),
    "pytorch-eager": (("e", 2 * FULL), ("e", FULL + HALF), ("e", 2 * FULL + HALF), ("m", 2 * HALF)),
}
# What takes the place of the activation where the MLP is gated, and reads the layer twice.
OF_GATE: dict[Engine, tuple[tuple[str, int], ...]] = {
    "tensorrt": (("m", 3 * HALF),),
    "pytorch-compiled": (("m", 3 * HALF),),
    "pytorch-eager": (("m", 2 * HALF), ("m", 3 * HALF)),
}
MOVES = 2  # of query, key and value, where their product has a bias or rotary positions turn them
SCORING = 5  # kernels more in a block that chooses tokens (counted in TensorRT-RTX's engines)


@dataclass(frozen=True)
class Kernel:
    """`count` launches of one kernel for a whole batch. `flops` are two a multiply-accumulate, `bytes` what it reads
    and writes, `tiles` how many pieces of its output multiprocessors can share; `block` None: the ends."""

    kind: Literal["gemm", "attention", "other"]
    flops: float
    bytes: float
    tiles: int = 1
    count: int = 1
    block: int | None = None


@dataclass(frozen=True)
class Block:
    """One block for one image. `tokens` enter, `kept` go on to the MLP, `read` is how many rows of the last block
    anybody reads. `qk` and `v` are all heads' channels; `layers` the linear ones behind attention, (in, out). `scores`:
    it chooses tokens; `moves`: kernels that do nothing else."""

    tokens: int
    kept: int
    read: int | None
    width: int
    qk: int
    v: int
    layers: tuple[tuple[int, int], ...]
    hidden: int
    scores: bool = False
    moves: int = 0

    @property
    def gated(self) -> bool:
        """Whether the MLP's first layers give more than its last one reads: what gates, and what is gated."""
        return sum(columns for _, columns in self.layers[1:-1]) > self.hidden


@dataclass(frozen=True)
class Work:
    """A model for one image: patches of so many numbers, the blocks, classes."""

    patches: int
    patch: int
    blocks: tuple[Block, ...]
    classes: int

    def macs(self) -> int:
        """Multiply-accumulates of one image, as a table counts them: every block whole."""
        whole = replace(self, blocks=tuple(replace(block, read=None) for block in self.blocks))
        return round(sum(kernel.count * kernel.flops for kernel in kernels(whole, "tensorrt", 1, HALF)) / 2)


@cache
def work_of_name(name: str, img_size: int | None) -> Work:
    """A dense ViT that timm has by name, from its layers; no weights are made.

    Raises:
        InputError: timm has none of that name or size, or it is no ViT of alike blocks.
    """
    size = {} if img_size is None else {"img_size": img_size}
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **size)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise InputError(f"timm makes no {name!r} of that size: {str(error).splitlines()[0]}") from None
    embed: Any = getattr(model, "patch_embed", None)
    blocks = getattr(model, "blocks", None)
    patches = getattr(embed, "num_patches", None)
    if patches is None or not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise InputError(f"{name} is no plain ViT: nothing is known of how long it takes")
    tokens = patches + getattr(model, "num_prefix_tokens", 1)
    pixels = math.prod(embed.patch_size) * 3
    made = [one for block in blocks for one in _blocks_of_timm(block, tokens, model.embed_dim)]
    if not made:
        raise InputError(f"{name} has no blocks of attention and MLP")
    return Work(patches, pixels, tuple(made), model.num_classes)


def _blocks_of_timm(block: nn.Module, tokens: int, width: int) -> Iterator[Block]:
    """A block, or the parallel ones that it holds."""
    linear = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
    first = [layer for layer in linear if layer.in_features == width and layer.out_features >= 3 * width]
    parallel = max(1, len(getattr(block, "attns", ())))
    names = [name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
    split = parallel == 1 and any(name.endswith(("q_proj", "k_proj", "v_proj")) for name in names)
    if not (first or split) or len(linear) % parallel:
        return
    # Query, key and value may be one layer or three; the rest is the projection and the MLP.
    each = linear[: len(linear) // parallel] if parallel == 1 else [*linear[:2], *linear[-2:]]
    behind = each[3:] if split else each[1:]
    hidden = max(layer.in_features for layer in behind)
    layers = tuple((layer.in_features, layer.out_features) for layer in behind)
    for _ in range(parallel):
        yield Block(tokens, tokens, None, width, width, width, layers, hidden)


def work_of(architecture: Architecture, as_timm_exports: bool = False) -> Work:
    """A slim (or dense) model of ours, without kernels of parts that blocks do not have. `as_timm_exports`: its last
    block is computed for all tokens, and not for those alone that the classifier reads, and queries, keys and values
    are moved (counted in TensorRT-RTX's engines)."""
    dense = architecture.dense
    blocks, tokens = list[Block](), dense.num_tokens
    for index, shape in enumerate(architecture.blocks):
        is_last = index >= architecture.last_attention and not as_timm_exports
        block = block_of(dense, shape, tokens, is_last)
        blocks.append(replace(block, moves=MOVES) if as_timm_exports else block)
        tokens = shape.keep
    pixels = dense.in_chans * dense.patch_size[0] * dense.patch_size[1]
    return Work(dense.num_tokens, pixels, tuple(blocks), dense.num_classes)


def block_of(dense: DenseViT, shape: BlockShape, image_tokens: int, is_last: bool) -> Block:
    """A block of ours that so many image tokens enter. The last with attention, and those above it, compute what the
    classifier reads alone."""
    qk, v, width, prefix = (
        shape.heads * shape.qk_dim,
        shape.heads * shape.v_dim,
        dense.embed_dim,
        dense.num_prefix_tokens,
    )
    first = ((width, shape.hidden),) * (2 if dense.gated else 1)
    layers = ((v, width), *first, (shape.hidden, width))
    short = is_last and not dense.reads_image_tokens
    kept = image_tokens if short else shape.keep
    read = 1 + dense.distilled if short else None
    moves = 0 if dense.rotary is None or short else MOVES
    return Block(
        image_tokens + prefix, kept + prefix, read, width, qk, v, layers, shape.hidden, kept < image_tokens, moves
    )


def kernels(work: Work, engine: Engine, batch: int, layer_bytes: int = HALF) -> Iterator[Kernel]:
    """What an engine launches for a batch; `layer_bytes` of a weight and of what a linear layer reads."""
    yield from end_kernels(work, batch)
    for index, block in enumerate(work.blocks):
        yield from attention_kernels(block, engine, batch, layer_bytes, index)
        yield from selection_kernels(block, batch, index)
        yield from mlp_kernels(block, engine, batch, layer_bytes, index)


def end_kernels(work: Work, batch: int) -> Iterator[Kernel]:
    """Patch embedding and classifier."""
    width = work.blocks[0].width
    yield _gemm(batch * work.patches, work.patch, width, HALF, None)
    if work.classes:
        yield _gemm(batch, width, work.classes, HALF, None)


def attention_kernels(
    block: Block, engine: Engine, batch: int, layer_bytes: int, index: int | None = None
) -> Iterator[Kernel]:
    """Norm, query, key and value, attention, projection."""
    if not block.v:
        return
    queries = block.read or block.tokens
    yield _gemm(batch * block.tokens, block.width, 2 * block.qk + block.v, layer_bytes, index)
    products = 2 * batch * queries * block.tokens * (block.qk + block.v)
    moved = HALF * batch * (block.tokens * (block.qk + block.v) + queries * (block.qk + block.v))
    yield Kernel("attention", products, moved, block=index)
    for depth, columns in block.layers[:1]:
        yield _gemm(batch * queries, depth, columns, layer_bytes, index)
    yield from _others(OF_ATTENTION[engine], batch * queries, block, index)
    if block.moves and engine == "tensorrt":
        moved = 2 * HALF * batch * block.tokens * (2 * block.qk + block.v)
        yield Kernel("other", 0, moved / block.moves, count=block.moves, block=index)


def selection_kernels(block: Block, batch: int, index: int | None = None) -> Iterator[Kernel]:
    """Scoring tokens, and dropping some."""
    if block.scores:
        yield Kernel("other", 0, batch * block.tokens * block.width * HALF, count=SCORING, block=index)


def mlp_kernels(
    block: Block, engine: Engine, batch: int, layer_bytes: int, index: int | None = None
) -> Iterator[Kernel]:
    """Norm and the layers behind it."""
    if not block.hidden:
        return
    rows = batch * (block.read or block.kept)
    *first, last = block.layers[1:]
    if block.gated and engine == "tensorrt":
        first = [(first[0][0], sum(columns for _, columns in first))]
    for depth, columns in (*first, last):
        yield _gemm(rows, depth, columns, layer_bytes, index)
    of = [one for one in OF_MLP[engine] if not (block.gated and one[0] == "m")]
    yield from _others((*of, *(OF_GATE[engine] if block.gated else ())), rows, block, index)


def _others(of: tuple[tuple[str, int], ...], rows: int, block: Block, index: int | None) -> Iterator[Kernel]:
    for what, size in of:
        yield Kernel("other", 0, rows * size * (block.width if what == "e" else block.hidden), block=index)


def _gemm(rows: int, depth: int, columns: int, layer_bytes: int, block: int | None) -> Kernel:
    moved = layer_bytes * depth * (rows + columns) + HALF * rows * columns
    tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE)
    return Kernel("gemm", 2.0 * rows * depth * columns, moved, tiles, block=block)


def layer_bytes_of(precision: str) -> int:
    """Bytes of what linear layers read in a precision."""
    return 1 if precision in ("int8", "int8-fp16", "fp8") else HALF


def total_kernels(found: Iterable[Kernel]) -> int:
    """Launches."""
    return sum(kernel.count for kernel in found)
