"""Dense models by timm name, with weights from a local file."""

import difflib
from pathlib import Path

import timm
import torch
from timm.models import get_pretrained_cfg, list_pretrained, split_model_name_tag
from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.digits_deit import DIGITS_MODEL, DIGITS_WEIGHTS
from lowpass.pipeline.checkpoints.state_dict import load_strictly, read_weights


def load_model(model: str, weights: Path | str | None = None, random_weights: bool = False, seed: int = 0) -> nn.Module:
    """A dense timm model in evaluation mode.

    Args:
        model: any timm model name; `digits_deit` brings its own weights.
        weights: local checkpoint, `.safetensors` or `.pth`, with timm's or DeiT's own keys. The class count is read off
            its head.
        random_weights: create the model untrained, from `seed`, for speed studies.

    Raises:
        InputError: unknown name, no weights, or weights that are damaged, not finite or of another shape.

    Example:
        >>> load_model("digits_deit").num_classes
        10
    """
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise InputError(f"timm has no model {model!r}{hint}")
    _refuse_unknown_tag(model)
    if weights is not None and random_weights:
        raise InputError("give --weights or --random-weights, not both")
    if weights is None and not random_weights and model == DIGITS_MODEL:
        weights = DIGITS_WEIGHTS
    if weights is None and not random_weights:
        raise InputError(
            f"{model} needs trained weights: give --weights FILE (.safetensors or .pth), "
            "or --random-weights to study its speed only"
        )
    torch.manual_seed(seed)
    if weights is None:
        return timm.create_model(model).eval()
    state = read_weights(Path(weights))
    head = state.get("head.weight")
    classes = {"num_classes": len(head)} if head is not None and head.ndim == 2 else {}
    dense: nn.Module = timm.create_model(model, **classes)
    load_strictly(dense, state, Path(weights), model)
    return dense.eval()


def _refuse_unknown_tag(name: str) -> None:
    architecture, tag = split_model_name_tag(name)
    if not tag:
        return
    try:
        get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        known = [split_model_name_tag(full)[1] for full in list_pretrained(f"{architecture}.*")]
        tags = ", ".join(filter(None, known)) or "none"
        raise InputError(f"timm's {architecture} has no tag {tag!r}; it knows {tags}") from None
