"""Channels that are removed and channels that are zero are the same thing, and nothing else goes with them."""

import copy
import itertools

import pytest
import torch
import torch_pruning as tp
from conftest import MakeViT
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.method.energy import filtered_energy
from lowpass.pipeline.method.token_scores import attention_importance, keep_tokens
from lowpass.pipeline.model.removal import dependency_graph, remove_channels
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT

HEADS, HEAD_DIM, HIDDEN = 3, 8, 96
VARIANTS = {"plain": {}, "layer scale": {"init_values": 0.5}, "no qkv bias": {"qkv_bias": False}}

TAKEN: list[str] = [
    "attn.query.weight",
    "attn.query.bias",
    "attn.key.weight",
    "attn.key.bias",
    "attn.value.weight",
    "attn.value.bias",
    "attn.proj.weight",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
]


@st.composite
def choices(
    draw: st.DrawFn, heads: int = HEADS, qk_dim: int = HEAD_DIM, v_dim: int = HEAD_DIM, hidden: int = HIDDEN
) -> ChannelChoice:
    """Any heads, any equally many channels inside them, any hidden channels; at least one of each."""

    def some(of: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(draw(st.permutations(range(of)))[:count]))

    kept = some(heads, draw(st.integers(1, heads)))
    pairs, values = draw(st.integers(1, qk_dim)), draw(st.integers(1, v_dim))
    drop = draw(st.sets(st.integers(0, hidden - 1), max_size=hidden - 1))
    return ChannelChoice(
        heads=kept,
        query_key=tuple(some(qk_dim, pairs) for _ in kept),
        value=tuple(some(v_dim, values) for _ in kept),
        hidden=tuple(i for i in range(hidden) if i not in drop),
    )


variants = st.sampled_from(sorted(VARIANTS))


def slim_vit(make_vit: MakeViT, variant: str) -> SlimViT:
    return SlimViT.from_timm(make_vit(**VARIANTS[variant]))


def kept_rows(choice: ChannelChoice, per_head: tuple[tuple[int, ...], ...], size: int) -> list[int]:
    return [head * size + i for head, kept in zip(choice.heads, per_head, strict=True) for i in kept]


def zeroed(block: SlimBlock, choice: ChannelChoice) -> SlimBlock:
    """A copy of `block` at its full size, with everything outside `choice` set to zero."""
    block = copy.deepcopy(block)
    pairs = kept_rows(choice, choice.query_key, block.attn.qk_dim)
    values = kept_rows(choice, choice.value, block.attn.v_dim)
    layers = (
        (block.attn.query, pairs),
        (block.attn.key, pairs),
        (block.attn.value, values),
        (block.mlp.fc1, choice.hidden),  # GELU(0) = 0: the second layer then sees nothing of them
    )
    with torch.no_grad():
        for layer, kept in layers:
            gone = [row for row in range(layer.out_features) if row not in set(kept)]
            layer.weight[gone] = 0
            if layer.bias is not None:
                layer.bias[gone] = 0
    return block


def tokens_into(slim: SlimViT) -> Tensor:
    return torch.randn(2, 1 + slim.blocks[0].tokens_in, 24, generator=torch.Generator().manual_seed(2))


@given(choices(), variants)
@torch.no_grad()
def test_a_removed_channel_is_a_zero_channel(make_vit: MakeViT, choice: ChannelChoice, variant: str) -> None:
    slim = slim_vit(make_vit, variant)
    block, expected = slim.blocks[0], zeroed(slim.blocks[0], choice)
    remove_channels(block, choice)
    assert block.shape == choice.shape(16)
    x = tokens_into(slim)
    torch.testing.assert_close(block(x), expected(x), rtol=0, atol=1e-5)


@given(choices(), choices(), variants)
@torch.no_grad()
def test_a_whole_model(make_vit: MakeViT, first: ChannelChoice, second: ChannelChoice, variant: str) -> None:
    slim = slim_vit(make_vit, variant)
    expected = copy.deepcopy(slim)
    expected.vit.blocks = nn.Sequential(*(zeroed(b, c) for b, c in zip(slim.blocks, (first, second), strict=True)))
    for block, choice in zip(slim.blocks, (first, second), strict=True):
        remove_channels(block, choice)
    assert slim.architecture.blocks == (first.shape(16), second.shape(16))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-5)


@given(choices(), st.integers(1, 15))
@torch.no_grad()
def test_a_block_that_scores_tokens(make_vit: MakeViT, choice: ChannelChoice, keep: int) -> None:
    slim = slim_vit(make_vit, "plain")
    slim.set_keep(0, keep)
    block, full = slim.blocks[0], zeroed(slim.blocks[0], choice)
    remove_channels(block, choice)
    x = tokens_into(slim)
    # Removed heads have no say in the token scores, whereas a zero head looks everywhere alike: leave those out.
    mixed, weights = full.attn(full.norm1(x), score="full")
    assert weights is not None
    after = x + mixed
    energy = filtered_energy(after[:, 1:], full.lowpass, "l2")
    kept = keep_tokens(after, attention_importance(weights[:, list(choice.heads)], 1) * energy, keep)
    torch.testing.assert_close(block(x), kept + full.mlp(full.norm2(kept)), rtol=0, atol=1e-5)


@given(st.data())
@torch.no_grad()
def test_removing_again(make_vit: MakeViT, data: st.DataObject) -> None:
    slim = slim_vit(make_vit, "plain")
    block = slim.blocks[0]
    remove_channels(block, data.draw(choices()))
    shape = block.shape
    second = data.draw(choices(shape.heads, shape.qk_dim, shape.v_dim, shape.hidden))
    expected = zeroed(block, second)
    remove_channels(block, second)
    assert block.shape == second.shape(16)
    x = tokens_into(slim)
    torch.testing.assert_close(block(x), expected(x), rtol=0, atol=1e-5)


@given(choices(), variants)
def test_what_stays_is_copied_bit_for_bit(make_vit: MakeViT, choice: ChannelChoice, variant: str) -> None:
    slim = slim_vit(make_vit, variant)
    before = copy.deepcopy(slim.state_dict())
    remove_channels(slim.blocks[0], choice)
    pairs, values = kept_rows(choice, choice.query_key, HEAD_DIM), kept_rows(choice, choice.value, HEAD_DIM)
    rows = {"query": pairs, "key": pairs, "value": values, "fc1": list(choice.hidden)}
    columns = {"proj.weight": values, "fc2.weight": list(choice.hidden)}
    for name, tensor in slim.state_dict().items():
        expected = before[name]
        layer = name.removeprefix("vit.blocks.0.attn.").removeprefix("vit.blocks.0.mlp.")
        if layer.split(".")[0] in rows:
            expected = expected[rows[layer.split(".")[0]]]
        elif layer in columns:
            expected = expected[:, columns[layer]]
        assert torch.equal(tensor, expected), name


@pytest.mark.filterwarnings("error")  # Torch-Pruning warns where it has to guess
def test_the_three_groups(make_vit: MakeViT) -> None:
    """One group a kind of channel: rows of one or two layers, columns of the layer that reads them, nothing more."""
    for variant in VARIANTS:
        block = slim_vit(make_vit, variant).blocks[0]
        attention, mlp = block.attn, block.mlp
        rows, columns = tp.prune_linear_out_channels, tp.prune_linear_in_channels
        expected = {
            attention.query: {(attention.query, rows), (attention.key, rows)},
            attention.value: {(attention.value, rows), (attention.proj, columns)},
            mlp.fc1: {(mlp.fc1, rows), (mlp.fc2, columns)},
        }
        for root, members in expected.items():
            group = dependency_graph(block).get_pruning_group(root, rows, [1])
            found = [(item.dep.target.module, item.dep.handler, list(item.idxs)) for item in group]
            weighted = [entry for entry in found if next(iter(entry[0].parameters()), None) is not None]
            assert {(module, handler) for module, handler, _ in weighted} == members
            assert len(weighted) == len(members)
            assert all(indices == [1] for _, _, indices in weighted)


@pytest.mark.parametrize("training", [True, False])
def test_the_block_s_mode_stays_and_old_gradients_go(training: bool, make_vit: MakeViT) -> None:
    slim = slim_vit(make_vit, "layer scale").train(training)
    slim(torch.randn(2, 3, 16, 16)).sum().backward()
    remove_channels(slim.blocks[0], ChannelChoice((1,), ((0, 3),), ((2,),), (4, 5)))
    assert all(module.training == training for module in slim.blocks[0].modules())
    assert all(parameter.grad is None for parameter in slim.blocks[0].parameters())
    slim(torch.randn(2, 3, 16, 16)).sum().backward()  # and it can be trained at its new size
    assert all(parameter.grad.shape == parameter.shape for parameter in slim.blocks[0].parameters())


def test_keeping_everything_changes_nothing(make_vit: MakeViT) -> None:
    slim = slim_vit(make_vit, "plain")
    before = copy.deepcopy(slim.state_dict())
    every = tuple(range(HEAD_DIM))
    remove_channels(slim.blocks[0], ChannelChoice((0, 1, 2), (every,) * 3, (every,) * 3, tuple(range(HIDDEN))))
    assert all(torch.equal(tensor, before[name]) for name, tensor in slim.state_dict().items())


def test_works_without_gradients(make_vit: MakeViT) -> None:
    """The dependency graph is traced by autograd, which a frozen model or a surrounding `no_grad` would switch off."""
    choice = ChannelChoice((0, 2), ((0, 3), (1, 2)), ((2,), (7,)), (4, 5, 90))
    shapes = []
    for freeze, context in itertools.product((False, True), (torch.enable_grad, torch.no_grad)):
        slim = slim_vit(make_vit, "plain").requires_grad_(not freeze)
        with context():
            remove_channels(slim.blocks[0], choice)
        shapes.append(slim.blocks[0].shape)
        assert all(parameter.requires_grad != freeze for parameter in slim.parameters())
    assert set(shapes) == {choice.shape(16)}
