"""Dense models by timm's names and in the folders that timm saves for a hub."""

import difflib
import json
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import ImageNetInfo
from timm.models import Eva, get_pretrained_cfg, list_pretrained, split_model_name_tag
from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.digits_deit import DIGITS_MODEL, DIGITS_WEIGHTS
from lowpass.pipeline.checkpoints.heads import with_head
from lowpass.pipeline.checkpoints.misfit import load_strictly
from lowpass.pipeline.checkpoints.origin import Choices, Origin, labels, mark, set_preprocessing
from lowpass.pipeline.checkpoints.shape import channels_of, classes_of, fit_positions
from lowpass.pipeline.checkpoints.state_dict import Tensors, eva_key, read_weights

IMAGENET_CLASSES = 1000
CONFIG = "config.json"


def by_name(name: str, weights: Path | None, random_weights: bool, choices: Choices) -> nn.Module:
    """A timm model by name, with or without a tag.

    Raises:
        InputError: unknown name or tag, no weights, or weights that do not fit.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise InputError(f"timm has no model {name!r}{hint}")
    tag = _checked_tag(name)
    if weights is None and not random_weights and name == DIGITS_MODEL:
        weights = DIGITS_WEIGHTS
    if weights is None and not random_weights:
        raise InputError(
            f"{name} needs trained weights: give --weights FILE (.safetensors or .pth), "
            "or --random-weights to study its speed only"
        )
    tensors = None if weights is None else read_weights(weights, choices.weights_key)
    model = _built(name, {}, tensors, weights, choices)
    source = f"timm's {name}" if tag or weights == DIGITS_WEIGHTS else f"timm's default for {name}"
    set_preprocessing(model, source, {}, choices)
    classes, said = None, ""
    known = get_pretrained_cfg(name)
    if model.num_classes == IMAGENET_CLASSES and known is not None and known.num_classes == IMAGENET_CLASSES:
        classes, said = tuple(ImageNetInfo("imagenet-1k").label_names()), "ImageNet's synsets"
    mark(model, _origin(tensors, classes, said))
    return model


def from_hub_folder(folder: Path, choices: Choices, config: dict[str, Any], weights: Path) -> nn.Module:
    """A model in timm's hub layout: `config.json` with an architecture, and its weights.

    Raises:
        InputError: the architecture is unknown, or the weights do not fit.
    """
    name = str(config["architecture"])
    if not timm.is_model(name):
        raise InputError(f"{folder / CONFIG}: timm has no model {name!r}")
    tensors = read_weights(weights, choices.weights_key)
    settings = config.get("model_args") or {}
    if not isinstance(settings, dict):
        raise InputError(f"{folder / CONFIG}: model_args are {settings!r}, not settings by name")
    settings = dict(settings)
    if config.get("global_pool"):
        settings.setdefault("global_pool", config["global_pool"])
    model = _built(name, settings, tensors, weights, choices)
    found = config.get("pretrained_cfg", config)  # timm's first configs were flat
    if not isinstance(found, dict):
        raise InputError(f"{folder / CONFIG}: pretrained_cfg is {found!r}, not settings by name")
    kept = {key: found[key] for key in ("mean", "std", "crop_pct", "interpolation", "crop_mode") if key in found}
    set_preprocessing(model, str(folder / CONFIG) if kept else f"timm's default for {name}", kept, choices)
    named = (both.get(key) for both in (config, found) for key in ("label_names", "labels", "label_name"))
    classes = labels(next(filter(None, named), None), int(cast(int, model.num_classes)))
    mark(model, _origin(tensors, classes, str(folder / CONFIG)))
    return model


def _built(
    name: str, settings: dict[str, Any], tensors: Tensors | None, weights: Path | None, choices: Choices
) -> nn.Module:
    """The architecture at the size, channels and classes of its weights, with them."""
    with torch.device("meta"):
        plain: Any = _created(name, settings)
    if tensors is None or weights is None:
        sizes: dict[str, Any] = {"img_size": choices.img_size, "in_chans": choices.in_chans}
        return _created(name, settings | sizes).eval()
    state = tensors.state
    if "patch_embed.proj.weight" in state and isinstance(getattr(plain, "head", None), nn.Linear):
        state = with_head(state, "head", weights.name)
    if isinstance(plain, Eva):
        state = {eva_key(name): tensor for name, tensor in state.items()}
    settings = settings | {
        "num_classes": classes_of(state),
        "in_chans": channels_of(state, weights, choices.in_chans),
    }
    patch = getattr(plain, "patch_embed", None)
    if patch is not None and hasattr(plain, "num_prefix_tokens"):
        prefix = 0 if plain.no_embed_class else plain.num_prefix_tokens
        size = fit_positions(
            state, weights, patch.patch_size, prefix, patch.img_size, choices.img_size, is_known="img_size" in settings
        )
        if size != tuple(patch.img_size):
            settings["img_size"] = size
    model = _created(name, settings)
    load_strictly(model, state, weights, name)
    return model.eval()


def _created(name: str, settings: dict[str, Any]) -> nn.Module:
    """What timm makes of a name; settings that are None are left at their defaults.

    Raises:
        InputError: it has no such setting, or cannot follow it.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    try:
        model: nn.Module = timm.create_model(name, **given)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"timm cannot make {name} with {given}: {reason}") from None
    return model


def _origin(tensors: Tensors | None, classes: tuple[str, ...] | None, classes_from: str) -> Origin:
    if tensors is None:
        return Origin(classes, classes_from if classes else "")
    return Origin(classes, classes_from if classes else "", tensors.key, tensors.others)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`.

    Raises:
        InputError: it is missing or no JSON object.
    """
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {folder / CONFIG}: {error.strerror}; {_looks(folder)}") from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG} is not a JSON object")
    return config


def _looks(folder: Path) -> str:
    """What a folder without a config looks like."""
    if (folder / "adapter_config.json").exists():
        return f"{folder} is a PEFT adapter: merge it into its model (merge_and_unload()), and save that"
    if inside := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
        return f"there is one in {', '.join(inside[:3])}: give that folder"
    return f"is {folder} a model?"


def _checked_tag(name: str) -> str:
    architecture, tag = split_model_name_tag(name)
    if tag:
        try:
            get_pretrained_cfg(name, allow_unregistered=False)
        except RuntimeError:
            known = [split_model_name_tag(full)[1] for full in list_pretrained(f"{architecture}.*")]
            tags = ", ".join(filter(None, known)) or "none"
            raise InputError(f"timm's {architecture} has no tag {tag!r}; it knows {tags}") from None
    return tag
