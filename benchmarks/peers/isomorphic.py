"""Isomorphic Pruning (Fang et al., ECCV 2024, arXiv 2407.04616), as Torch-Pruning, its authors' library, implements it.

Channels are ranked among those of like subgraphs, so that hidden channels of all MLPs compete with each other, and the
residual stream's with themselves. Heads go whole, in one ranking over all blocks, as in the library's example for
timm's ViTs. Importance is first-order Taylor, from the cross-entropy on the calibration images. Channels and heads are
pruned by one ratio, found by bisection; then that of the channels is lowered, since heads go in large steps. What a
layer loses is not made up for: the paper trains the pruned model.

The authors' own scripts for DeiT also thin heads, by a ratio of their own, which the library's example does not: at
equal MACs fewer heads and channels would go then.

`inside`, the example's `--bottleneck`, leaves the residual stream alone. The paper prunes it as well, which costs far
more where nothing is trained. MACs are counted with the attention's products in them, as everywhere here.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch_pruning as tp
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowpass.benchmarks.peers.matching import describe_with_cls
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import track

ROUND_TO = 2  # channels, as in the example
TRIES, FINER_TRIES = 11, 9  # of the bisections: ratios to a thousandth or less


def prune_isomorphic(
    model: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor]], target_macs: float, inside: bool = False
) -> VisionTransformer:
    """A pruned copy: the largest that bisection finds to take no more than a share of the model's MACs.

    Args:
        model: a plain ViT with CLS alone, in evaluation mode.
        batches: images [B, C, H, W] and labels [B] to take the gradients on.
        target_macs: share of the model's MACs that may stay.
        inside: prune heads and hidden channels alone.

    Raises:
        InputError: the model does not suit, or the target is out of reach.
    """
    dense, macs = describe_with_cls(model), counted_macs(model)
    gradients = accumulated_gradients(model, batches)
    limit = target_macs * macs
    best = _bisected(lambda ratio: pruned_by(model, gradients, ratio, ratio, inside), 1.0, limit, TRIES)
    if best is None:
        raise InputError(f"{target_macs:g} of the MACs is out of reach of Isomorphic Pruning on {dense.name}")
    heads = best.ratio
    finer = _bisected(lambda ratio: pruned_by(model, gradients, ratio, heads, inside), heads, limit, FINER_TRIES)
    return best.model if finer is None or finer.macs < best.macs else finer.model


@dataclass(frozen=True)
class _Pruned:
    model: VisionTransformer
    ratio: float
    macs: int


def _bisected(make: Callable[[float], VisionTransformer], most: float, limit: float, tries: int) -> _Pruned | None:
    """The largest within `limit` MACs of those tried, by ratios from 0 to `most`."""
    best: _Pruned | None = None
    low, high = 0.0, most
    for _ in track(range(tries), "bisecting the pruning ratio"):
        ratio = (low + high) / 2
        model = make(ratio)
        macs = counted_macs(model)
        if macs > limit:
            low = ratio
            continue
        high = ratio
        if best is None or macs > best.macs:
            best = _Pruned(model, ratio, macs)
    return best


def accumulated_gradients(model: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Of the cross-entropy, summed over the batches; by the parameters' names."""
    copied = copy.deepcopy(model).requires_grad_(True)
    device = next(copied.parameters()).device
    for images, labels in track(batches, "gradients for Taylor"):
        F.cross_entropy(copied(images.to(device)), labels.to(device)).backward()
    return {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}


def pruned_by(
    model: VisionTransformer, gradients: dict[str, Tensor], channels: float, heads: float, inside: bool
) -> VisionTransformer:
    """A copy without these shares of its channels and heads."""
    vit = copy.deepcopy(model).requires_grad_(True)
    for name, parameter in vit.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    attentions = [module for module in vit.modules() if isinstance(module, Attention)]
    fused = [attention.fused_attn for attention in attentions]
    for attention in attentions:
        attention.fused_attn = False  # the graph takes the fused one for an elementwise operation
    # Of these the outputs are left alone; what any block adds to the residual stream is one group.
    ignored = [vit.head, *(block.mlp.fc2 for block in vit.blocks if inside)]
    example = torch.zeros(1, *_input_shape(vit), device=next(vit.parameters()).device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside layers, whose axis it finds by itself
        pruner = tp.pruner.BasePruner(
            vit,
            example,
            importance=tp.importance.GroupTaylorImportance(),
            global_pruning=True,
            isomorphic=True,
            pruning_ratio=channels,
            ignored_layers=ignored,
            in_channel_groups={},  # the library's defaults are shared by all pruners
            out_channel_groups={},
            num_heads={attention.qkv: attention.num_heads for attention in attentions},
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=heads,
            round_to=ROUND_TO,
        )
    for group in pruner.step(interactive=True):
        group.prune()
    for attention, was_fused in zip(attentions, fused, strict=True):
        # Counted, not asked: a block that would have lost all its heads was left as it is.
        attention.attn_dim = attention.qkv.out_features // 3
        attention.num_heads = attention.attn_dim // attention.head_dim
        attention.fused_attn = was_fused
    vit.zero_grad(set_to_none=True)
    return vit.eval().requires_grad_(False)


def counted_macs(model: nn.Module) -> int:
    """Multiply-accumulates of one image: every matrix product and convolution, counted as they run."""
    image = torch.zeros(1, *_input_shape(model), device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2


def _input_shape(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    assert isinstance(model, VisionTransformer)
    height, width = model.patch_embed.img_size
    return model.in_chans, height, width
