"""Eight test images, and which of their patches stay, stage by stage."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.show_tokens import kept_tokens, pixels_of
from lowpass.report.seen import Seen

SHOWN = 8
LARGEST_SIDE = 256  # pixels that a picture is embedded with, at most
LOSSLESS_SIDE = 64  # up to which it is PNG; larger ones are photographs, for which JPEG is small


@dataclass(frozen=True)
class Stage:
    """Behind a block that drops tokens: how many stay, and the outlines of the dropped patches as an SVG path, in
    units of a patch."""

    block: int
    kept: int
    dropped: str


@dataclass(frozen=True)
class Picture:
    """One test image as a data URI, its class and what the models say (`dense` None: there is none), and its
    stages. `columns` and `rows` count its patches."""

    number: int
    uri: str
    columns: int
    rows: int
    label: str
    dense: str | None
    slim: str
    stages: tuple[Stage, ...]


def pictures(seen: Seen, slim: SlimViT, classes: Sequence[str]) -> list[Picture]:
    """The first eight of the images, of as many classes as can be.

    Args:
        seen: the images, and what is said of them.
        slim: the slim model.
        classes: names in the order of the logits.
    """
    architecture = slim.architecture
    places = _of_many_classes(seen.labels)
    images = torch.stack([seen.data.test[seen.chosen[place]][0] for place in places])
    stages = kept_tokens(slim, images)
    drawn = pixels_of(images, architecture)
    grid = _grid(architecture)
    return [
        Picture(
            number=seen.chosen[place],
            uri=_data_uri(_whole_patches(drawn[row], architecture)),
            columns=grid[1],
            rows=grid[0],
            label=classes[int(seen.labels[place])],
            dense=None if seen.dense is None else classes[int(seen.dense[place])],
            slim=classes[int(seen.slim[place])],
            stages=tuple(
                Stage(block, int(mask[row].sum()), _outline(~mask[row].reshape(grid))) for block, mask in stages
            ),
        )
        for row, place in enumerate(places)
    ]


def _of_many_classes(labels: Tensor) -> list[int]:
    """Places of the first image of each class, then of others, in their order."""
    every = labels.tolist()
    first = [place for place, label in enumerate(every) if label not in every[:place]]
    others = [place for place in range(len(every)) if place not in set(first)]
    return sorted([*first, *others][:SHOWN])


def _grid(architecture: Architecture) -> tuple[int, int]:
    """Patches down and across."""
    dense = architecture.dense
    return dense.img_size[0] // dense.patch_size[0], dense.img_size[1] // dense.patch_size[1]


def _whole_patches(picture: np.ndarray, architecture: Architecture) -> np.ndarray:
    """Without the rows and columns at the end that make no whole patch: the model does not see them."""
    (rows, columns), (height, width) = _grid(architecture), architecture.dense.patch_size
    return picture[: rows * height, : columns * width]


def _data_uri(picture: np.ndarray) -> str:
    """A picture [H, W, 3] in 0..1."""
    image = Image.fromarray(np.rint(255 * picture).astype(np.uint8))
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    kind = "PNG" if max(image.size) <= LOSSLESS_SIDE else "JPEG"
    content = io.BytesIO()
    image.save(content, kind, **({} if kind == "PNG" else {"quality": 88}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def _outline(dropped: Tensor) -> str:
    """A path of one rectangle for each run of patches in a row [rows, columns]."""
    parts = []
    for y, row in enumerate(dropped.tolist()):
        x = 0
        while x < len(row):
            width = 0
            while x + width < len(row) and row[x + width]:
                width += 1
            if width:
                parts.append(f"M{x} {y}h{width}v1h-{width}z")
            x += width + 1
    return "".join(parts)
