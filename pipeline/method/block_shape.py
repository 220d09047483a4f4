"""The five numbers that a block of a slim ViT is described by."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]


class BlockShape(BaseModel):
    """One block. `keep` counts the image tokens that leave it; prefix tokens (CLS, distillation, ...) come on top."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: Positive
    qk_dim: Positive
    v_dim: Positive
    hidden: Positive
    keep: Positive
