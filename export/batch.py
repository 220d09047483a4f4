"""Batch profiles: which batch sizes an artefact is made for."""

from typing import Self

from pydantic import BaseModel, ConfigDict

from lowpass.pipeline.base.errors import InputError

DEFAULT_PROFILE = "1:8:32"


class BatchProfile(BaseModel):
    """Batch sizes an engine takes, and the one it is tuned for. Written `MIN:OPT:MAX`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    least: int
    best: int
    most: int

    def optimisations(self) -> list[tuple[int, int, int]]:
        """Least, best and most of each optimisation profile of an engine: the whole range, then each of the three
        sizes on its own, for which TensorRT fuses more (attention reads query, key and value where they are)."""
        fixed = [(size, size, size) for size in dict.fromkeys((self.least, self.best, self.most))]
        return fixed if self.least == self.most else [(self.least, self.best, self.most), *fixed]

    def __str__(self) -> str:
        return f"{self.least}:{self.best}:{self.most}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """`MIN:OPT:MAX`, or one number for a fixed batch.

        Raises:
            InputError: not numbers, below 1 or not ascending.
        """
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
            raise InputError(f"a batch profile is MIN:OPT:MAX or one number, such as 1:8:32, not {text!r}")
        least, best, most = map(int, parts if len(parts) == 3 else parts * 3)
        if not 1 <= least <= best <= most:
            raise InputError(f"the batch profile {text} must ascend from 1 or more: MIN <= OPT <= MAX")
        return cls(least=least, best=best, most=most)


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes separated by commas.

    Raises:
        InputError: one is not a positive number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--batches takes positive numbers separated by commas, such as 1,8,32, not {text!r}")
    return tuple(map(int, parts))
