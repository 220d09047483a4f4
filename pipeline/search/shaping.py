"""Shapes that hardware likes: aligned widths, whole heads, few token drops.

What stays is decided by the criteria of channels and tokens; a shaping only says in which amounts it may go. Saved MACs
turn into time when matrix products keep full tiles, attention keeps one head size, and tokens are scored in few blocks.
"""

import math
import re
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lowpass.pipeline.base.errors import InputError, first_problem
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import (
    ChannelChoice,
    best_channels,
    best_heads,
    choose_channels,
    score_threshold,
)
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.method.token_choices import TokenScore
from lowpass.pipeline.model.architecture import Architecture, DenseViT

TunedFor = Literal["onnxruntime", "openvino", "tensorrt"]
Prune = Literal["both", "channels", "tokens"]


AUTO_STAGES = 6


def _stages(given: object) -> object:
    if isinstance(given, str) and given != "auto":
        if not re.fullmatch(r"-?\d+", given):
            raise ValueError(f"{given!r} is neither a number nor auto")
        given = int(given)
    if isinstance(given, int) and given < 0:
        raise ValueError(f"{given} is below 0")
    return given


class Shaping(BaseModel):
    """In which amounts tokens and channels may go.

    `align`: hidden widths are multiples of it, and so are token counts, prefix tokens included, of an eighth of it.
    `avoid`: hidden widths are no multiples of it, short of the whole; 0: they may be.
    `whole_heads`: heads go whole; otherwise the paper's head search thins them, query/key and value each to its own
    size. `token_stages`: how many blocks may drop tokens, spread evenly; 0: every block, as in the paper; "auto": as
    many as a plan finds worth what scoring tokens costs where it is to run, of `AUTO_STAGES`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    align: Annotated[int, Field(ge=1)]
    avoid: Annotated[int, Field(ge=0)] = 0
    whole_heads: bool
    token_stages: Annotated[int | Literal["auto"], BeforeValidator(_stages)]
    token_score: TokenScore

    def stages(self, depth: int) -> tuple[int, ...]:
        """The blocks that may drop tokens."""
        stages = AUTO_STAGES if self.token_stages == "auto" else self.token_stages
        if stages == 0 or stages >= depth:
            return tuple(range(depth))
        return tuple(depth * (stage + 1) // (stages + 1) for stage in range(stages))

    def keep(self, keep: int, have: int, num_prefix_tokens: int) -> int:
        """The nearest count of image tokens, upwards, that suits: at most `have`."""
        step = max(1, self.align // 8)
        return min(have, -(-(keep + num_prefix_tokens) // step) * step - num_prefix_tokens)

    def width(self, width: int, have: int) -> int:
        """The nearest hidden width, upwards, that suits: at most `have`."""
        aligned = -(-width // self.align) * self.align
        if self.avoid and aligned % self.avoid == 0 and self.align % self.avoid:
            aligned += self.align
        return min(have, aligned)

    def smallest(
        self, dense: DenseViT, first_keep: int, prune: Prune = "both", sub_blocks: bool = False
    ) -> tuple[BlockShape, ...]:
        """The smallest table there is, when block 0 keeps at least `first_keep` tokens. With `sub_blocks` one head of
        block 0 is all that is left: without any attention a classifier would not see the image."""
        head = dense.blocks()[0]
        # Thinned, the head search prefers many heads of one channel to one head.
        shape = {"heads": 1} if self.whole_heads else {"qk_dim": dense.qk_step, "v_dim": 1}
        least = head.model_copy(update={**shape, "hidden": self.width(1, head.hidden)}) if prune != "tokens" else head
        tokens, table = dense.num_tokens, []
        for block in range(dense.depth):
            if prune != "channels" and block in self.stages(dense.depth):
                fewest = min(first_keep, tokens) if block == 0 else 1
                tokens = self.keep(fewest, tokens, dense.num_prefix_tokens)
            table.append(least.model_copy(update={"keep": tokens}))
        if sub_blocks and prune != "tokens":
            gone = {"heads": 0, "qk_dim": 0, "v_dim": 0, "hidden": 0, "keep": table[0].keep}
            return (table[0].model_copy(update={"hidden": 0}), *(least.model_copy(update=gone) for _ in table[1:]))
        return tuple(table)


# Rows of 1024 floats are 4 KiB, and a CPU's first cache then has but one set for the same channel of all tokens: MLPs
# of 1024, 2048 and 3072 channels took 4 to 9 % more a MAC than their neighbours, in FP32 in ONNX Runtime and OpenVINO.
CACHE_WIDTH = 1024
AS_PUBLISHED = Shaping(align=1, whole_heads=False, token_stages=0, token_score="full")
# Whole heads and few stages save most time per MAC on CPUs; three stages lose no accuracy on the digits, where two did.
# What each alignment gains on a GPU is not measured yet; 64 suits its tiles.
SHAPINGS: dict[TunedFor, Shaping] = {
    "onnxruntime": Shaping(align=32, avoid=CACHE_WIDTH, whole_heads=True, token_stages=3, token_score="cls"),
    "openvino": Shaping(align=32, avoid=CACHE_WIDTH, whole_heads=True, token_stages=3, token_score="cls"),
    "tensorrt": Shaping(align=64, whole_heads=True, token_stages=3, token_score="cls"),
}


def choose_shaped(scores: ChannelScores, n: int, shaping: Shaping) -> ChannelChoice:
    """`choose_channels`, or with whole heads its counterpart: the same threshold, but as many heads as hold the query,
    key and value rows that stay, and a hidden width that suits; what rounding adds back is the best scored.

    Raises:
        ValueError: `n` is negative or leaves nothing.
    """
    if not shaping.whole_heads:
        choice = choose_channels(scores, n)
        width = shaping.width(len(choice.hidden), len(scores.hidden))
        return replace(choice, hidden=best_channels(scores.hidden, width))
    threshold = score_threshold(scores, n)
    qk_dim = scores.qk_dim
    v_dim = scores.value.shape[1]
    rows = 2 * scores.step * int((scores.query_key >= threshold).sum()) + int((scores.value >= threshold).sum())
    heads = max(1, math.ceil(rows / (2 * qk_dim + v_dim)))
    width = shaping.width(max(1, int((scores.hidden >= threshold).sum())), len(scores.hidden))
    return best_heads(scores, heads, qk_dim, v_dim, best_channels(scores.hidden, width))[0]


def make_shaping(target: TunedFor, as_published: bool, **changes: object) -> Shaping:
    """The shaping for a runtime (or the paper's own), with what differs; None changes nothing.

    Raises:
        InputError: a value is out of range.
    """
    base = AS_PUBLISHED if as_published else SHAPINGS[target]
    try:
        return Shaping.model_validate(base.model_dump() | {k: v for k, v in changes.items() if v is not None})
    except ValidationError as error:
        raise InputError(first_problem(error)) from None


FIRST_BLOCK_KEEP = 0.97  # the paper: block 0 keeps at least this share of its tokens


def first_keep(architecture: Architecture) -> int:
    """What block 0 must pass on."""
    return max(1, round(FIRST_BLOCK_KEEP * architecture.dense.num_tokens))
