"""The five numbers that a block of a slim ViT is described by."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]


class BlockShape(BaseModel):
    """One block. `keep` counts the image tokens that leave it; prefix tokens (CLS, distillation, ...) come on top.

    `heads`, `qk_dim` and `v_dim` of 0: the block has no attention, not even its norm. `hidden` 0: it has no MLP.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: Size
    qk_dim: Size
    v_dim: Size
    hidden: Size
    keep: Positive

    @model_validator(mode="after")
    def _whole_or_gone(self) -> Self:
        sizes = {"heads": self.heads, "qk_dim": self.qk_dim, "v_dim": self.v_dim}
        if any(sizes.values()) and not all(sizes.values()):
            said = ", ".join(f"{name} is {size}" for name, size in sizes.items())
            raise ValueError(f"{said}: without attention all three are 0, with it none is")
        return self
