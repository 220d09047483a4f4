"""Tensors by name, out of a checkpoint file."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, under timm's names; pickles are read with `weights_only=True`.

    Raises:
        InputError: missing, truncated, of no known layout, or not finite.
    """
    return {timm_key(name): tensor for name, tensor in state_of(read_checkpoint(path), path).items()}


def read_checkpoint(path: Path) -> Any:
    """What a `.safetensors` or `.pth` file holds; pickles are read with `weights_only=True`.

    Raises:
        InputError: missing or truncated.
    """
    try:
        if path.suffix == ".safetensors":
            # Not `load_file`: its tensors are mapped on the file, and change when that is rewritten in place.
            return load(path.read_bytes())
        with torch.serialization.safe_globals([Namespace]):  # training scripts keep their arguments beside the weights
            return torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there are no weights at {path}") from None
    except Exception as error:  # a damaged pickle raises anything, from struct.error to AttributeError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot read the weights {path}: truncated or not a checkpoint ({reason[:120]})") from None


def state_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The table of tensors in a checkpoint, alone or under `model` or `state_dict`, under its own names.

    Raises:
        InputError: there is none, or it is not finite.
    """
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise InputError(f"{path} holds no state dict (a table of tensors, alone or under 'model' or 'state_dict')")
    state = dict[str, Tensor](content)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds NaN or infinite values; these weights cannot be used")
    return state


def timm_key(name: str) -> str:
    """DDP's prefix removed, DeiT-III's layer scale renamed."""
    name = name.removeprefix("module.")
    return name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")


def load_strictly(model: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    expected = model.state_dict()
    for key, tensor in expected.items():
        if key not in state:
            raise InputError(f"{path} has no {key}, which {name} needs; is it a checkpoint of {name}?")
        if state[key].shape != tensor.shape:
            raise InputError(f"{path}: {key} is {tuple(state[key].shape)}, but {name} has {tuple(tensor.shape)}")
    unknown = sorted(set(state) - set(expected))
    if unknown:
        raise InputError(f"{path} holds {unknown[0]}, which {name} does not have; is it a checkpoint of {name}?")
    model.load_state_dict(state)
