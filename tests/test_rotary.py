"""Rotary positions: timm's own logits, whole pairs of channels, and tokens that keep their places."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import MakeViT
from families import ROTARY, refused_rotary
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import GatedMlp, apply_keep_indices_nlc
from timm.models import Eva
from torch import Tensor, nn
from what_loads import rotary_agrees

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import ChannelChoice, choose_channels, choose_for_shape
from lowpass.pipeline.method.frequency import lowpass_images
from lowpass.pipeline.method.rotary import Rotary, pairs_of, rotary_table, rotate, whole_pairs
from lowpass.pipeline.method.sensitivity import ChannelScores, sensitivity_loss
from lowpass.pipeline.model.architecture import check_blocks
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.show_tokens import kept_tokens
from lowpass.pipeline.search.channel_criteria import low_frequency_sensitivity

families = pytest.mark.parametrize("family", ROTARY)
HEADS, HEAD_DIM, HIDDEN = 3, 8, 96


def rotary_vit(family: str, make_vit: MakeViT, **changes: Any) -> Any:
    return make_vit(**(ROTARY[family][0] | changes))


def pictures(model: SlimViT, count: int = 3) -> Tensor:
    dense = model.architecture.dense
    return torch.randn(count, dense.in_chans, *dense.img_size, generator=torch.Generator().manual_seed(1))


@families
@pytest.mark.parametrize("size", [16, (16, 24), (32, 20)], ids=str)
@torch.no_grad()
def test_nothing_removed_is_the_dense_model(family: str, size: Any, make_vit: MakeViT) -> None:
    """Angles depend on the image's size, each family's in its own way."""
    dense = rotary_vit(family, make_vit, img_size=size)
    slim = SlimViT.from_timm(dense)
    images = pictures(slim)
    torch.testing.assert_close(slim(images), dense(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(slim.classify(slim.vit.blocks(slim.embed(images))), dense(images), rtol=0, atol=1e-5)
    assert slim.architecture.blocks == slim.architecture.dense.blocks()


@torch.no_grad()
def test_places_matter(make_vit: MakeViT) -> None:
    """Without them the comparisons here would say nothing: neither angles nor the key's bias may be left out."""
    slim = SlimViT.from_timm(rotary_vit("RoPE-ViT", make_vit))
    images = pictures(slim)
    for change in ("angles", "bias"):
        other = copy.deepcopy(slim)
        for block in other.blocks:
            if change == "angles":
                block.attn.rotary = False
            else:
                block.attn.key.bias.zero_()
        assert (other(images) - slim(images)).abs().max() > 1e-3


@families
@torch.no_grad()
def test_tokens_that_stay_keep_their_places(family: str, make_vit: MakeViT) -> None:
    """timm's own second block, told which tokens are there, in whatever order they were kept."""
    dense = rotary_vit(family, make_vit)
    slim = SlimViT.from_timm(dense)
    prefix, images = slim.architecture.dense.num_prefix_tokens, pictures(slim)
    rope = dense.rope.get_embed(shape=list(slim.architecture.dense.grid))
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:7] for i in range(3)])

    def keep(tokens: Tensor, _scores: Tensor, _keep: int) -> Tensor:
        index = torch.cat([torch.arange(prefix).expand(3, -1), order + prefix], 1)
        return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))

    slim.set_keep(0, 7)
    slim.blocks[0].keep_tokens = keep
    entering = slim.blocks[0](slim.embed(images))
    kept_rope = apply_keep_indices_nlc(images, rope, order)[:, None]
    wanted = dense.blocks[1](slim.stream.tokens(entering), rope=kept_rope)
    torch.testing.assert_close(slim.stream.tokens(slim.blocks[1](entering)), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_places_are_exact_in_half_precision(dtype: torch.dtype, make_vit: MakeViT) -> None:
    slim = SlimViT.from_timm(rotary_vit("RoPE-ViT", make_vit, img_size=(1020, 4))).to(dtype)
    (places,) = slim.stream.places(slim.embed(pictures(slim, 1).to(dtype)))
    assert places.tolist() == [[0, *range(1, 256)]]


def channels(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(0, size - 1), min_size=1).map(lambda kept: tuple(sorted(kept)))


@st.composite
def choices(draw: st.DrawFn) -> ChannelChoice:
    """Some heads, with equally many pairs and values in each."""
    heads = draw(channels(HEADS))
    pairs, values = draw(st.integers(1, HEAD_DIM // 2)), draw(st.integers(1, HEAD_DIM))

    def some(size: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(draw(st.permutations(range(size)))[:count]))

    return ChannelChoice(
        heads,
        tuple(whole_pairs(some(HEAD_DIM // 2, pairs), HEAD_DIM) for _ in heads),
        tuple(some(HEAD_DIM, values) for _ in heads),
        draw(channels(HIDDEN)),
    )


def masked(block: SlimBlock, choice: ChannelChoice) -> SlimBlock:
    """A copy at its full size, what is outside `choice` set to zero; heads that are gone have no say about tokens."""
    block = copy.deepcopy(block)
    pairs = [h * HEAD_DIM + i for h, kept in zip(choice.heads, choice.query_key, strict=True) for i in kept]
    values = [h * HEAD_DIM + i for h, kept in zip(choice.heads, choice.value, strict=True) for i in kept]
    layers = (
        (block.attn.query, pairs),
        (block.attn.key, pairs),
        (block.attn.value, values),
        *((layer, choice.hidden) for layer in block.mlp.first.values()),
    )
    for layer, kept in layers:
        gone = [row for row in range(layer.out_features) if row not in set(kept)]
        layer.weight[gone] = 0
        if layer.bias is not None:
            layer.bias[gone] = 0
    scores = block.scores

    def of_kept_heads(x: Tensor, weights: Tensor | None) -> Tensor:
        assert weights is not None
        return scores(x, weights[:, list(choice.heads)])

    block.scores = of_kept_heads  # type: ignore[method-assign]
    return block


@given(
    st.sampled_from(list(ROTARY)), choices(), choices(), st.integers(1, 16), st.integers(1, 16), st.integers(0, 10_000)
)
@torch.no_grad()
def test_slim_is_masked_dense(
    make_vit: MakeViT, family: str, first: ChannelChoice, second: ChannelChoice, keep: int, last: int, seed: int
) -> None:
    """Pairs, values, hidden channels, heads and tokens, in FP64."""
    slim = SlimViT.from_timm(rotary_vit(family, make_vit, seed=seed)).double()
    slim.set_keep(0, keep)
    slim.set_keep(1, min(keep, last))
    expected = copy.deepcopy(slim)
    expected.vit.blocks = nn.Sequential(*(masked(b, c) for b, c in zip(slim.blocks, (first, second), strict=True)))
    for block, choice in zip(slim.blocks, (first, second), strict=True):
        remove_channels(block, choice)
    assert slim.architecture.blocks == (first.shape(keep), second.shape(min(keep, last)))
    images = pictures(slim).double()
    torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)


@torch.no_grad()
def test_removing_again(make_vit: MakeViT) -> None:
    """Which pairs are left is told of the dense model's, however often a block is cut."""
    block = SlimViT.from_timm(rotary_vit("DINOv3", make_vit)).blocks[0]
    values, hidden = (tuple(range(HEAD_DIM)),) * 2, tuple(range(HIDDEN))
    remove_channels(block, ChannelChoice((0, 2), ((0, 1, 3, 4, 5, 7), (1, 2, 3, 5, 6, 7)), values, hidden))
    assert block.attn.pairs.tolist() == [[0, 1, 3], [1, 2, 3]]
    remove_channels(block, ChannelChoice((1,), ((0, 2, 3, 5),), values[:1], hidden))
    assert block.attn.pairs.tolist() == [[1, 3]] and block.shape.qk_dim == 4


def test_a_lone_channel_is_refused(make_vit: MakeViT) -> None:
    block = SlimViT.from_timm(rotary_vit("DINOv3", make_vit)).blocks[0]
    for kept in ((0, 1, 4), (0, 1, 4, 6), (0, 1)):
        with pytest.raises(ValueError, match="one cannot stay without the other"):
            remove_channels(block, ChannelChoice((0,), (kept,), ((0,),), (0,)))
    assert block.shape.qk_dim == HEAD_DIM


def test_tables_of_odd_heads_are_refused(make_vit: MakeViT) -> None:
    architecture = SlimViT.from_timm(rotary_vit("DINOv3", make_vit)).architecture
    thin = architecture.blocks[1].model_copy(update={"qk_dim": 5})
    with pytest.raises(InputError, match="block 1: qk_dim is 5, but Eva has rotary positions, which turn"):
        check_blocks((architecture.blocks[0], thin), architecture.dense)


@families
def test_lfs_scores_pairs(family: str, make_vit: MakeViT) -> None:
    """By its definition: of both queries and both keys of a pair, the gradient of the loss times the weight."""
    slim = SlimViT.from_timm(rotary_vit(family, make_vit))
    images, labels = pictures(slim, 4), torch.tensor([0, 1, 2, 3])
    scores = low_frequency_sensitivity(slim, [(images, labels)], 1, cutoff=0.2, weight=0.3)
    with torch.no_grad():
        wanted = slim.summary(slim.vit.blocks(slim.embed(images)))
    assert wanted.shape == (4, 24)
    leaving = slim.vit.blocks(slim.embed(lowpass_images(images, 0.2)))
    loss = sensitivity_loss(slim.classify(leaving), labels, wanted, slim.summary(leaving), 0.3)
    attention = slim.blocks[1].attn
    layers = [attention.query, attention.key]
    gradients = torch.autograd.grad(loss, [layer.weight for layer in layers])
    rows = sum((g * layer.weight.detach()).square().sum(1) for g, layer in zip(gradients, layers, strict=True))
    assert isinstance(rows, Tensor)
    by_head = rows.unflatten(0, (HEADS, HEAD_DIM))
    assert scores.query_key.shape == (HEADS, HEAD_DIM // 2) and scores.step == 2
    torch.testing.assert_close(scores.query_key, by_head[:, :4] + by_head[:, 4:], rtol=1e-4, atol=1e-9)


def drawn_scores(seed: int) -> ChannelScores:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, HEAD_DIM // 2), (HEADS, HEAD_DIM), (HIDDEN,))
    pairs, values, hidden = (torch.rand(size, generator=generator) for size in sizes)
    return ChannelScores(pairs, values, hidden, step=2)


@given(st.integers(0, 10_000), st.data())
def test_choices_keep_pairs_whole(seed: int, data: st.DataObject) -> None:
    scores = drawn_scores(seed)
    assert scores.rows == 3 * HEADS * HEAD_DIM + HIDDEN and scores.qk_dim == HEAD_DIM
    choice = choose_channels(scores, data.draw(st.integers(0, scores.rows - 1)))
    shape = choice.shape(16)
    assert shape.qk_dim % 2 == 0
    for head, kept in zip(choice.heads, choice.query_key, strict=True):
        best = scores.query_key[head].topk(shape.qk_dim // 2).indices.sort().values
        assert pairs_of(kept, HEAD_DIM) == tuple(best.tolist())
    assert choose_for_shape(scores, shape).shape(16) == shape


def test_shapes_of_lone_channels_are_not_chosen() -> None:
    shape = BlockShape(heads=2, qk_dim=3, v_dim=3, hidden=4, keep=16)
    with pytest.raises(ValueError, match="by pairs: 3 cannot stay"):
        choose_for_shape(drawn_scores(0), shape)


def test_the_table_by_hand() -> None:
    """Two rows of three columns behind a prefix token: rows turn the first half of the pairs, or the second."""
    rotary = Rotary(temperature=100, step=(0.5, 2), offset=(0, 1))
    cosine, sine = rotary_table(rotary, (2, 3), 4, num_prefix_tokens=1)
    angles = torch.tensor([0.5 * 1, 0.5 * 1 / 10, 2 * 3, 2 * 3 / 10])  # row 1, column 2
    torch.testing.assert_close(cosine[6], angles.cos())
    torch.testing.assert_close(sine[6], angles.sin())
    assert bool((cosine[0] == 1).all()) and bool((sine[0] == 0).all())
    swapped = rotary_table(rotary.model_copy(update={"columns_first": True}), (2, 3), 4, 1)
    assert torch.equal(swapped[..., :2], torch.stack([cosine, sine])[..., 2:])
    turned = rotate(torch.tensor([1.0, 0, 0, 1]), torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6]))
    torch.testing.assert_close(turned, torch.tensor([0.6, -0.6, 0.8, 0.8]))
    with pytest.raises(ValueError, match="cannot be shared"):
        rotary_table(rotary, (2, 3), 3)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "SwiGLU with a norm, EVA-02 Base": ({"swiglu_mlp": True, "scale_mlp": True}, "norms inside attention or MLP"),
    "mixed": ({"rope_type": "mixed", "rope_rotate_half": False}, "learned, of each block and head"),
    "M-RoPE": ({"rope_type": "mrope"}, r"of another kind \(RotaryEmbeddingMRope\)"),
    "normalised queries": ({"qk_norm": True}, "are normalised, or its output gated"),
    "a norm inside attention": ({"scale_attn_inner": True}, "norms inside attention or MLP"),
    "a norm inside the MLP": ({"scale_mlp": True}, "norms inside attention or MLP"),
    "attention pooling": ({"global_pool": "map"}, "reads out by attention pooling"),
    "other pooling": ({"global_pool": "avgmax"}, "'avgmax' pooling"),
    "no classifier": ({"num_classes": 0}, "no classifier"),
    "one output": ({"num_classes": 1}, "one output"),
    "shared keys": ({"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1}, "share a key and a value"),
    "norms behind": ({"use_post_norm": True}, "norms are behind attention and MLP"),
    "attention alone scaled": ({"attn_only_layer_scale": True}, "not both scaled"),
    "norms before and behind the pool": ({"use_fc_norm": True, "use_post_transformer_norm": True}, "and one behind"),
    "an image cut short": ({"img_size": 18, "dynamic_img_size": False}, "patch"),
    "a huge image": ({"img_size": (1028, 4)}, "more than 256 rows"),
    "odd halves": ({"embed_dim": 30}, "whole pairs on both axes"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_others_are_refused_by_name(changes: dict[str, Any], reason: str, make_vit: MakeViT) -> None:
    model = rotary_vit("DINOv3", make_vit, **changes)
    with pytest.raises(InputError, match=f"^Eva is not a plain ViT: .*{reason}.*; use one such as"):
        SlimViT.from_timm(model)


def test_what_nobody_knows_is_refused(make_vit: MakeViT) -> None:
    def refused(change: Any, reason: str) -> None:
        model = rotary_vit("DINOv3", make_vit)
        change(model)
        with pytest.raises(InputError, match=reason):
            SlimViT.from_timm(model)

    refused(lambda m: setattr(m.blocks[1].attn, "gate", nn.Linear(24, 24)), "its output gated")
    refused(lambda m: m.blocks[1].add_module("adapter", nn.Linear(24, 24)), r"not all alike")
    refused(lambda m: [b.add_module("adapter", nn.Linear(2, 2)) for b in m.blocks], r"blocks\.0\.adapter")
    refused(lambda m: m.register_parameter("prompt", nn.Parameter(torch.zeros(1))), r"does not know \(prompt\)")
    refused(lambda m: setattr(m.blocks[1].mlp, "act", nn.ReLU()), "neither two linear layers with a GELU or SiLU")
    refused(lambda m: setattr(m.blocks[1].mlp, "fc2", nn.Linear(96, 24, bias=False)), "with biases")
    refused(lambda m: setattr(m.blocks[1], "mlp", GatedMlp(24, 96)), "nor a gated one")
    refused(lambda m: setattr(m.rope, "normalize_coords", "max"), "of another kind")
    refused(lambda m: setattr(m.rope, "temperature", None), "of another kind")
    refused(lambda m: m.rope.periods.mul_(1.1), "not what their settings say")
    refused(lambda m: [setattr(b.attn, "rotate_half", False) for b in m.blocks], "not what their settings say")


def test_positions_of_one_kind_alone_are_still_no_plain_vit() -> None:
    model = Eva(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=5)
    with pytest.raises(InputError, match="is a Eva, not a plain ViT"):
        SlimViT.from_timm(model)


def test_saved_and_loaded(make_vit: MakeViT, tmp_path: Path) -> None:
    """Which pairs are left is part of the weights; the table follows from the architecture."""
    slim = SlimViT.from_timm(rotary_vit("RoPE-ViT", make_vit))
    values, hidden = (tuple(range(5)),) * 2, tuple(range(0, HIDDEN, 2))
    for block in slim.blocks:
        remove_channels(block, ChannelChoice((0, 2), ((0, 3, 4, 7), (1, 2, 5, 6)), values, hidden))
    slim.set_keep(0, 9)
    slim.save(tmp_path)
    again = SlimViT.load(tmp_path)
    assert again.architecture == slim.architecture
    assert [block.attn.pairs.tolist() for block in again.blocks] == [[[0, 3], [1, 2]]] * 2
    images = pictures(slim)
    with torch.no_grad():
        assert torch.equal(again(images), slim(images))


@pytest.mark.parametrize("size", [None, "48", "16x40"])
def test_loaded_by_name_at_any_size(size: str | None, tmp_path: Path) -> None:
    """Weights under `Eva`'s names, in a file of its own; the angles are those that timm has for the size."""
    torch.manual_seed(0)
    dense = timm.create_model("tiny_dinov3").eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file({name: tensor.contiguous() for name, tensor in dense.state_dict().items()}, tmp_path / "w.safetensors")
    slim = SlimViT.from_timm(load_model("tiny_dinov3", tmp_path / "w.safetensors", img_size=size))
    assert slim.architecture.dense.img_size == {None: (32, 32), "48": (48, 48), "16x40": (16, 40)}[size]
    images = pictures(slim)
    with torch.no_grad():
        torch.testing.assert_close(slim(images), dense(images), rtol=0, atol=1e-5)  # it takes any size


def test_tokens_are_shown(make_vit: MakeViT) -> None:
    slim = SlimViT.from_timm(rotary_vit("RoPE-ViT", make_vit))
    slim.set_keep(0, 7)
    ((block, mask),) = kept_tokens(slim, pictures(slim))
    (places,) = slim.stream.places(slim.blocks[0](slim.embed(pictures(slim))))
    assert block == 0 and mask.nonzero()[:, 1].view(3, 7).tolist() == (places[:, 1:] - 1).tolist()


@pytest.mark.slow
def test_the_models_of_timm_that_are_accepted() -> None:
    count, reasons = refused_rotary()
    accepted = count - sum(map(len, reasons.values()))
    print(f"accepted: {accepted} of {count}", *reasons.items(), sep="\n")
    assert count >= 60 and accepted >= 27
    assert rotary_agrees()
