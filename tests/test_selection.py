"""Every lowering of the token selection keeps the same tokens, ties and prefix tokens included."""

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowpass.export.graph.selection import SELECTIONS, lowering
from lowpass.export.onnx.trace import trace
from lowpass.export.options import Selection
from lowpass.pipeline.method.token_scores import keep_tokens


@given(
    batch=st.integers(1, 3),
    count=st.integers(2, 40),
    prefix=st.integers(0, 2),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_lowerings_keep_the_same_tokens(batch: int, count: int, prefix: int, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, count))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, prefix + count, 5, generator=generator)
    scores = torch.randn(batch, count, generator=generator)
    expected = keep_tokens(tokens, scores, keep)
    for selection in SELECTIONS:
        assert torch.equal(lowering(selection, ordered=True)(tokens, scores, keep), expected), selection
        # Unless order matters, the same tokens, prefix tokens first.
        got = lowering(selection, ordered=False)(tokens, scores, keep)
        assert torch.equal(got[:, :prefix], expected[:, :prefix])
        assert torch.equal(got[:, prefix:].sort(1).values, expected[:, prefix:].sort(1).values), selection


@pytest.mark.parametrize("selection", SELECTIONS)
def test_ties_in_onnx_go_to_the_earlier_token(selection: Selection) -> None:
    """Two lowerings may only be swapped for one another when they break ties alike."""
    keep = 5

    class Select(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return lowering(selection, ordered=True)(images, images[:, 1:, 0], keep)

    content = trace(Select(), torch.zeros(2, 9, 3)).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for scores in ([0, 1, 0, 1, 0, 1, 0, 1], [2, 2, 2, 2, 2, 2, 2, 2], [0, 3, 3, 0, 1, 1, 1, 1]):
        tokens = np.random.default_rng(0).standard_normal((3, 9, 3)).astype(np.float32)
        tokens[:, 1:, 0] = scores
        (got,) = session.run(None, {"images": tokens})
        order = sorted(range(8), key=lambda i: (-scores[i], i))[:keep]
        np.testing.assert_allclose(got, tokens[:, [0, *(1 + i for i in sorted(order))]], rtol=1e-6)
