"""Removing channels through Torch-Pruning's dependency graph, so that every layer a channel touches shrinks with it."""

from collections.abc import Sequence

import torch
import torch_pruning as tp
from timm.layers import LayerScale
from torch import Tensor, nn

from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.method.rotary import pairs_of
from lowpass.pipeline.model.slim_attention import AttentionWeights, DifferentialAttention
from lowpass.pipeline.model.slim_block import SlimBlock


class _QueryKeyPairing(tp.BasePruningFunc):
    """Tells the graph what `AttentionWeights` couples: a query channel with the key channel it multiplies, while its
    output [B, H, T, T] carries no channel at all. Torch-Pruning alone takes attention for an elementwise operation and
    would remove value and projection channels along with the query's."""

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer  # no weights: the graph's edges do the work

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer  # distinct from prune_in_channels, or removal would leak through the attention matrix

    def get_in_channels(self, layer: nn.Module) -> None:
        return None

    def get_out_channels(self, layer: nn.Module) -> None:
        return None


class _ExplicitBlock(nn.Module):
    """A block with attention written out, without token selection: what the graph is traced on."""

    def __init__(self, block: SlimBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        if block.has_attention:
            x = x + block.ls1(block.attn.traceable(block.norm1(x)))
        return x + block.ls2(block.mlp(block.norm2(x))) if block.has_mlp else x


def dependency_graph(block: SlimBlock) -> tp.DependencyGraph:
    """The graph of one block; (query, key), (value, projection) and the two MLP layers are its three groups, of which a
    block without attention has the last alone, one without an MLP the others."""
    weight = block.norm1.weight if block.has_attention else block.norm2.weight
    # Layer scale works on the residual stream, which is never pruned: tell the graph which axis is its channel.
    # What differential attention has inside a head goes with no channel either.
    layer_scales = [module for module in block.children() if isinstance(module, LayerScale)]
    scales = [(parameter, 0) for scale in layer_scales for parameter in scale.parameters()]
    if block.has_attention and isinstance(block.attn, DifferentialAttention):
        scales += [(parameter, 0) for parameter in block.attn.inside_heads()]
    with torch.enable_grad():
        graph = tp.DependencyGraph()
        graph.build_dependency(
            _ExplicitBlock(block),
            example_inputs=torch.zeros(1, 3, len(weight), device=weight.device, dtype=weight.dtype),
            customized_pruners={AttentionWeights: _QueryKeyPairing()},
            unwrapped_parameters=scales,
        )
    return graph


def remove_channels(block: SlimBlock, choice: ChannelChoice) -> None:
    """Cut `block` down to `choice`, in place, one dependency group a kind of channel. Of a part that the block does not
    have, `choice` has no channels; whole parts go by `remove_part`.

    Raises:
        ValueError: positions are rotary, and a channel would stay without the other of its pair; or `choice` has
            channels of a part that is not there, or none of one that is.
    """
    for part, there, kept in (("attention", block.has_attention, choice.heads), ("MLP", block.has_mlp, choice.hidden)):
        if there != bool(kept):
            raise ValueError(
                f"the block has {'an' if there else 'no'} {part}, of which {len(kept)} channels would stay"
            )
    if not (block.has_attention or block.has_mlp):
        return
    training = block.training
    if block.has_attention and block.attn.rotary:
        attention = block.attn
        turned = [pairs_of(kept, attention.qk_dim) for kept in choice.query_key]
        pairs_left = torch.stack([attention.pairs[h][list(kept)] for h, kept in zip(choice.heads, turned, strict=True)])
    frozen = {name for name, parameter in block.named_parameters() if not parameter.requires_grad}
    graph = dependency_graph(block.requires_grad_(True))  # it is traced through gradient functions
    if block.has_attention:
        attention = block.attn
        pairs = [h * attention.qk_dim + i for h, kept in zip(choice.heads, choice.query_key, strict=True) for i in kept]
        values = [h * attention.v_dim + i for h, kept in zip(choice.heads, choice.value, strict=True) for i in kept]
        _prune(graph, attention.query, pairs)
        _prune(graph, attention.value, values)
    if block.has_mlp:
        _prune(graph, block.mlp.fc1, choice.hidden)
    if block.has_attention:
        attention.num_heads = len(choice.heads)
        if attention.rotary:
            attention.pairs = pairs_left
    block.train(training)  # tracing leaves evaluation mode behind
    block.zero_grad(set_to_none=True)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _prune(graph: tp.DependencyGraph, root: nn.Linear, kept: Sequence[int]) -> None:
    gone = sorted(set(range(root.out_features)) - set(kept))
    if gone:
        graph.get_pruning_group(root, tp.prune_linear_out_channels, gone).prune()
