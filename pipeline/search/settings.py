"""Everything a search can be told; `run/recipe.py` adds the model, the data and fine-tuning."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lowpass.pipeline.method.sensitivity import ChannelCriterion
from lowpass.pipeline.method.token_choices import EnergyNorm, TokenCriterion
from lowpass.pipeline.search.shaping import SHAPINGS, Prune, Shaping

Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

TOLD_BY = 500  # images that top-1 is measured on where nothing hangs on it


class SearchSettings(BaseModel):
    """How far to prune, on which images, and by what. One of `target_macs`, `target_latency`, `target_throughput` and
    `allowable_drop` says how far, unless a table of shapes settles it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_macs: Fraction | None = None
    allowable_drop: Annotated[float, Field(gt=0, le=100)] | None = None
    target_latency: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="milliseconds of one batch")
    ] = None
    target_throughput: Annotated[float | None, Field(gt=0, allow_inf_nan=False, description="images a second")] = None
    latency_limit: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="milliseconds that a batch may take")
    ] = None
    runtime: str | None = None
    latency_batch: Count = 1
    latency_precision: str | None = None
    image_cutoff: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    token_cutoff: Fraction = 0.85
    energy_norm: EnergyNorm = "l2"
    channel_criterion: ChannelCriterion = "obs"
    token_criterion: TokenCriterion = "lfe-attention"
    order: Literal["bottom-up", "top-down", "one-shot"] = "bottom-up"
    prune: Prune = "both"
    sub_blocks: bool = False  # whether a block may lose its attention or its MLP whole
    lfs_weight: Annotated[float, Field(ge=0, le=1)] = 0.1
    token_share: Annotated[float, Field(ge=0, le=1)] = 0.56
    shaping: Shaping = SHAPINGS["tensorrt"]
    score_images: Count = 2000
    measure_images: Count = 5000
    batch_size: Count = 64
    recovery: bool = True
    mixed_precision: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def measured(self) -> int:
        """Images that measure top-1. A search to an allowable drop decides by it; one to a target only tells it."""
        return self.measure_images if self.allowable_drop is not None else min(self.measure_images, TOLD_BY)
