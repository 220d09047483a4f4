"""DINOv3 as Hugging Face Transformers saves it, as timm's `Eva`.

Transformers has its backbone alone, `DINOv3ViTModel`. A classifier is a linear layer called `classifier` beside it, in
a `PreTrainedModel` of one's own. Its width says what it reads: C channels are CLS (Transformers' `pooler_output`), 2 C
are CLS and the mean of the image tokens, as in the linear heads of DINOv2 and DINOv3. All of it behind the norm.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models import Eva
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.checkpoints.converted import ACTIVATIONS, Conversion
from lowpass.pipeline.model.readout import TokenAndMeanEva

DINOV3 = "dinov3_vit"
CLASSIFIER = "classifier.weight"
THETA = 100.0  # Transformers' default, and that of every DINOv3 published
# Layers whose biases a config tells of: its field, and whether there is one where it has no such field.
BIASES = {
    "attention.q_proj": ("query_bias", True),
    "attention.k_proj": ("key_bias", False),
    "attention.v_proj": ("value_bias", True),
    "attention.o_proj": ("proj_bias", True),
    "mlp.gate_proj": ("mlp_bias", True),
    "mlp.up_proj": ("mlp_bias", True),
    "mlp.down_proj": ("mlp_bias", True),
}
QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")  # one layer in timm, with all their biases or none
RENAMES = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^(?:model\.)?layer\.", "blocks."),  # of an encoder called `model`, or of none: it depends on the version
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"^classifier\.", "head."),
)
PLAIN = ((r"\.mlp\.up_proj\.", ".mlp.fc1."),)
GATED = ((r"\.mlp\.gate_proj\.", ".mlp.fc1_g."), (r"\.mlp\.up_proj\.", ".mlp.fc1_x."))


def check_dinov3(config: Mapping[str, Any], state: Mapping[str, Tensor], source: object) -> None:
    """Refuse what no setting of timm's `Eva` can follow, or what has no classifier.

    Args:
        config: of `config.json`.
        state: tensors under Transformers' names, without the model's prefix.
        source: what messages call the weights.

    Raises:
        InputError: naming the field, its value and what to do.
    """
    if CLASSIFIER not in state:
        raise InputError(
            f"{source} is a Hugging Face {DINOV3} without a classifier: its weights have no {CLASSIFIER}; train a "
            "linear layer `classifier` on CLS, beside a DINOv3ViTModel in one PreTrainedModel, and save that"
        )
    if (activation := _activation(config)) not in ACTIVATIONS:
        raise InputError(
            f"{source}: hidden_act in config.json is {activation!r}, but lowpass takes MLPs with a GELU or SiLU; train "
            f"one of {', '.join(ACTIVATIONS)}"
        )
    gated = bool(config.get("use_gated_mlp"))
    if gated != any(".mlp.gate_proj." in name for name in state):
        raise InputError(
            f"{source}: use_gated_mlp in config.json is {gated}, but the weights have {'no' if gated else 'a'} "
            "layer.0.mlp.gate_proj; give the config.json that was saved with them"
        )
    rope = config.get("rope_parameters")
    if rope is not None:
        raise InputError(
            f"{source}: rope_parameters in config.json is {rope}, which lowpass does not read; if its angles are those "
            "of rope_theta alone, give that instead"
        )


def dinov3_size(
    own: tuple[int, int],
    patch: tuple[int, int],
    source: object,
    asked: tuple[int, int] | None,
    processed: tuple[int, int] | None,
) -> tuple[int, int]:
    """Height and width of the images: as asked for, else as the processor gives them, else the config's `own`. Angles
    are made for any size, so that no tensor tells.

    Raises:
        InputError: it is not whole patches, of which Transformers would leave out a rim.
    """
    said = (
        "--img-size" if asked else "the size in preprocessor_config.json" if processed else "image_size in config.json"
    )
    size = asked or processed or own
    if any(side < step or side % step for side, step in zip(size, patch, strict=True)):
        raise InputError(
            f"{source}: {said} is {size[0]}x{size[1]}, not whole patches of {patch[0]}x{patch[1]} (patch_size in "
            "config.json); give --img-size in multiples of them"
        )
    return size


def dinov3_conversion(
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    source: object,
    settings: Mapping[str, Any],
) -> Conversion:
    """How it becomes timm's `Eva`. Biases that a layer of timm's has and this one has not are added to `state` as 0.

    Args:
        config: of `config.json`.
        state: tensors under Transformers' names, without the model's prefix; changed in place.
        source: what messages call the weights.
        settings: of `vit_settings`.

    Raises:
        InputError: weights and config contradict each other, or the classifier or the angles are of another kind.
    """
    dim, heads = settings["embed_dim"], settings["num_heads"]
    if dim % heads == 0 and dim // heads % 4:
        raise InputError(
            f"{source}: num_attention_heads in config.json is {heads}: heads of {dim // heads} channels are not of "
            "whole pairs on both axes, as rotary positions need; take a model whose heads have a multiple of 4"
        )
    theta = float(config.get("rope_theta", THETA))
    if not (math.isfinite(theta) and theta > 0):
        raise InputError(
            f"{source}: rope_theta in config.json is {theta:g}; give a number above 0, as DINOv3's {THETA:g}"
        )
    pooled = _reads_mean(state[CLASSIFIER], dim, source)
    logger.info(
        "classifier: %d channels, taken to read %s", state[CLASSIFIER].shape[1], "CLS and the mean" if pooled else "CLS"
    )
    _add_biases(config, state, source)
    if state.get("embeddings.register_tokens", torch.ones(1)).numel() == 0:  # saved even where there are none
        del state["embeddings.register_tokens"]
    gated = bool(config.get("use_gated_mlp"))
    settings = dict(settings) | {
        "swiglu_mlp": gated,
        "swiglu_align_to": int(gated),  # timm then has two layers, as Transformers; to 1 changes no width
        "qkv_bias": any(_has_bias(config, layer) for layer in QKV),
        "attn_type": "rope",  # the one of timm's two whose key can have a bias
        "init_values": 1.0,
        "num_reg_tokens": int(config.get("num_register_tokens", 0)),
        "global_pool": "token",
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": theta,
        "rope_rotate_half": True,
    }
    kind = partial(_eva, TokenAndMeanEva if pooled else Eva, ACTIVATIONS[_activation(config)])
    return Conversion(kind, settings, RENAMES + (GATED if gated else PLAIN), ("embeddings.mask_token",))


def _eva(kind: type[Eva], activation: type[nn.Module], **settings: Any) -> Eva:
    """timm's `Eva`, which has no setting for its activation."""
    model = kind(**settings)
    for block in model.blocks:
        block.mlp.act = activation()
    return model


def _reads_mean(classifier: Tensor, dim: int, source: object) -> bool:
    """Whether a classifier [classes, channels] reads the mean of the image tokens beside CLS."""
    if classifier.ndim != 2 or classifier.shape[1] not in (dim, 2 * dim):
        raise InputError(
            f"{source}: {CLASSIFIER} is {tuple(classifier.shape)}, but a classifier that lowpass takes reads CLS, "
            f"{dim} channels, or CLS and the mean of the image tokens, {2 * dim}; train one of these"
        )
    return classifier.shape[1] == 2 * dim


def _activation(config: Mapping[str, Any]) -> str:
    return str(config.get("hidden_act", "gelu"))


def _has_bias(config: Mapping[str, Any], layer: str) -> bool:
    field, default = BIASES[layer]
    return bool(config.get(field, default))


def _add_biases(config: Mapping[str, Any], state: dict[str, Tensor], source: object) -> None:
    """Biases of 0 where timm's layers have one, in place. A bias that only the weights or only the config knows of
    is refused: Transformers would leave it out, or make one up."""
    fused = any(_has_bias(config, layer) for layer in QKV)
    for name in sorted(state):
        stem = name.removesuffix(".weight")
        layer = ".".join(stem.split(".")[-2:])
        if stem == name or layer not in BIASES:
            continue
        told, bias = _has_bias(config, layer), f"{stem}.bias"
        if told != (bias in state):
            raise InputError(
                f"{source}: {BIASES[layer][0]} in config.json is {told}, but the weights have {'no ' if told else ''}"
                f"{bias}; give the config.json that was saved with them"
            )
        if not told and (fused or layer not in QKV):
            state[bias] = state[name].new_zeros(len(state[name]))
