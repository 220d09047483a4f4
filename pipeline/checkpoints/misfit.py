"""Loading weights that must fit, and what a file looks like that does not."""

from collections.abc import Sequence

from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.heads import classifier_layers
from lowpass.pipeline.checkpoints.shape import State

NAMED = 3  # names of each kind that a message gives
# What names in a file tell of where it comes from, the first that is there.
LOOKS: tuple[tuple[str, str], ...] = (
    ("distillation_classifier.weight", "a Hugging Face DeiT with its teacher's head: give its folder as --model"),
    ("embeddings.distillation_token", "a Hugging Face DeiT: give its folder, with config.json, as --model"),
    (
        "embeddings.patch_embeddings.projection.weight",
        "a Hugging Face ViT: give its folder, with config.json, as --model",
    ),
    ("embeddings.patch_embeddings.weight", "a Hugging Face DINOv3: give its folder, with config.json, as --model"),
    ("conv_proj.weight", "torchvision's: give --model vit_b_16 or another of its names"),
    ("decoder_embed.weight", "an autoencoder (MAE) as pretrained, without a classifier"),
    ("layers.0.blocks.0.attn.relative_position_bias_table", "a Swin transformer, which lowpass does not take"),
    ("visual.conv1.weight", "CLIP's image and text towers, without a classifier"),
    ("visual.trunk.patch_embed.proj.weight", "OpenCLIP's image and text towers, without a classifier"),
)


def load_strictly(model: nn.Module, state: State, path: object, name: str) -> None:
    """Load weights, every one of which must have its place and its shape.

    Raises:
        InputError: naming the first that are missing, unknown, of another shape or no real numbers, and what the file
            looks like.
    """
    expected = model.state_dict()
    for key, tensor in expected.items():
        if key in state and state[key].shape != tensor.shape:
            raise InputError(
                f"{path}: {key} is {tuple(state[key].shape)}, but {name} has {tuple(tensor.shape)}"
                f"{_looks(state, expected)}"
            )
        if key in state and tensor.is_floating_point() and not state[key].is_floating_point():
            kind = str(state[key].dtype).removeprefix("torch.")
            raise InputError(f"{path}: {key} is of {kind}, not of real numbers; give the weights before quantisation")
    missing = [key for key in expected if key not in state]
    unknown = sorted(set(state) - set(expected))
    if missing or unknown:
        parts = [f"has no {_first(missing)}, which {name} needs"] if missing else []
        parts += [f"holds {_first(unknown)}, which {name} does not have"] if unknown else []
        looks = _looks(state, expected) or f"; is it a checkpoint of {name}?"
        raise InputError(f"{path} {' and '.join(parts)}{looks}")
    model.load_state_dict(state)


def _first(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _looks(state: State, expected: State) -> str:
    """What the file looks like, where that says more than the names."""
    for name, looks in LOOKS:
        if name in state:
            return f"; it looks like {looks}"
    if any("lora_" in name for name in state):
        return "; it holds LoRA adapters: merge them into the model (PEFT: merge_and_unload()), and save that"
    if any("_packed_params" in name or name.endswith(".zero_point") for name in state):
        return "; its layers are quantised: give the weights that they were made from"
    if ("fc_norm.weight" in state) != ("fc_norm.weight" in expected):
        kind = "averages its tokens (MAE, GAP)" if "fc_norm.weight" in state else "reads its CLS token"
        return f"; it looks like a model that {kind}: another --model"
    if ("dist_token" in state) != ("dist_token" in expected):
        kind = "is distilled" if "dist_token" in state else "is not distilled"
        return f"; it looks like a DeiT that {kind}: another --model"
    blocks = [
        max((int(k.split(".")[1]) for k in names if k.startswith("blocks.")), default=-1) + 1
        for names in ([k for k in state if k.split(".")[1:2] and k.split(".")[1].isdigit()], list(expected))
    ]
    if blocks[0] and blocks[0] != blocks[1]:
        return f"; it has {blocks[0]} blocks, not {blocks[1]}: another --model"
    if "patch_embed.proj.weight" in state and "head.weight" not in state and "head.weight" in expected:
        layers = classifier_layers(state)
        if not layers:
            return "; it has no classifier: train one first"
        return f"; its classifier is {_first(layers)}, which is not one linear layer with a bias"
    return ""
