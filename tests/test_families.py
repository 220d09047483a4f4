"""Every family of plain ViTs: exact while nothing is removed, cut like any other, exported and built."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeViT
from families import FAMILIES, pretrained_classifiers, refused
from marks import few
from torch import nn
from what_loads import DOCUMENT, agrees

from lowpass.export.batch import BatchProfile
from lowpass.export.graph.deployable import deployable
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.engine import compile_engine
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.session import logits_of
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.method.energy import low_frequency_energy
from lowpass.pipeline.method.frequency import lowpass_images
from lowpass.pipeline.method.sensitivity import sensitivity_loss
from lowpass.pipeline.model.architecture import check_blocks
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.channel_criteria import low_frequency_sensitivity
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.search import search
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.shaping import SHAPINGS

families = pytest.mark.parametrize("family", FAMILIES)
EXPORTED = ("DeiT distilled", "averages, no CLS", "SwiGLU, gate and value in one layer")  # by `make test`


def dense_of(family: str, make_vit: MakeViT, **changes: Any) -> nn.Module:
    return make_vit(**(FAMILIES[family][0] | changes))


def pictures(model: SlimViT, count: int = 3) -> torch.Tensor:
    dense = model.architecture.dense
    return torch.randn(count, dense.in_chans, *dense.img_size, generator=torch.Generator().manual_seed(1))


def whole_heads(slim: SlimViT) -> ChannelChoice:
    """Two of the three heads, and two thirds of the hidden channels."""
    shape = slim.blocks[0].shape
    every = (tuple(range(shape.qk_dim)),) * 2
    return ChannelChoice((0, 2), every, every, tuple(range(0, shape.hidden, 3)) + tuple(range(1, shape.hidden, 3)))


def cut(slim: SlimViT) -> SlimViT:
    """Both blocks cut to `whole_heads`, and tokens dropped in both."""
    choice = whole_heads(slim)
    choice = ChannelChoice(choice.heads, choice.query_key, choice.value, tuple(sorted(choice.hidden)))
    slim = copy.deepcopy(slim)
    for block in slim.blocks:
        remove_channels(block, choice)
    slim.set_keep(0, 12)
    slim.set_keep(1, 9)
    return slim


@families
@torch.no_grad()
def test_nothing_removed_is_the_dense_model(family: str, make_vit: MakeViT) -> None:
    dense = dense_of(family, make_vit)
    slim = SlimViT.from_timm(dense)
    images = pictures(slim)
    torch.testing.assert_close(slim(images), dense(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(slim.classify(slim.vit.blocks(slim.embed(images))), dense(images), rtol=0, atol=1e-5)


@families
@torch.no_grad()
def test_what_is_removed_is_zero_in_the_dense_model(family: str, make_vit: MakeViT) -> None:
    """A head that is gone and a hidden channel that is gone leave what their zeros would; a norm over them is one over
    those that stay."""
    slim = SlimViT.from_timm(dense_of(family, make_vit))
    small, described = cut(slim), slim.architecture.dense
    assert [block.shape.heads for block in small.blocks] == [2, 2]
    assert small.architecture.macs() < slim.architecture.macs()
    slim.set_keep(0, 12)
    slim.set_keep(1, 9)
    gone = [channel for channel in range(described.hidden) if channel % 3 == 2]
    head_dim = described.embed_dim // described.num_heads
    head = slice(head_dim, 2 * head_dim)
    for block in slim.blocks:
        if described.attn_norm:
            block.attn.norm = Without(block.attn.norm, list(range(head.start, head.stop)))
        if described.mlp_norm:
            block.mlp.norm = Without(block.mlp.norm, gone)
        block.attn.proj.weight[:, head] = 0
        block.mlp.fc2.weight[:, gone] = 0
    images = pictures(slim)
    if any(block.reads_attention for block in slim.blocks):  # heads that are gone must not be asked about tokens
        for block in slim.blocks:
            block.scores = fewer_heads(block.scores)  # type: ignore[method-assign]
    torch.testing.assert_close(small(images), slim(images), rtol=0, atol=1e-5)


class Without(nn.Module):
    """A norm over all channels but some."""

    def __init__(self, norm: nn.Module, gone: list[int]) -> None:
        super().__init__()
        assert isinstance(norm, nn.LayerNorm)
        self.norm, self.kept = norm, [i for i in range(norm.normalized_shape[0]) if i not in set(gone)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, norm = self.kept, self.norm
        part = nn.functional.layer_norm(x[..., kept], (len(kept),), norm.weight[kept], norm.bias[kept], norm.eps)
        whole = torch.zeros_like(x)
        whole[..., kept] = part
        return whole


def fewer_heads(scores: Any) -> Any:
    return lambda x, weights: scores(x, weights[:, [0, 2]])


@families
@torch.no_grad()
def test_tokens_are_scored_by_what_the_classifier_reads(family: str, make_vit: MakeViT) -> None:
    slim = SlimViT.from_timm(dense_of(family, make_vit), token_score="cls")
    dense, block = slim.architecture.dense, slim.blocks[0]
    slim.set_keep(0, 5)
    x, prefix = slim.embed(pictures(slim)), slim.architecture.dense.num_prefix_tokens
    mixed, weights = block.mix(x)
    assert weights is not None
    _, matrix = block.attn(block.norm1(x), "full")
    assert matrix is not None
    if dense.global_pool in ("avg", "map"):
        attended = matrix[:, :, prefix:, prefix:].mean((1, 2))
        summary = x[:, prefix:].mean(1)
    else:
        attended, summary = matrix[:, :, 0, prefix:].mean(1), x[:, 0]
    wanted = attended * low_frequency_energy(mixed[:, prefix:], 0.85)
    torch.testing.assert_close(block.scores(mixed, weights), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slim.summary(x), summary)


@families
def test_channels_are_scored(family: str, make_vit: MakeViT) -> None:
    """LFS by its definition: the gradient of one block's weights, for a batch. What a gated MLP multiplies shares a
    score, as a query and its key do."""
    slim = SlimViT.from_timm(dense_of(family, make_vit))
    images, labels = pictures(slim, 4), torch.tensor([0, 1, 2, 3])
    scores = low_frequency_sensitivity(slim, [(images, labels)], 1, cutoff=0.2, weight=0.3)
    low = slim.embed(lowpass_images(images, 0.2))
    with torch.no_grad():
        wanted = slim.summary(slim.vit.blocks(slim.embed(images)))
    leaving = slim.vit.blocks(low)
    loss = sensitivity_loss(slim.classify(leaving), labels, wanted, slim.summary(leaving), 0.3)
    mlp, gated = slim.blocks[1].mlp, slim.architecture.dense.gated
    weights = [mlp.fc1.weight] if mlp.gate is None else [mlp.fc1.weight, mlp.gate.weight]
    assert gated == (len(weights) == 2) == scores.gated == ("gated" in family or "SwiGLU" in family)
    rows = [(g * w.detach()).square().sum(1) for g, w in zip(torch.autograd.grad(loss, weights), weights, strict=True)]
    torch.testing.assert_close(scores.hidden, sum(rows[1:], rows[0]), rtol=1e-4, atol=1e-9)
    assert all(float(row.min()) > 0 for row in rows)


@families
def test_a_search_goes_through(family: str, make_vit: MakeViT, tmp_path: Any) -> None:
    slim = SlimViT.from_timm(dense_of(family, make_vit), token_score="cls")
    images = pictures(slim, 24)
    with torch.no_grad():
        labels = slim(images).argmax(1)
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    shaping = SHAPINGS["tensorrt"].model_copy(update={"align": 8, "token_stages": 1})
    settings = SearchSettings(target_macs=0.6, shaping=shaping, batch_size=8)
    whole = slim.architecture.macs()
    search(slim, batches, batches, settings, tmp_path, SearchLog([], lambda _: None))
    assert 0.5 < slim.architecture.macs() / whole <= 0.6
    assert slim(images).isfinite().all()
    slim.save(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(SlimViT.load(tmp_path)(images), slim.eval()(images))


@pytest.mark.parametrize("family", few(FAMILIES, *EXPORTED))
def test_exports_run_and_build(family: str, make_vit: MakeViT) -> None:
    """Heads of 16 channels: TensorRT fuses none of 8."""
    slim = SlimViT.from_timm(dense_of(family, make_vit, embed_dim=48), token_score="cls")
    tolerances: dict[Precision, float] = {"fp32": 1e-5, "fp16": 0.01}
    for model in (slim, cut(slim)):
        images = pictures(model)
        with torch.no_grad():
            wanted = model(images).numpy()
            np.testing.assert_allclose(deployable(model)(images).numpy(), wanted, atol=1e-5)
        for precision, tolerance in tolerances.items():
            content = to_onnx(model, ExportOptions(precision=precision)).SerializeToString()
            found = logits_of(OnnxRuntime(content), images.numpy())
            np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())
    assert compile_engine("tensorrt-rtx", content, BatchProfile.parse("1:2:4")).plan  # slim, FP16


def test_heads_of_differential_attention_go_whole(make_vit: MakeViT) -> None:
    architecture = SlimViT.from_timm(dense_of("differential attention", make_vit)).architecture
    thin = architecture.blocks[0].model_copy(update={"qk_dim": 4})
    with pytest.raises(InputError, match=r"block 0: .* has differential attention, whose heads cannot be thinned"):
        check_blocks((thin, *architecture.blocks[1:]), architecture.dense)


@pytest.mark.slow
def test_the_models_of_timm_that_are_accepted() -> None:
    """At least 205 of 210; what is refused is named with its reason."""
    count, reasons = refused()
    turned_away = {name: reason for reason, names in reasons.items() for name in names}
    print(f"accepted: {count - len(turned_away)} of {count}", *turned_away.items(), sep="\n")
    assert count == len(pretrained_classifiers()) >= 210
    assert len(turned_away) <= 5
    assert (
        f"{count} pretrained classifiers in its `vision_transformer` and `deit` files {count - len(turned_away)} are"
        in (DOCUMENT.read_text().replace("\n", " "))
    )
    assert all("side by side" in reason for name, reason in turned_away.items() if "dpwee" in name or "pwee" in name)


def test_the_table_of_what_loads_agrees() -> None:
    """Made of what the tests load: `python tests/what_loads.py`."""
    assert agrees()
