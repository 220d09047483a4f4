"""Where a dense model comes from: what was read of its source, kept beside it on the module itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowpass.pipeline.base.errors import InputError

LEAST_CROP = 0.1  # pictures are enlarged by what it divides
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_ATTRIBUTE = "lowpass_origin"


@dataclass(frozen=True)
class Origin:
    """`classes`: names in the order of the logits, and `classes_from`, who says so; None: nobody does. `other_weights`:
    keys of other weights in the same file, such as EMA's."""

    classes: tuple[str, ...] | None = None
    classes_from: str = ""
    weights_key: str = ""
    other_weights: tuple[str, ...] = ()


def mark(model: nn.Module, origin: Origin) -> None:
    """Remember where a model comes from."""
    setattr(model, _ATTRIBUTE, origin)


def origin_of(model: nn.Module) -> Origin:
    """Where a model comes from, as far as it is known."""
    origin = getattr(model, _ATTRIBUTE, None)
    return origin if isinstance(origin, Origin) else Origin()


def labels(named: Any, count: int) -> tuple[str, ...] | None:
    """The names of `count` classes in the order of the logits, out of a config's list, or its table by number; None: it
    does not name so many."""
    if isinstance(named, Mapping):
        by_number = {str(number): name for number, name in named.items()}
        named = [by_number[str(number)] for number in range(count) if str(number) in by_number]
        named = named if len(by_number) == count else None
    if not isinstance(named, list | tuple) or len(named) != count:
        return None
    return tuple(map(str, named))


@dataclass(frozen=True)
class Choices:
    """What may be said of a model beside its name and weights; None: as its source says.

    `img_size` is (height, width). `mean`, `std`, `crop_pct` and `interpolation` are those of preprocessing.
    """

    weights_key: str | None = None
    img_size: tuple[int, int] | None = None
    in_chans: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None


def check_pixels(pixels: dict[str, Any], source: str = "") -> None:
    """Refuse a preprocessing that makes no sense: what it has of `mean`, `std` and `crop_pct`.

    Args:
        pixels: as they were given.
        source: whose they are; empty: the user's options.

    Raises:
        InputError: a value is not finite, a deviation is not above 0, they are of pixels up to 255, or next to nothing
            is seen.
    """
    mean, std, crop = pixels.get("mean") or (), pixels.get("std") or (), pixels.get("crop_pct") or 1.0
    of = f"{source}: " if source else ""
    if not all(math.isfinite(value) for value in (*mean, *std, crop)):
        raise InputError(f"{of}--mean, --std and --crop-pct take finite numbers, not {pixels}")
    if not all(value > 0 for value in std):
        raise InputError(f"{of}--std must be above 0, not {std}")
    if crop < LEAST_CROP:
        raise InputError(
            f"{of}--crop-pct is the share of the shorter side that is seen, at least {LEAST_CROP}, not {crop:g}"
        )
    for name, values in (("mean", mean), ("std", std)):
        if beyond := [value for value in values if abs(value) > 1]:
            raise InputError(f"{of}--{name} is of pixels from 0 to 1, which {beyond[0]:g} is beyond; divide it by 255")


def set_preprocessing(model: nn.Module, source: str, found: dict[str, Any], choices: Choices) -> None:
    """Give a timm model its preprocessing in `pretrained_cfg`, with what was chosen in place of what was found.

    Args:
        model: a timm model.
        source: who says `found`.
        found: `mean`, `std`, `crop_pct`, `interpolation` and `crop_mode`, as many as the source knows.
        choices: of the user.

    Raises:
        InputError: a mean or a deviation does not fit the model's channels, or something makes no sense.
    """
    config: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {}) | found
    channels = int(getattr(model, "in_chans", 3))
    given = {name: getattr(choices, name) for name in ("mean", "std", "crop_pct", "interpolation")}
    given = {name: value for name, value in given.items() if value is not None}
    _check_kinds({name: value for name, value in config.items() if name not in given}, source)
    whose = source
    for name in ("mean", "std"):
        values = given.get(name, config.get(name) or (0.5,) * channels)
        values = (values,) * channels if isinstance(values, int | float) else values
        if len(values) != channels:
            if name in given:
                raise InputError(f"--{name} has {len(values)} values, but the model takes {channels} channels")
            # Of RGB, for a model of other channels: their average, of each.
            values, source = (sum(values) / len(values),) * channels, f"{source}, averaged over its channels"
        config[name] = tuple(float(value) for value in values)
    check_pixels(given)
    check_pixels({name: config.get(name) for name in ("mean", "std", "crop_pct") if name not in given}, whose)
    config |= {name: given[name] for name in ("crop_pct", "interpolation") if name in given}
    if given:
        source += "; " + ", ".join("--" + name.replace("_", "-") for name in given)
    config["preprocessing_source"] = source
    setattr(model, "pretrained_cfg", config)  # noqa: B010 - of timm, which says nothing of its type


def _check_kinds(config: Mapping[str, Any], source: str) -> None:
    """Refuse a config whose preprocessing is no preprocessing.

    Raises:
        InputError: naming the field, and the option that may be given in its place.
    """
    for name in ("mean", "std", "crop_pct", "interpolation"):
        value = config.get(name)
        numbers = value if isinstance(value, list | tuple) and name != "crop_pct" else [value]
        sound = value is None or all(isinstance(one, int | float) for one in numbers)
        if not (sound if name != "interpolation" else value is None or value in INTERPOLATIONS):
            raise InputError(f"{source}: its {name} is {value!r}; give --{name.replace('_', '-')}, or mend it")
