"""Query, key and value without a bias, which is exact, and on TensorRT three kernels a block fewer.

A bias between the one GEMM of query, key and value and the fused attention costs TensorRT a kernel each, that adds and
moves. It can go where the layer reads a LayerNorm. What that gives before its own weight and bias, n, sums to zero over
the C channels. The sum of n + s is s C, whatever the token, and a matrix of equal columns turns that constant into any
bias:

    (W + (beta / s - W 1) 1^T / C) (n + s) = W n + beta        where W n + beta is the layer behind the norm.

Any shift s is exact. In half precision a large one costs digits of n, a small one makes the columns large.
"""

import torch
from torch import Tensor, nn

from lowpass.pipeline.model.slim_block import SlimBlock

SHIFT = 0.5  # of 1, 1/2, ... 1/16: FP16 and BF16 err no more than with biases, on the digits model and on DINOv2


def drop_biases(block: SlimBlock) -> None:
    """Take the biases of a block's query, key and value away, in place; its first norm then adds `SHIFT` to every
    channel of n, and nothing else.

    Only the query's need be replaced as above. A key's adds the same to all logits of a query, which softmax does not
    see, unless rotary positions turn it by each token's angle. A value's reaches the projection as it is, for the
    weights of attention sum to one, and goes into its bias, unless a norm stands between. What need not be replaced
    costs no rounding.
    """
    attention, norm = block.attn, block.norm1
    with torch.no_grad():
        attention.query = behind_shift(attention.query, norm, bias_behind(attention.query, norm))
        turned = bias_behind(attention.key, norm) if attention.rotary else None
        attention.key = behind_shift(attention.key, norm, turned)
        value = bias_behind(attention.value, norm)
        into_projection = isinstance(attention.norm, nn.Identity)
        if into_projection:
            attention.proj.bias.add_((attention.proj.weight.double() @ value).to(attention.proj.bias.dtype))
        attention.value = behind_shift(attention.value, norm, None if into_projection else value)
        norm.weight.fill_(1)
        norm.bias.fill_(SHIFT)


def bias_behind(layer: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """What the layer adds to each output behind the norm, whatever the token: beta [K] FP64."""
    added = layer.weight.double() @ norm.bias.double()
    return added if layer.bias is None else added + layer.bias.double()


def behind_shift(layer: nn.Linear, norm: nn.LayerNorm, beta: Tensor | None) -> nn.Linear:
    """A layer without a bias that gives W n + `beta` behind a norm of weight 1 and bias `SHIFT`, where `layer` gives
    W n + `bias_behind` behind `norm`."""
    weight = layer.weight.double() * norm.weight.double()
    wanted: Tensor = weight.new_zeros(len(weight)) if beta is None else beta / SHIFT
    weight = weight + (wanted - weight.sum(1)).div(layer.in_features).unsqueeze(1)
    bare = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    bare.weight = nn.Parameter(weight.to(layer.weight.dtype), False)
    return bare
