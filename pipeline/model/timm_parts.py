"""Parts of timm's models, by what they are."""

from collections.abc import Mapping
from typing import Any, cast

from timm.layers import GELU, GELUTanh, GluMlp, Mlp, PatchEmbed, QuickGELU, SwiGLU
from torch import Tensor, nn

NO_MLP = "its MLP is neither two linear layers with a GELU or SiLU between nor a gated one (SwiGLU), with biases"


def activation_of(module: nn.Module) -> str | None:
    """The name of an activation in `ACTIVATIONS`; None: it is none of those that a slim block has."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    kinds: dict[type[nn.Module], str] = {GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu", nn.SiLU: "silu"}
    return kinds.get(type(module))


def is_mlp(mlp: Any) -> bool:
    """Whether an MLP is one that a slim block has: linear layers with biases, and an activation of `ACTIVATIONS`."""
    layers = [part for name, part in mlp.named_children() if name.startswith("fc")]
    return (
        type(mlp) in (Mlp, GluMlp, SwiGLU)
        and all(isinstance(layer, nn.Linear) and layer.bias is not None for layer in layers)
        and activation_of(mlp.act) is not None
    )


def is_gated(mlp: nn.Module) -> bool:
    """Whether an MLP of `is_mlp` multiplies two layers: timm's `SwiGLU`, or `GluMlp`, which has both in one."""
    return isinstance(mlp, GluMlp | SwiGLU)


def mlp_state(mlp: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an MLP of `is_mlp`, under a `SlimMlp`'s names."""
    if isinstance(mlp, SwiGLU):
        return {name.replace("fc1_g.", "gate.").replace("fc1_x.", "fc1."): tensor for name, tensor in state.items()}
    if not isinstance(mlp, GluMlp):
        return dict(state)
    split = dict(state)
    for part in ("weight", "bias"):
        halves = split.pop(f"fc1.{part}").chunk(2)
        split[f"gate.{part}"], split[f"fc1.{part}"] = halves[::-1] if mlp.gate_last else halves
    return split


def is_identity(module: nn.Module) -> bool:
    """Whether it gives what it takes."""
    return isinstance(module, nn.Identity)


def is_layer_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm with weight and bias."""
    return isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None


def is_whole_patches(embedding: Any) -> bool:
    """Whether a patch embedding is a convolution over whole patches and nothing else."""
    return (
        type(embedding) is PatchEmbed
        and is_identity(embedding.norm)
        and not any(size % step for size, step in zip(embedding.img_size, embedding.patch_size, strict=True))
    )


def alike(blocks: nn.Sequential | nn.ModuleList, norms: list[nn.Module]) -> bool:
    """Whether all blocks have the same parts of the same sizes, and all norms one epsilon."""
    shapes = [{name: tensor.shape for name, tensor in block.state_dict().items()} for block in blocks]
    kinds = [[type(module) for module in block.modules()] for block in blocks]
    epsilons = {cast(nn.LayerNorm, norm).eps for norm in norms}
    return all(s == shapes[0] for s in shapes) and all(k == kinds[0] for k in kinds) and len(epsilons) == 1


def in_common(vit: Any, name: str) -> dict[str, Any]:
    """What is read alike off timm's `VisionTransformer` and `Eva`, as a `DenseViT` calls it."""
    block, grid, patch = vit.blocks[0], vit.patch_embed.grid_size, vit.patch_embed.patch_size
    return {
        "name": name,
        "img_size": (grid[0] * patch[0], grid[1] * patch[1]),
        "patch_size": patch,
        "in_chans": vit.in_chans,
        "num_classes": vit.num_classes,
        "embed_dim": vit.embed_dim,
        "num_heads": block.attn.num_heads,
        "hidden": block.mlp.fc2.in_features,
        "gated": is_gated(block.mlp),
        "depth": len(vit.blocks),
        "norm_eps": block.norm1.eps,
        "no_embed_class": vit.no_embed_class,
        "pre_norm": not is_identity(vit.norm_pre),
        "final_norm": not (is_identity(vit.norm) and is_identity(vit.fc_norm)),
        "fc_norm": not is_identity(vit.fc_norm),
        "activation": activation_of(block.mlp.act),
    }
