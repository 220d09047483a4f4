"""What the studies of whole parts compare."""

from itertools import pairwise

import pytest
import timm

from lowpass.benchmarks.forecast.efficiency import NEAR, sub_blocks, with_parts
from lowpass.benchmarks.targets.sub_blocks import whole_parts_kept
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.curves import AttentionOption, BlockCurve, SizeOption


@pytest.fixture(scope="module")
def dense() -> Architecture:
    return SlimViT.from_timm(timm.create_model("deit_tiny_patch16_224", num_classes=10)).architecture


def test_parts_are_spread_evenly_within_the_macs(dense: Architecture) -> None:
    macs = dense.macs() // 2
    for attentions, mlps in ((1, 12), (4, 6), (5, 7), (12, 1)):
        slim = with_parts(dense, attentions, mlps, macs)
        assert slim is not None and slim.macs() <= macs
        with_attention = [index for index, block in enumerate(slim.blocks) if block.heads]
        with_mlp = [index for index, block in enumerate(slim.blocks) if block.hidden]
        assert len(with_attention) == attentions and len(with_mlp) == mlps
        assert with_attention[-1] == 11 and with_mlp[0] == 0  # the classifier reads the one, the other reads the image
        for found in (with_attention, with_mlp):
            gaps = {two - one for one, two in pairwise(found)}
            assert not gaps or max(gaps) - min(gaps) <= 1
        assert len({block.hidden for block in slim.blocks} - {0}) == 1
    assert with_parts(dense, 12, 12, dense.macs() // 20) is None


def test_what_is_compared_has_the_macs(dense: Architecture) -> None:
    macs = round(0.46 * dense.macs())
    assert NEAR * macs <= sub_blocks(dense, macs).macs() <= macs


def test_the_other_way_keeps_all_parts() -> None:
    gone, there = (AttentionOption(heads=heads, qk_dim=heads, v_dim=heads, loss=0.1) for heads in (0, 2))
    hidden = tuple(SizeOption(size=size, loss=0.1) for size in (0, 8))
    curve = BlockCurve(attention=(gone, there), hidden=hidden, tokens=hidden[1:])
    (kept,) = whole_parts_kept([curve])
    assert kept == BlockCurve(attention=(there,), hidden=hidden[1:], tokens=hidden[1:])
