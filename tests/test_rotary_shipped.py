"""Rotary models searched, exported, built and run."""

import copy
import json
import logging
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from command_line import answer
from conftest import MakeViT
from families import ROTARY
from marks import few
from safetensors.torch import save_file
from test_rotary import families, pictures, rotary_vit
from torch import Tensor

import lowpass.benchmarks.latency.target
from lowpass.benchmarks.peers.corp import prune_by_corp
from lowpass.benchmarks.peers.evit import evit
from lowpass.cli import main
from lowpass.export.batch import BatchProfile
from lowpass.export.graph.bias_free import drop_biases
from lowpass.export.graph.deployable import deployable
from lowpass.export.graph.keep_fp32 import kept_layers
from lowpass.export.graph.last_block import LastBlock, LastProducts
from lowpass.export.onnx.opset import at_opset
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.engine import compile_engine
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.openvino import OpenVino
from lowpass.export.runtimes.session import logits_of
from lowpass.export.tensorrt.layers import read_layers
from lowpass.export.torch_program import serialise
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.method.sensitivity import ChannelCriterion
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.channel_criteria import CHANNEL_CRITERIA, CriterionContext
from lowpass.pipeline.search.latency_table import LatencyTable
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.log_entries import ChannelDecision
from lowpass.pipeline.search.search import search
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.shaping import AS_PUBLISHED, SHAPINGS
from lowpass.pipeline.search.target import REFUSED_BEYOND

WHOLE_HEADS = SHAPINGS["tensorrt"].model_copy(update={"align": 8, "token_stages": 1})
HALVES = ((0, 1, 4, 7, 8, 9, 12, 15), (0, 2, 3, 5, 8, 10, 11, 13))  # other pairs in each head of 16


def slim_of(family: str, make_vit: MakeViT, score: Any = "cls", **changes: Any) -> SlimViT:
    """With heads of 16 channels: TensorRT fuses none of 8."""
    return SlimViT.from_timm(rotary_vit(family, make_vit, embed_dim=48, **changes), token_score=score)


def cut(slim: SlimViT) -> SlimViT:
    """Both blocks thinned, other pairs in each head, and tokens dropped in both."""
    slim = copy.deepcopy(slim)
    for block in slim.blocks:
        values = (tuple(range(0, 16, 2)), tuple(range(8)))
        remove_channels(block, ChannelChoice((0, 2), HALVES, values, tuple(range(0, 192, 3))))
    slim.set_keep(0, 12)
    slim.set_keep(1, 9)
    return slim


def searched(slim: SlimViT, folder: Path, **settings: Any) -> list[Any]:
    images = pictures(slim, 24)
    with torch.no_grad():
        labels = slim(images).argmax(1)
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    entries: list[Any] = []
    search(slim, batches, batches, SearchSettings(**settings, batch_size=8), folder, SearchLog([], entries.append))
    with torch.no_grad():
        assert slim(images).isfinite().all()
        slim.save(folder)
        assert torch.equal(SlimViT.load(folder)(images), slim.eval()(images))
    return entries


@families
def test_a_search_goes_through(family: str, make_vit: MakeViT, tmp_path: Path) -> None:
    slim = slim_of(family, make_vit)
    whole = slim.architecture.macs()
    searched(slim, tmp_path, target_macs=0.6, shaping=WHOLE_HEADS)
    assert 0.5 < slim.architecture.macs() / whole <= 0.6


@pytest.mark.parametrize("criterion", get_args(ChannelCriterion))
@pytest.mark.parametrize(
    "how",
    [
        {"target_macs": 0.4, "shaping": AS_PUBLISHED},
        {"target_macs": 0.4, "shaping": AS_PUBLISHED, "order": "top-down"},
        {"target_macs": 0.4, "shaping": AS_PUBLISHED, "order": "one-shot", "recovery": False},
        {"allowable_drop": 30, "shaping": AS_PUBLISHED},
        {"allowable_drop": 30, "shaping": WHOLE_HEADS},
    ],
    ids=["target", "top-down", "one-shot", "drop", "drop, whole heads"],
)
def test_every_criterion_leaves_pairs_whole(
    how: dict[str, Any], criterion: ChannelCriterion, make_vit: MakeViT, tmp_path: Path
) -> None:
    slim = slim_of("DINOv3 with biases, reads CLS", make_vit)
    searched(slim, tmp_path, channel_criterion=criterion, **how)
    assert (
        slim.architecture.macs()
        < slim.architecture.model_copy(update={"blocks": slim.architecture.dense.blocks()}).macs()
    )
    for block in slim.blocks:
        heads, pairs = block.attn.pairs.shape
        assert (heads, 2 * pairs) == (block.attn.num_heads, block.attn.qk_dim)
        assert all(sorted(set(row)) == row and row[-1] < 8 for row in block.attn.pairs.tolist())


def test_queries_and_keys_are_not_refitted(make_vit: MakeViT, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their refit knows of no places; it says so, and the others are made."""
    slim = slim_of("DINOv3 with biases, reads CLS", make_vit)
    with caplog.at_level(logging.INFO, logger="lowpass"):
        entries = searched(slim, tmp_path, target_macs=0.3, shaping=AS_PUBLISHED, prune="channels")
    assert any(block.attn.qk_dim < 16 for block in slim.blocks)
    refitted = {refit.layer for entry in entries if isinstance(entry, ChannelDecision) for refit in entry.refits}
    assert "query/key" not in refitted and {"attn.proj", "mlp.fc2"} <= refitted
    assert "stay as they are, for positions are rotary" in caplog.text


def test_obs_scores_what_a_pair_adds_to_the_logits(make_vit: MakeViT) -> None:
    """One that adds nothing goes first, though the other of its channels alone is large."""
    slim = slim_of("RoPE-ViT", make_vit)
    attention = slim.blocks[0].attn
    with torch.no_grad():
        for channel in (16 + 3, 16 + 3 + 8):
            attention.query.weight[channel], attention.query.bias[channel] = 0, 0
            attention.key.weight[channel] *= 10
        tokens = slim.embed(pictures(slim, 12))
    scores = CHANNEL_CRITERIA["obs"](slim, [(tokens, tokens, tokens)], 0, CriterionContext())
    assert scores.query_key.shape == (3, 8) and scores.step == 2 and bool(scores.query_key.isfinite().all())
    assert int(scores.query_key[1].argmin()) == 3
    assert scores.query_key[1].topk(2, largest=False).values.diff().abs() > 1e-3


def without_ties(model: SlimViT, images: Tensor) -> Tensor:
    """The first three for whom the last token kept and the first dropped are apart by what FP16 tells apart."""
    clear = torch.ones(len(images), dtype=torch.bool)
    with torch.no_grad():
        stream = model.embed(images)
        for block in model.blocks:
            mixed = block.mix(stream)
            if block.scores_tokens:
                scores = block.scores(*mixed).sort(1, descending=True).values
                clear &= (scores[:, block.keep - 1] - scores[:, block.keep]) > 2e-3 * scores[:, 0]
            stream = block.feed(block.select(*mixed))
    assert clear.sum() >= 3
    return images[clear][:3]


@pytest.mark.parametrize("family", few(ROTARY, "DINOv3", "EVA-02: SwiGLU"))
@pytest.mark.parametrize("score", ["cls", "full"])
def test_exports_run(family: str, score: Any, make_vit: MakeViT) -> None:
    dense = slim_of(family, make_vit, score)
    tolerances: dict[Precision, float] = {"fp32": 1e-5, "fp16": 0.01}
    for model in (dense, cut(dense)):
        images = without_ties(model, pictures(model, 12))
        with torch.no_grad():
            wanted = model(images).numpy()
            np.testing.assert_allclose(deployable(model)(images).numpy(), wanted, atol=1e-5)
            narrow = deployable(model, "bf16")(images).numpy()  # which ONNX Runtime does not run on a CPU
            assert np.median(np.abs(narrow - wanted)) < 0.02 * np.abs(wanted).max()  # of near ties, other tokens stay
        for precision, tolerance in tolerances.items():
            traced = to_onnx(model, ExportOptions(precision=precision))
            found = logits_of(OnnxRuntime(traced.SerializeToString()), images.numpy())
            np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())
            if precision == "fp32":
                oldest = at_opset(traced, 17).SerializeToString()
                np.testing.assert_allclose(logits_of(OnnxRuntime(oldest), images.numpy()), wanted, atol=1e-5)
                found = logits_of(OpenVino(traced.SerializeToString(), "fp32"), images.numpy())
                np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["DINOv3", "DINOv3 with biases, reads CLS"])
def test_engines_fuse_attention(family: str, make_vit: MakeViT) -> None:
    """That of every block but the last where CLS alone is read: it is written out, one row of it. Where the mean is
    read, tokens are scored by the whole matrix, which is written out, too."""
    profile = BatchProfile.parse("4:4:4")
    dense = slim_of(family, make_vit, depth=4)
    reads_mean = dense.architecture.dense.mean_readout
    thin = copy.deepcopy(dense)
    for block in thin.blocks:
        remove_channels(block, ChannelChoice((0, 2), HALVES, HALVES, tuple(range(0, 192, 3))))
    thin.set_keep(1, 9)
    for model, fused in ((dense, 4 if reads_mean else 3), (thin, 3)):
        traced = to_onnx(model, ExportOptions(precision="fp16"))
        engine = compile_engine("tensorrt-rtx", traced.SerializeToString(), profile)
        (layers,) = read_layers(engine.log, traced, profile)
        assert engine.plan and sum(kernel.is_attention for kernel in layers.kernels) == fused
        if model is dense:  # norm, product, turning, attention, what it leaves in rows, projection, norm and two layers
            assert next(total.kernels for total in layers.blocks if total.block == 1) <= 9


@torch.no_grad()
def test_thin_heads_share_a_table_where_their_pairs_are_the_same(make_vit: MakeViT) -> None:
    slim = cut(slim_of("DINOv3", make_vit))
    tables = [block.attn.turning.table for block in deployable(slim, "fp32").blocks]  # type: ignore[union-attr]
    assert [tuple(table.shape) for table in tables] == [(20, 2, 8)] * 2
    tables = [block.attn.turning.table for block in deployable(slim_of("DINOv3", make_vit)).blocks]  # type: ignore
    assert [tuple(table.shape) for table in tables] == [(20, 1, 16)] * 2


@families
@torch.no_grad()
def test_biases_go_and_nothing_changes(family: str, make_vit: MakeViT) -> None:
    """In FP64. A key's bias is turned as its key is, and has to be made up for."""
    block = slim_of(family, make_vit).double().blocks[0]
    slim = slim_of(family, make_vit).double()
    tokens = slim.embed(pictures(slim).double())
    without = copy.deepcopy(block)
    drop_biases(without)
    assert all(layer.bias is None for layer in (without.attn.query, without.attn.key, without.attn.value))
    torch.testing.assert_close(without(tokens), block(tokens), atol=1e-10, rtol=1e-10)


def test_the_last_block_is_exact(make_vit: MakeViT) -> None:
    """It turns keys alone: the classifier reads CLS, whose query is not turned."""
    slim = slim_of("RoPE-ViT", make_vit)
    slim.set_keep(0, 7)
    for products in get_args(LastProducts):
        last = LastBlock(copy.deepcopy(slim.blocks[1]), 1, products)
        with torch.no_grad():
            entering = slim.blocks[0](slim.embed(pictures(slim)))
            wanted = slim.stream.tokens(slim.blocks[1](entering))[:, :1]
            torch.testing.assert_close(last(entering), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["DINOv3", "RoPE-ViT with learned positions"])
def test_layers_kept_in_fp32(family: str, make_vit: MakeViT) -> None:
    """Angles of an attention that is kept are FP32, too: all kept is as good as FP32 but for the stream."""
    slim = cut(slim_of(family, make_vit))
    images = pictures(slim, 8)
    every = kept_layers((f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv", "mlp.fc1", "mlp.fc2")), 2)
    with torch.inference_mode():
        exact = slim(images)
        off = [float((deployable(slim, "fp16", kept=kept)(images) - exact).abs().median()) for kept in ((), every)]
    assert 0 < off[1] < 2 * off[0]
    model: Any = deployable(slim, "fp16", kept=every)
    table: Tensor = model.model.blocks[0].attn.attention.table
    assert table.dtype == torch.float32 and torch.equal(table, slim.blocks[0].attn.table)


def test_a_program_has_any_batch(make_vit: MakeViT, tmp_path: Path) -> None:
    slim = cut(slim_of("RoPE-ViT", make_vit)).requires_grad_(False)
    (tmp_path / "model.pt2").write_bytes(serialise(slim, "hash"))
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 5):
        torch.testing.assert_close(program(pictures(slim, count)), slim(pictures(slim, count)), atol=1e-6, rtol=0)


def test_what_does_not_take_them_says_so(make_vit: MakeViT) -> None:
    vit = rotary_vit("RoPE-ViT", make_vit)
    slim = SlimViT.from_timm(vit)
    with pytest.raises(InputError, match="onehot is not there for rotary positions"):
        deployable(slim, selection="onehot")
    with pytest.raises(InputError, match="has rotary positions, which CORP is not defined for"):
        prune_by_corp(slim, [pictures(slim)], 0.5)
    with pytest.raises(InputError, match="has rotary positions; the rivals take"):
        evit(vit, 0.7)


@pytest.mark.slow
def test_from_the_command_to_an_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens dropped and heads thinned, trained, in every precision, built; weights under the names of `Eva`. Then to a
    latency, planned by what its parts take."""
    torch.manual_seed(0)
    dense = timm.create_model("tiny_dinov3")
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights, table, run = tmp_path / "w.safetensors", tmp_path / "table.json", str(tmp_path / "run")
    save_file({name: tensor.contiguous() for name, tensor in dense.state_dict().items()}, weights)
    blocks = [
        {"heads": 3, "qk_dim": 12, "v_dim": 12, "hidden": 144, "keep": 64},
        {"heads": 2, "qk_dim": 8, "v_dim": 10, "hidden": 100, "keep": 40},
        {"heads": 3, "qk_dim": 6, "v_dim": 12, "hidden": 120, "keep": 30},
    ]
    table.write_text(json.dumps({"blocks": blocks}))
    few = ("--score-images", "64", "--measure-images", "64", "--yes")
    source = ("--model", "tiny_dinov3", "--weights", str(weights), "--data", "digits")
    answer(capsys, "compress", *source, "--architecture", str(table), *few, "--out", run)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        kept = SlimViT.load(run, "dense.safetensors")
        torch.testing.assert_close(kept(images), dense.eval()(images), rtol=0, atol=1e-5)
    answer(capsys, "finetune", run, "--epochs", "1")
    assert [block.shape.model_dump() for block in SlimViT.load(run).blocks] == blocks
    for precision in get_args(Precision):
        told = answer(capsys, "export", run, "--precision", precision, "--batch", "1:2:4")
        assert told["same_top1"] >= 97, precision
    built = answer(capsys, "build", run, "--precision", "fp16", "--runtime", "tensorrt-rtx")
    assert Path(built["plan"]).stat().st_size > 1e5
    there = ("--runtime", "onnxruntime", "--batch", "2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = LatencyTable.model_validate(answer(capsys, "profile", "--model", "tiny_dinov3", *there))
    assert table.tokens[-1] == 67 and table.dense.rotary is not None

    def by_macs(slim: Architecture, dense: Architecture, *_: object) -> tuple[float, float]:
        return 1.0, dense.macs() / slim.macs()

    # A busy machine's clock is no test, and the plan is by a table of it.
    monkeypatch.setattr(lowpass.benchmarks.latency.target, "against_dense", by_macs)
    told = answer(capsys, "compress", *source, "--target-latency", "0.6", *there, *few, "--out", f"{run}-2")
    assert 0.3 < told["slim"]["macs"] / told["dense"]["macs"] <= 0.6 * (1 + REFUSED_BEYOND)
    with pytest.raises(SystemExit) as stop:
        main(["compress", *source, "--target-latency", "0.001", *there, *few, "--out", f"{run}-3"])
    assert stop.value.code == 2 and "out of reach" in capsys.readouterr().err.splitlines()[-1]
