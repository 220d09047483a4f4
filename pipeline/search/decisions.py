"""What a search decides, as written to `search.jsonl` one line each before it is acted on."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.method.recovery import Refit
from lowpass.pipeline.model.architecture import BlockShape
from lowpass.pipeline.search.plan import BlockCurve


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


class Curve(_Record):
    """What one block, cut alone, loses: the mean KL divergence from the dense model's classes."""

    kind: Literal["curve"] = "curve"
    block: int
    losses: BlockCurve


class Plan(_Record):
    """The table that a target leads to. `cost` is in MACs, or in milliseconds as measured on the whole model."""

    kind: Literal["plan"] = "plan"
    blocks: tuple[BlockShape, ...]
    cost: float


Decision = Annotated[TokenDecision | ChannelDecision | Curve | Plan, Field(discriminator="kind")]
