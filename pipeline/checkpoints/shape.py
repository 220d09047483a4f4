"""A model's image size, channels and classes, read off its tensors."""

from math import isqrt, prod
from pathlib import Path

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger

State = dict[str, Tensor]


def classes_of(state: State) -> int | None:
    """Rows of the classifier; teachers may be other models than ViTs."""
    named = [
        state[name] for name in ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight") if name in state
    ]
    head = named[0] if named else None
    return len(head) if head is not None and head.ndim == 2 else None


def channels_of(state: State, path: Path, asked: int | None) -> int | None:
    """Input channels of the patch embedding.

    Raises:
        InputError: others were asked for.
    """
    patch = state.get("patch_embed.proj.weight")
    found = patch.shape[1] if patch is not None and patch.ndim == 4 else None
    if asked is not None and found is not None and asked != found:
        raise InputError(f"--in-chans is {asked}, but {path} takes images of {found} channels")
    return asked if found is None else found


def fit_positions(
    state: State,
    path: Path,
    patch: tuple[int, int],
    prefix: int,
    default: tuple[int, int],
    asked: tuple[int, int] | None,
    antialias: bool = True,
    is_known: bool = False,
) -> tuple[int, int]:
    """The image size that positions are for, in place: they are resampled where another size was asked for.

    Args:
        state: under timm's names.
        path: of the checkpoint.
        patch: height and width of a patch.
        prefix: prefix tokens that have positions.
        default: height and width that the model has when nobody says otherwise.
        asked: `--img-size`, or None.
        antialias: of the resampling.
        is_known: the checkpoint itself says `default`. Otherwise as many positions as an `asked` size takes are taken
            to be for that size, such as 64 for 8 by 8 patches and for 4 by 16.

    Raises:
        InputError: the positions form no square and no size was given, or the size is not whole patches.
    """
    positions = state.get("pos_embed")
    if asked is not None:
        for side, step in zip(asked, patch, strict=True):
            if side < step or side % step:
                raise InputError(f"--img-size {asked[0]}x{asked[1]} is not whole patches of {patch[0]}x{patch[1]}")
    if positions is None or positions.ndim != 3:
        return asked or default
    tokens = positions.shape[1] - prefix
    own = default if prod(_grid(default, patch)) == tokens else None
    if asked is not None and prod(_grid(asked, patch)) == tokens and not (is_known and own):
        if own not in (None, asked):
            logger.info("positions: %d, taken to be for %dx%d as --img-size says, not resampled", tokens, *asked)
        return asked
    if own is None:
        side = isqrt(max(tokens, 0))
        if side == 0 or side**2 != tokens:
            raise InputError(
                f"{path}: pos_embed is {tuple(positions.shape)}: {tokens} image tokens do not form a square; give "
                "--img-size HxW, the size that the model was trained at"
            )
        own = (side * patch[0], side * patch[1])
    if asked in (None, own):
        return own
    assert asked is not None
    logger.info("positions: resampled from images of %dx%d to %dx%d", *own, *asked)
    state["pos_embed"] = resample_abs_pos_embed(
        positions, list(_grid(asked, patch)), list(_grid(own, patch)), num_prefix_tokens=prefix, antialias=antialias
    )
    return asked


def _grid(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    return size[0] // patch[0], size[1] // patch[1]


def parse_size(text: str) -> tuple[int, int]:
    """`224` or `224x448` (height x width) -> (height, width).

    Raises:
        InputError: it is neither.
    """
    sides = text.lower().split("x")
    if not (1 <= len(sides) <= 2 and all(side.strip().isdigit() and int(side) > 0 for side in sides)):
        raise InputError(f"--img-size takes pixels, such as 384, or height x width, such as 224x448; not {text!r}")
    return int(sides[0]), int(sides[-1])
