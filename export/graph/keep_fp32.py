"""Linear layers that stay FP32 in an FP16 graph, where FP16 would overflow."""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lowpass.export.graph.precision import Wide, WideLinear
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.token_choices import TokenScore
from lowpass.pipeline.model.slim_attention import SlimAttention
from lowpass.pipeline.model.slim_block import SlimBlock

ATTENTION, MLP = ("attn.qkv", "attn.proj"), ("mlp.fc1", "mlp.fc2")
# Any layer of a block by the names that nodes have: query, key and value are one or several GEMMs. The first of a gated
# MLP are two, and the product of what they give.
_LAYER = re.compile(
    r"blocks\.(\d+)\.(?:(?:attn\.|attn\.attention\.|mlp\.)?"
    r"(qkv|query|key|value|key_value|proj|gate|fc1|fc2)(?:\.linear)?(?:\.\w+)?|mlp\.(Mul))"
)


class WideNorm(Wide):
    """A norm in FP32 from inputs of any precision."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.float())
        return normed


class WideAttention(Wide):
    """A whole attention in FP32, written out: TensorRT has no fused attention in FP32."""

    def __init__(self, attention: SlimAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, score: TokenScore | None = None, *places: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `SlimAttention.forward`, FP32 out."""
        features, matrix = self.attention.features(x.float(), "full", *places)
        assert matrix is not None
        seen = {"full": matrix, "cls": matrix[:, :, :1]}
        return self.attention.proj(features), None if score is None else seen[score]


class Narrowed(nn.Module):
    """What a module gives, in a precision: where FP32 ends."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x: Tensor) -> Tensor:
        narrow: Tensor = self.module(x).to(self.dtype)
        return narrow


def layer_of(node: str) -> str | None:
    """The layer that a node belongs to, such as `blocks.3.mlp.fc1` of `blocks.3.mlp.fc1.MatMul`; None: to none that can
    be kept. A layer's own name is its own."""
    match = _LAYER.fullmatch(node)
    if match is None:
        return None
    index, part = match[1], match[2] or match[3]
    wholes = {"fc1": "mlp.fc1", "gate": "mlp.fc1", "Mul": "mlp.fc1", "fc2": "mlp.fc2", "proj": "attn.proj"}
    return f"blocks.{index}.{wholes.get(part, 'attn.qkv')}"


def kept_layers(names: Iterable[str], depth: int, gone: Sequence[str] = ()) -> tuple[str, ...]:
    """The layers that stay FP32 when these are named: attention stays whole. `gone` are those that a slim model does
    not have (`gone_layers`).

    Raises:
        InputError: a name is none of a model of `depth` blocks, or one of `gone`.
    """
    every = [f"blocks.{index}.{part}" for index in range(depth) for part in (*ATTENTION, *MLP)]
    every = [name for name in every if name not in gone]
    kept = set[str]()
    for name in names:
        layer = layer_of(name)
        if layer not in every:
            raise InputError(
                f"--keep-fp32 {name}: there is no such layer; there are {', '.join(every[:4])} and so on to "
                f"blocks.{depth - 1}" + (f", but for {', '.join(gone)}" if gone else "")
            )
        block, _, part = layer.rpartition(".")
        kept |= {f"{block}.qkv", f"{block}.proj"} if block.endswith("attn") else {f"{block}.{part}"}
    return tuple(name for name in every if name in kept)


def gone_layers(blocks: Iterable[BlockShape]) -> tuple[str, ...]:
    """The layers of parts that blocks do not have."""
    gone = list[str]()
    for index, shape in enumerate(blocks):
        gone += [f"blocks.{index}.{part}" for part in ATTENTION if not shape.heads]
        gone += [f"blocks.{index}.{part}" for part in MLP if not shape.hidden]
    return tuple(gone)


def keep_in_fp32(blocks: Sequence[SlimBlock], kept: Iterable[str], dtype: torch.dtype) -> None:
    """Make the layers of `kept_layers` FP32 in place. What they give stays FP32 until a layer or norm that is not, or
    until it is added to the tokens, behind the layer scale."""
    for index, block in enumerate(blocks):
        fc1, fc2 = (f"blocks.{index}.{part}" in kept for part in MLP)
        if f"blocks.{index}.attn.qkv" in kept:
            block.attn = WideAttention(block.attn)  # type: ignore[assignment]
            block.ls1 = Narrowed(block.ls1, dtype)
        if not block.has_mlp:
            continue
        mlp = block.mlp
        if fc1:
            for name, layer in mlp.first.items():
                setattr(mlp, name, WideLinear(layer))
            if not fc2 and mlp.gate is None:
                mlp.act = Narrowed(mlp.act, dtype)
            elif not fc2:
                mlp.norm = Narrowed(mlp.norm, dtype)  # what the two layers give is multiplied before
            elif not isinstance(mlp.norm, nn.Identity):
                mlp.norm = WideNorm(mlp.norm)
        if fc2:
            mlp.fc2 = WideLinear(mlp.fc2)  # type: ignore[assignment]
            block.ls2 = Narrowed(block.ls2, dtype)
