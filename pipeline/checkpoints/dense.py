"""Dense models by timm name, and their weights from a local file."""

import difflib
from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import build_sincos2d_pos_embed
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError

DIGITS_MODEL = "digits_deit"
DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "digits_deit.safetensors"

default_cfgs = generate_default_cfgs(
    {
        "digits_deit.lowpass": {
            "input_size": (3, 32, 32),
            "num_classes": 10,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def digits_deit(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """The embedded DeiT: 32x32 images, patch 4 (64 tokens), 96 channels, 6 blocks of 3 heads, 10 classes."""
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3} | kwargs
    model: VisionTransformer = build_model_with_cfg(VisionTransformer, "digits_deit", pretrained, **settings)
    return model


def initialise_digits_deit(model: VisionTransformer) -> None:
    """2-D sine-cosine positions and Xavier patch embedding: with timm's default initialisation training stalls."""
    with torch.no_grad():
        grid = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim, interleave_sin_cos=True)
        model.pos_embed.zero_()
        model.pos_embed[:, 1:] = grid
        nn.init.xavier_uniform_(model.patch_embed.proj.weight.flatten(1))


def load_dense(name: str, weights: Path | None = None, random_weights: bool = False, seed: int = 0) -> nn.Module:
    """A dense timm model in evaluation mode.

    Args:
        name: any timm model name; `digits_deit` brings its own weights.
        weights: local checkpoint, `.safetensors` or `.pth`, with timm's or DeiT's own keys. The class count is read off
            its head.
        random_weights: create the model untrained, from `seed`, for speed studies.

    Raises:
        InputError: unknown name, no weights, or weights that are damaged, not finite or of another shape.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise InputError(f"timm has no model {name!r}{hint}")
    if weights is not None and random_weights:
        raise InputError("give --weights or --random-weights, not both")
    if weights is None and not random_weights and name == DIGITS_MODEL:
        weights = DIGITS_WEIGHTS
    if weights is None and not random_weights:
        raise InputError(
            f"{name} needs trained weights: give --weights FILE (.safetensors or .pth), "
            "or --random-weights to study its speed only"
        )
    torch.manual_seed(seed)
    if weights is None:
        return timm.create_model(name).eval()
    state = read_weights(weights)
    head = state.get("head.weight")
    classes = {"num_classes": len(head)} if head is not None and head.ndim == 2 else {}
    model: nn.Module = timm.create_model(name, **classes)
    _load_strictly(model, state, weights, name)
    return model.eval()


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
            return load_file(path)
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


def _load_strictly(model: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
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
