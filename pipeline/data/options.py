"""How images are read, beside where they lie."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ClassOrder = Literal["natural", "plain"]


class ReadingOptions(BaseModel):
    """How a user wants images read.

    `class_order` numbers folders that nobody names. `exif` turns pictures as their cameras were held. `skip_unreadable`
    leaves out images that cannot be read, everywhere, instead of refusing them. `input_key` and `target_key` name the
    columns of a data set that a reader reads. `workers`: processes that read; None: one a core.
    """

    class_order: ClassOrder = "natural"
    exif: bool = False
    skip_unreadable: bool = False
    input_key: str | None = None
    target_key: str | None = None
    workers: Annotated[int | None, Field(ge=0)] = None


class DataOptions(ReadingOptions):
    """How images are read, and who names their classes.

    `classes`: names in the order of the logits; None: the folders' own names, by `class_order`. `classes_from` says who
    names them, and `exact` whether the folders must be called so. Where the data has only some of them, `cut` has the
    model's head cut to those; otherwise they keep their numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: tuple[str, ...] | None = None
    classes_from: str = ""
    exact: bool = False
    cut: bool = True
