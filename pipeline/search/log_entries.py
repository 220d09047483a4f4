"""What a search decides, as written to `search.jsonl` one line each before it is acted on."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.method.recovery import Refit
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.search.curves import BlockCurve


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Trial(_Record):
    """One amount that was tried: tokens kept, or channels dropped, and the top-1 (percent) that was left. A trial that
    failed was broken off: its top-1 is the most it could still have been."""

    amount: int
    top1: float


class TokenDecision(_Record):
    """How many image tokens a block passes on."""

    kind: Literal["tokens"] = "tokens"
    block: int
    keep: int
    top1: float
    macs: int
    trials: tuple[Trial, ...] = ()


class ChannelDecision(_Record):
    """Which channels of a block stay (None: all of them), and how what reads them was refitted. `dropped` is the amount
    that was accepted of those tried; a planned cut has none."""

    kind: Literal["channels"] = "channels"
    block: int
    dropped: int = 0
    choice: ChannelChoice | None
    top1: float
    macs: int
    refits: tuple[Refit, ...] = ()
    trials: tuple[Trial, ...] = ()


class ClassifierDecision(_Record):
    """How the classifier was refitted once all blocks were final."""

    kind: Literal["classifier"] = "classifier"
    refits: tuple[Refit, ...]
    top1: float


class Curve(_Record):
    """What one block, cut alone, loses: the mean KL divergence from the dense model's classes."""

    kind: Literal["curve"] = "curve"
    block: int
    losses: BlockCurve


class Plan(_Record):
    """The table that a target leads to. `cost` is in MACs, or in milliseconds as measured on the whole model, of
    a batch of `batch`."""

    kind: Literal["plan"] = "plan"
    blocks: tuple[BlockShape, ...]
    cost: float
    batch: int | None = None


Entry = Annotated[TokenDecision | ChannelDecision | ClassifierDecision | Curve | Plan, Field(discriminator="kind")]


def _numbers(shape: BlockShape) -> str:
    heads = f"{shape.heads}x{shape.qk_dim}/{shape.v_dim}" if shape.heads else "no attention"
    return f"{heads}+{shape.hidden or 'no MLP'}@{shape.keep}"


def in_a_line(entry: Entry, before: Architecture, dense_macs: int) -> str:
    """For people: what an entry does to the model as it stood before."""
    if isinstance(entry, Curve):
        least = entry.losses.attention[0]
        left = "one head would lose" if least.heads else "without attention it would lose"
        return f"profiled block {entry.block}: {left} {least.loss:.3g}"
    if isinstance(entry, Plan):
        of = "" if entry.batch is None else f" for batches of {entry.batch}, which take {entry.cost:.4g} ms"
        return f"plan{of}: " + ", ".join(_numbers(shape) for shape in entry.blocks)
    if isinstance(entry, ClassifierDecision):
        return f"classifier refitted; top-1 {entry.top1:.2f}"
    index = entry.block
    had = before.blocks[index]
    if not isinstance(entry, ChannelDecision):
        tokens = before.tokens_in(index)
        what = f"tokens {tokens} -> {entry.keep}" if entry.keep < tokens else f"keeps its {tokens} tokens"
    elif entry.choice is None:
        what = "keeps its channels"
    else:
        now = entry.choice.shape(had.keep)
        sizes = f"query/key {had.qk_dim} -> {now.qk_dim}, value {had.v_dim} -> {now.v_dim}"
        heads = f"heads {had.heads} -> {now.heads}, {sizes}" if now.heads else "its attention goes"
        hidden = f"hidden {had.hidden} -> {now.hidden}" if now.hidden else "its MLP goes"
        what = f"{heads}, {hidden}"
    trials = f" ({len(entry.trials)} trials)" if entry.trials else ""
    return f"block {index}: {what}; top-1 {entry.top1:.2f}, MACs {entry.macs / dense_macs:.3f}{trials}"
