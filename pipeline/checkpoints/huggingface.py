"""Models that Hugging Face Transformers saved: ViT, DeiT with and without a teacher's head, DINOv2 with its head, and
DINOv3 with a linear one.

Read from `config.json`, `preprocessor_config.json` and the weights; the library itself is not needed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SwiGLU
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.checkpoints.converted import ACTIVATIONS, Conversion, vit_settings
from lowpass.pipeline.checkpoints.huggingface_dinov3 import DINOV3, check_dinov3, dinov3_conversion, dinov3_size
from lowpass.pipeline.checkpoints.origin import Choices, Origin, labels, mark, set_preprocessing
from lowpass.pipeline.checkpoints.shape import fit_positions
from lowpass.pipeline.model.readout import TokenAndMeanViT

PREPROCESSOR = "preprocessor_config.json"
KINDS = ("vit", "deit", "dinov2", "dinov2_with_registers", DINOV3)
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
RENAMES = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"\.attention\.(?:attention\.)?(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)


def from_huggingface(
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    source: object,
    choices: Choices,
    processor: Mapping[str, Any] | None,
) -> nn.Module:
    """A timm ViT with the same logits.

    Args:
        config: of `config.json`.
        state: tensors under Transformers' names, without the model's prefix.
        source: what messages call the weights.
        choices: of the user.
        processor: of `preprocessor_config.json`, or None.

    Raises:
        InputError: it is no such classifier, or the weights do not fit the config.
    """
    kind = str(config.get("model_type"))
    if kind not in KINDS:
        raise InputError(f"{source} is a Hugging Face {kind!r}; lowpass takes {', '.join(KINDS)} with a classifier")
    if kind == DINOV3:
        check_dinov3(config, state, source)
    if "classifier.weight" not in state and "cls_classifier.weight" not in state:
        raise InputError(f"{source} is a Hugging Face {kind} without a classifier; save the ...ForImageClassification")
    gated = kind.startswith("dinov2") and bool(config.get("use_swiglu_ffn"))
    activation = "silu" if gated else str(config.get("hidden_act", "gelu"))
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{source} has {activation} MLPs, not GELU or SiLU: hidden_act in config.json is to be one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    name = f"{kind} (Hugging Face)"
    found = _preprocessing(kind, processor)
    try:
        conversion = _converted(kind, config, state, source, choices, found.get("input_size"), activation)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{source}: its config.json and weights do not describe a {kind}: {reason}") from None
    model = conversion.built(state, source, name)
    said = str(source) if processor is None else f"{PREPROCESSOR} of {source}"
    if processor is None:
        said = f"Transformers' default for {kind} ({source} has no {PREPROCESSOR})"
    set_preprocessing(model, said, {key: value for key, value in found.items() if key != "input_size"}, choices)
    mark(model, Origin(*_classes(config, int(cast(int, model.num_classes)))))
    return model


def _converted(
    kind: str,
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    source: object,
    choices: Choices,
    processed: tuple[int, int] | None,
    activation: str,
) -> Conversion:
    """Sizes and renames of one kind."""
    dim, patch, dino = int(config["hidden_size"]), _pair(config["patch_size"]), kind.startswith("dinov2")
    hidden = int(config["mlp_ratio"] * dim) if dino else int(config["intermediate_size"])
    gated = dino and bool(config.get("use_swiglu_ffn"))
    if gated:
        hidden = -(-int(hidden * 2 / 3) // 8) * 8  # three layers are to cost about what two would
    size = _image_size(kind, config, state, source, choices, processed)
    channels = int(config.get("num_channels", 3))
    if choices.in_chans not in (None, channels):
        raise InputError(f"--in-chans is {choices.in_chans}, but {source} takes images of {channels} channels")
    head = state["cls_classifier.weight" if "cls_classifier.weight" in state else "classifier.weight"]
    heads, depth = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    settings = vit_settings(
        size, patch, channels, len(head), dim, depth, heads, hidden, float(config["layer_norm_eps"])
    )
    if kind == DINOV3:
        return dinov3_conversion(config, state, source, settings)
    settings |= {"qkv_bias": bool(config.get("qkv_bias", True)), "act_layer": ACTIVATIONS[activation]}
    dropped, renames = ["embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias"], list(RENAMES)
    model: type[VisionTransformer] = VisionTransformer
    if dino:
        model, settings["init_values"] = TokenAndMeanViT, 1.0
        if gated:
            settings["mlp_layer"] = SwiGLU
            _split_gates(state)
        if kind == "dinov2_with_registers":
            settings |= {"reg_tokens": int(config["num_register_tokens"]), "no_embed_class": True}
            # Registers join when positions have been added: what CLS was given becomes part of it.
            whole = state["embeddings.position_embeddings"]
            state["embeddings.cls_token"] = state["embeddings.cls_token"] + whole[:, :1]
            state["embeddings.position_embeddings"] = whole[:, 1:]
    elif kind == "deit" and "cls_classifier.weight" in state:
        model = VisionTransformerDistilled
        renames.append((r"^embeddings\.distillation_token$", "dist_token"))
    elif kind == "deit":
        # Nobody reads this one's distillation token: it is a register with a position of its own.
        settings["reg_tokens"] = 1
        renames.append((r"^embeddings\.distillation_token$", "reg_token"))
    return Conversion(model, settings, tuple(renames), tuple(dropped))


def _split_gates(state: dict[str, Tensor]) -> None:
    """The gate and what it multiplies are one layer in files, two in the model: here two, in place."""
    for name in [name for name in state if ".mlp.weights_in." in name]:
        gate, value = state.pop(name).chunk(2)
        state[name.replace("weights_in", "gate_proj")] = gate
        state[name.replace("weights_in", "up_proj")] = value


def _image_size(
    kind: str,
    config: Mapping[str, Any],
    state: dict[str, Tensor],
    source: object,
    choices: Choices,
    processed: tuple[int, int] | None,
) -> tuple[int, int]:
    """Height and width of the images. Positions are resampled to them, in place; those of DINOv2 to what its processor
    gives, as Transformers does as it runs."""
    patch, own, dino = _pair(config["patch_size"]), _pair(config["image_size"]), kind.startswith("dinov2")
    if kind == DINOV3:
        size = dinov3_size(own, patch, source, choices.img_size, processed)
    else:
        positions = {"pos_embed": state["embeddings.position_embeddings"]}
        asked = choices.img_size or (processed if dino else None)
        prefix = 2 if kind == "deit" else 1
        size = fit_positions(positions, Path(str(source)), patch, prefix, own, asked, antialias=not dino, is_known=True)
        state["embeddings.position_embeddings"] = positions["pos_embed"]
    if size != own:
        logger.info("images of %dx%d, where %s was made for %dx%d", *size, source, *own)
    return size


def _preprocessing(kind: str, processor: Mapping[str, Any] | None) -> dict[str, Any]:
    """A processor's settings in timm's words; its default for the kind where there is none."""
    half, imagenet = ((0.5,) * 3, (0.5,) * 3), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std = half if kind == "vit" else imagenet
    whole = kind in ("vit", DINOV3)
    interpolation = "bilinear" if whole else "bicubic"
    if processor is None:
        crop = 1.0 if whole else 224 / 256
        mode = "center" if kind.startswith("dinov2") else "squash"
        return {"mean": mean, "std": std, "crop_pct": crop, "crop_mode": mode, "interpolation": interpolation}
    mean, std = _normalisation(processor, mean, std)
    resized, cropped = processor.get("size"), processor.get("crop_size")
    crops = bool(processor.get("do_center_crop", cropped is not None and kind != "vit")) and cropped is not None
    final = _sides(cropped) if crops else _sides(resized)
    squash = not (isinstance(resized, Mapping) and "shortest_edge" in resized)
    share = 1.0
    if crops and (before := _sides(resized)) is not None and final is not None:
        share = final[0] / before[0]
    found = {"mean": mean, "std": std, "crop_pct": share, "crop_mode": "squash" if squash else "center"}
    found["interpolation"] = RESAMPLING.get(processor.get("resample", -1), interpolation)
    return found | ({"input_size": final} if final is not None else {})


def _normalisation(processor: Mapping[str, Any], mean: Any, std: Any) -> tuple[Any, Any]:
    """Mean and deviation of pixels from 0 to 1.

    Transformers multiplies pixels of 0 to 255 by `rescale_factor` first. Where it does not, those of a mean above 1 are
    of 0 to 255, and others were given pixels that something else had scaled.
    """
    if not processor.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    else:
        mean, std = (
            (value,) * 3 if isinstance(value, int | float) else value
            for value in (processor.get("image_mean") or mean, processor.get("image_std") or std)
        )
    numbers = isinstance(mean, list | tuple) and all(isinstance(value, int | float) for value in mean)
    top = 255 * processor.get("rescale_factor", 1 / 255)
    if not processor.get("do_rescale", True):
        top = 255 if numbers and max(mean) > 1 else 1
    if abs(top - 1) < 1e-6 or not numbers:  # what are no numbers is refused later
        return mean, std
    return tuple(value / top for value in mean), tuple(value / top for value in std)


def _classes(config: Mapping[str, Any], count: int) -> tuple[tuple[str, ...] | None, str]:
    """The names of `id2label`, unless they are only numbers that Transformers made up."""
    named = config.get("id2label")
    names = labels(named, count)
    if names is None and named:
        logger.info("classes: id2label does not name the %d that the model has, and is not used", count)
    if names is None or names == tuple(f"LABEL_{number}" for number in range(count)):
        return None, ""
    return names, "id2label"


def read_processor(folder: Path) -> dict[str, Any] | None:
    """A folder's `preprocessor_config.json`; None: it has none.

    Raises:
        InputError: it is no JSON object.
    """
    path = folder / PREPROCESSOR
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width of a processor's size."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        if "height" in size:
            return int(size["height"]), int(size["width"])
        if "shortest_edge" in size:
            return (int(size["shortest_edge"]),) * 2
    return None
