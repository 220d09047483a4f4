"""ONNX files and TensorRT engines of a real slim model: they agree with PyTorch, and attention fuses."""

import copy
import json
import re
from pathlib import Path
from typing import cast, get_args

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import MakeViT
from hypothesis import given
from hypothesis import strategies as st
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

import lowpass.export.graph.deployable
import lowpass.export.onnx.export
import lowpass.export.onnx.file
from lowpass.export.artefacts import open_session
from lowpass.export.batch import BatchProfile
from lowpass.export.graph.attention import FusedAttention, RowAttention
from lowpass.export.graph.bias_free import drop_biases
from lowpass.export.graph.cls_score import importance_by_sums
from lowpass.export.graph.deployable import deployable
from lowpass.export.graph.last_block import LastBlock, LastProducts
from lowpass.export.graph.precision import AtPrecision
from lowpass.export.graph.selection import SELECTIONS
from lowpass.export.onnx.export import export as export_verified
from lowpass.export.onnx.file import current_onnx, onnx_path, read_metadata, serialise
from lowpass.export.onnx.trace import FORBIDDEN, to_onnx, trace
from lowpass.export.onnx.verify import VERIFICATION_FILE
from lowpass.export.options import ExportOptions, Input, Precision, Selection
from lowpass.export.runtimes.registry import missing
from lowpass.export.runtimes.session import logits_of
from lowpass.export.tensorrt.plan import NO_GPU, build, current_plan, manifest_path
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.token_choices import TokenScore
from lowpass.pipeline.method.token_scores import cls_importance
from lowpass.pipeline.model.slim_block import SlimAttention
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.images import verification_batches

PROFILE = BatchProfile.parse("1:2:4")


def options(precision: Precision) -> ExportOptions:
    return ExportOptions(precision=precision, profile=PROFILE)


@pytest.fixture(scope="module")
def images(slim_run: Path) -> Batches:
    batches, made = verification_batches(slim_run, None)
    assert not made and sum(len(labels) for _, labels in batches) == 1000
    return batches


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dense", [False, True])
def test_agrees_with_pytorch_on_real_images(
    tuned_run: Path, images: Batches, precision: Precision, dense: bool
) -> None:
    done = export_verified(tuned_run, options(precision), images, dense=dense)
    assert done.runtime == ("openvino" if precision == "bf16" else "onnxruntime")
    assert done.images == 1000 and not done.made_images
    assert done.same_top1 == 100 if precision == "fp32" else done.same_top1 >= 99.5
    # In FP16 two tokens may tie, and the other of them stays: single logits can then move by much.
    assert done.largest_difference <= (1e-4 if precision == "fp32" else np.inf)
    noted = json.loads((tuned_run / VERIFICATION_FILE).read_text())
    assert noted[onnx_path(tuned_run, precision, dense).name]["same_top1"] == done.same_top1
    if precision == "bf16":
        return  # which ONNX Runtime lacks on a CPU
    # Once more without our own session or comparison.
    model = SlimViT.load(tuned_run, "dense.safetensors" if dense else "slim.safetensors")
    session = onnxruntime.InferenceSession(onnx_path(tuned_run, precision, dense), providers=["CPUExecutionProvider"])
    for batch in (images[0][0][:1], images[0][0][:7]):  # any batch size
        (logits,) = session.run(["logits"], {"images": batch.numpy()})
        with torch.inference_mode():
            difference = np.abs(logits - model(batch).numpy())
        assert difference.max() <= 1e-4 if precision == "fp32" else np.median(difference) <= 0.02


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("score", ["full", "cls"])
def test_graph(slim_run: Path, precision: Precision, score: TokenScore) -> None:
    slim = SlimViT.load(slim_run)
    slim = SlimViT(slim.architecture.model_copy(update={"token_score": score}))
    model = to_onnx(slim, options(precision))
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 23)}
    (source,), (sink,) = model.graph.input, model.graph.output
    assert (source.name, sink.name) == ("images", "logits")
    assert source.type.tensor_type.shape.dim[0].dim_param  # dynamic
    assert [d.dim_value for d in source.type.tensor_type.shape.dim][1:] == [3, 32, 32]
    kinds = [node.op_type for node in model.graph.node]
    assert not FORBIDDEN & set(kinds)
    scoring = sum(block.scores_tokens for block in slim.blocks[:-1])  # nobody reads what the last would keep
    assert 0 < scoring < len(slim.blocks)
    # The tokens that the last of them keeps need no order: no later low-pass runs along them.
    # Only the full score needs a whole attention matrix, and so the products and the softmax that make it; the last
    # block has those of CLS's row. For TensorRT the softmax of a row that scores is written as sums.
    assert kinds.count("Attention") == len(slim.blocks) - 1 - (scoring if score == "full" else 0)
    by_sums = scoring if precision == "fp16" and score == "cls" else 0
    assert kinds.count("Softmax") == scoring + 1 - by_sums and kinds.count("TopK") == 2 * scoring - 1
    # In FP32 attention reads rows as they are: heads are set apart where tokens are scored and in the last block alone.
    # Query, key and value are GEMMs of their own, with no Split behind them.
    assert kinds.count("Split") == 1  # the last block's is of key and value
    transposing = {int(n.name.split(".")[1]) for n in model.graph.node if re.match(r"blocks\..*Transpose", n.name)}
    choosing = [index for index, block in enumerate(slim.blocks) if block.scores_tokens]
    assert transposing == ({*choosing, 5} if precision == "fp32" else set(range(6)))
    # CLS's row and the kept rows where tokens are scored, and CLS for the head.
    assert kinds.count("Gather") + kinds.count("GatherElements") <= 2 * scoring + 1
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert any(node.name.startswith("blocks.0.mlp.fc1.") for node in model.graph.node)


@pytest.mark.slow
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("source", ["float32", "uint8"])
def test_every_lowering_and_input_agrees(tuned_run: Path, images: Batches, selection: Selection, source: Input) -> None:
    """FP32 to 1e-4 on 1,000 real images: one other token kept would move a logit by far more."""
    asked = ExportOptions(precision="fp32", profile=PROFILE, selection=selection, input=source)
    done = export_verified(tuned_run, asked, images)
    assert done.images == 1000 and done.same_top1 == 100 and done.largest_difference <= 1e-4
    written = read_metadata(onnx_path(tuned_run, "fp32"))
    assert (written["selection"], written["input"]) == (selection, source)
    if source == "uint8":  # once more by hand: what a client has in its hands
        pixels = np.rint((images[0][0][:5].numpy() * 0.5 + 0.5) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        session = onnxruntime.InferenceSession(onnx_path(tuned_run, "fp32"), providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"images": np.ascontiguousarray(pixels)})
        with torch.inference_mode():
            expected = SlimViT.load(tuned_run)((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


@pytest.mark.slow
def test_the_same_tokens_are_kept(tuned_run: Path, images: Batches) -> None:
    """Whichever lowering runs, in PyTorch or in a file: the score of every token and the rows that are passed on."""
    slim = SlimViT.load(tuned_run)
    scoring = [index for index, block in enumerate(slim.blocks[:-1]) if block.scores_tokens]
    assert len(scoring) >= 3

    class Kept(nn.Module):
        """The tokens that leave each block that drops some, one after the other: [B, all their channels]. Those of the
        last come in any order, and so sorted by channel."""

        def __init__(self, model: SlimViT) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            tokens, kept = self.model.embed(pixels), []
            for index, block in enumerate(self.model.blocks[: scoring[-1] + 1]):
                tokens = block(tokens)
                if index in scoring:
                    kept.append((tokens.sort(1).values if index == scoring[-1] else tokens).flatten(1))
            return torch.cat(kept, 1)

    def file_of(model: SlimViT) -> onnxruntime.InferenceSession:
        content = trace(Kept(model), torch.zeros(2, 3, 32, 32)).SerializeToString()
        return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    files = [(slim, file_of(cast(SlimViT, deployable(slim, selection=selection)))) for selection in SELECTIONS]
    # What TensorRT gets, with nothing but its weights rounded: the file scores by sums, PyTorch by a softmax.
    rounded = cast(SlimViT, cast(AtPrecision, deployable(slim, "fp16")).model.float())
    assert any(isinstance(block.attn, FusedAttention) and block.attn.gives_logits for block in rounded.blocks[:-1])
    files.append((rounded, file_of(rounded)))
    for batch, _ in images:
        for model, file in files:
            with torch.inference_mode():
                expected = Kept(model)(batch).numpy()
            (got,) = file.run(None, {"images": batch.numpy()})
            np.testing.assert_allclose(got, expected, atol=1e-4)


def test_metadata(slim_run: Path, images: Batches) -> None:
    export_verified(slim_run, options("fp32"), images[:1])
    written = read_metadata(onnx_path(slim_run, "fp32"))
    slim = SlimViT.load(slim_run)
    assert written["model"] == "digits_deit" and written["num_classes"] == "10" and written["batch"] == "1:2:4"
    assert json.loads(written["architecture"]) == json.loads(slim.architecture.model_dump_json())
    assert json.loads(written["preprocessing"])["mean"] == [0.5, 0.5, 0.5]
    assert json.loads(written["versions"])["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_same_weights_same_bytes(slim_run: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowpass.export.onnx.file, "to_onnx", to_onnx)  # traced anew, see `traces.py`
    assert serialise(slim_run, options(precision)) == serialise(slim_run, options(precision))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_file_that_disagrees_is_not_written(
    slim_run: Path, images: Batches, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = serialise(slim_run, options(precision), dense=True)  # a good model, but not this one
    path = onnx_path(slim_run, precision)
    path.unlink(missing_ok=True)
    monkeypatch.setattr(lowpass.export.onnx.export, "serialise", lambda *_: wrong)
    with pytest.raises(RunError, match="not written"):
        export_verified(slim_run, options(precision), images)
    assert not path.exists()


def test_a_stale_file_is_refused(slim_run: Path, images: Batches) -> None:
    export_verified(slim_run, options("fp32"), images[:1])
    weights = slim_run / "slim.safetensors"
    content = weights.read_bytes()
    slim = SlimViT.load(slim_run)
    with torch.no_grad():
        slim.vit.head.bias.add_(1)
    slim.save(slim_run)
    try:
        with pytest.raises(InputError, match=r"exported from other weights.*lowpass export"):
            current_onnx(slim_run, "fp32")
    finally:
        weights.write_bytes(content)
    assert current_onnx(slim_run, "fp32").exists()


@given(
    heads=st.integers(1, 4),
    qk_dim=st.integers(1, 20),
    v_dim=st.integers(1, 20),
    extra=st.integers(0, 9),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_deployed_attention_is_exact(heads: int, qk_dim: int, v_dim: int, extra: int, bias: bool, seed: int) -> None:
    """One GEMM, heads padded or not, and rows, where the biases of key and value are gone."""
    torch.manual_seed(seed)
    attention = SlimAttention(24, BlockShape(heads=heads, qk_dim=qk_dim, v_dim=v_dim, hidden=1, keep=1), 0.3, bias=bias)
    padded = FusedAttention(attention, max(qk_dim, v_dim) + extra)
    x = torch.randn(2, 5, 24)
    one = FusedAttention(attention, None, "one")
    heads_first = FusedAttention(attention, max(qk_dim, v_dim), "one, heads first")
    logits = FusedAttention(attention, max(qk_dim, v_dim), gives_logits=True)(x, "cls")[1]
    assert logits is not None
    torch.testing.assert_close(logits.softmax(-1), attention(x, "cls")[1], atol=1e-5, rtol=1e-5)
    for deployed in (FusedAttention(attention, None), one, heads_first, padded, RowAttention(attention)):
        for score in (None, "full", "cls"):
            if score == "full" and isinstance(deployed, RowAttention):
                continue
            expected, weights = attention(x, score)
            got, got_weights = deployed(x, score)
            assert (weights is None) == (score is None)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
            if weights is not None:
                torch.testing.assert_close(got_weights, weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [VisionTransformer, VisionTransformerDistilled])
@pytest.mark.parametrize("score", ["full", "cls"])
@pytest.mark.parametrize("keep", [1, 9, 16])
def test_the_last_block_is_computed_for_what_is_read(
    make_vit: MakeViT, kind: type[VisionTransformer], score: TokenScore, keep: int
) -> None:
    slim = SlimViT.from_timm(make_vit(kind), token_score=score)
    slim.set_keep(1, keep)
    deployed, images = cast(SlimViT, deployable(slim)), torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        read = deployed.blocks[-1](deployed.blocks[0](deployed.embed(images)))
        assert read.shape[1] == (2 if kind is VisionTransformerDistilled else 1)
        torch.testing.assert_close(deployed(images), slim(images), atol=1e-5, rtol=1e-5)
        assert slim(images).std() > 0.01  # there is something to compare


@pytest.mark.parametrize("rows", [1, 2])
def test_the_last_block_in_one_product(slim_run: Path, rows: int, digits_slim: SlimViT) -> None:
    """The queries of tokens that nobody reads do not matter."""
    for block in (SlimViT.load(slim_run).blocks[-1], copy.deepcopy(digits_slim).blocks[-1]):
        drop_biases(block)  # the second has heads of one size, which can be set apart at once
        x = torch.randn(3, block.tokens_in + 1, 96)
        with torch.inference_mode():
            apart, *together = (LastBlock(block, rows, products)(x) for products in get_args(LastProducts))
        for read in together:
            torch.testing.assert_close(read, apart, atol=1e-5, rtol=1e-5)


@given(
    heads=st.integers(1, 4),
    prefix=st.integers(1, 3),
    count=st.integers(1, 20),
    length=st.integers(1, 25),
    spread=st.sampled_from([1.0, 30.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_a_softmax_as_sums(heads: int, prefix: int, count: int, length: int, spread: float, seed: int) -> None:
    """Exact however far logits are apart, and however long the sums are."""
    logits = spread * torch.randn(2, heads, 1, prefix + count, generator=torch.Generator().manual_seed(seed))
    exact = cls_importance(logits.double().softmax(-1), prefix)
    got = importance_by_sums(logits, prefix, length)
    torch.testing.assert_close(got, exact.float(), atol=1e-37, rtol=1e-4)  # what FP32 cannot hold is 0


def test_heads_are_padded_to_a_size_that_fuses(slim_run: Path) -> None:
    slim = SlimViT.load(slim_run)
    assert any(block.attn.qk_dim != block.attn.v_dim for block in slim.blocks)
    deployed = deployable(slim, "fp16").model.blocks[:-1]  # type: ignore[union-attr, index]
    for block, source in zip(deployed, slim.blocks[:-1], strict=True):
        if not (source.scores_tokens and source.token_score == "full"):
            assert block.attn.qk_dim == block.attn.v_dim and block.attn.qk_dim % 4 == 0 and block.attn.qk_dim >= 12


def test_engine_and_its_manifest(slim_run: Path, images: Batches) -> None:
    export_verified(slim_run, options("fp16"), images)
    plan = build(slim_run, "fp16", "tensorrt-rtx")
    manifest = json.loads(manifest_path(plan).read_text())
    assert plan == slim_run / "model.fp16.plan" and plan.stat().st_size > 0
    assert manifest["runtime"] == "tensorrt-rtx" and manifest["precision"] == "fp16"
    assert manifest["profile"] == {"least": 1, "best": 2, "most": 4}
    assert manifest["gpu"] == NO_GPU or torch.cuda.is_available()
    assert current_plan(slim_run, "fp16", "tensorrt-rtx")[0] == plan
    assert (slim_run / "timing.tensorrt-rtx.cache").exists()

    manifest_file = manifest_path(plan)
    for field, value in (("version", "0.1"), ("onnx_sha256", "0"), ("plan_sha256", "0"), ("gpu", "another")):
        manifest_file.write_text(json.dumps(manifest | {field: value}))
        with pytest.raises(InputError, match=r"does not fit.*lowpass build"):
            current_plan(slim_run, "fp16", "tensorrt-rtx")
    manifest_file.unlink()
    with pytest.raises(InputError, match="no engine"):
        current_plan(slim_run, "fp16", "tensorrt-rtx")


@pytest.mark.slow
def test_engine_is_refused_without_padding(slim_run: Path, images: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the build a proof: TensorRT has no fused kernel for unequal heads, and does not fall back."""
    monkeypatch.setattr(lowpass.export.graph.deployable, "fused_head_dim", lambda attention: None)
    export_verified(slim_run, options("fp16"), images)
    with pytest.raises(RunError, match="TensorRT"):
        build(slim_run, "fp16", "tensorrt-rtx")


def test_fp32_engine_is_refused(slim_run: Path) -> None:
    with pytest.raises(InputError, match="FP32"):
        build(slim_run, "fp32", "tensorrt-rtx")


@pytest.mark.parametrize("text", ["", "0", "0:1:2", "4:2:8", "1:8", "a:b:c", "8:4:2", "-1:2:3", "1:2:3:4", "1.5"])
def test_senseless_profiles_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="batch profile"):
        BatchProfile.parse(text)


def test_profiles() -> None:
    assert str(BatchProfile.parse("1:8:32")) == "1:8:32"
    assert str(BatchProfile.parse("4")) == "4:4:4"


def test_sessions_agree(slim_run: Path, images: Batches) -> None:
    batch = images[0][0][:5].numpy()
    with torch.inference_mode():
        expected = SlimViT.load(slim_run)(torch.from_numpy(batch)).numpy()
    export_verified(slim_run, options("fp32"), images[:1])
    for runtime in ("pytorch", "onnxruntime", "openvino"):
        np.testing.assert_allclose(logits_of(open_session(runtime, slim_run, "fp32"), batch), expected, atol=1e-4)


def test_a_session_keeps_what_it_loaded(slim_run: Path, images: Batches) -> None:
    """Whatever becomes of the caller's array."""
    batch = images[0][0][:5].numpy()
    export_verified(slim_run, options("fp32"), images[:1])
    for runtime in ("pytorch", "onnxruntime", "openvino"):
        session = open_session(runtime, slim_run, "fp32")
        expected = logits_of(session, batch)
        session.load(batch.copy())
        others = [np.full_like(batch, 7) for _ in range(50)]  # one of them takes the place of a freed copy
        session.run()
        np.testing.assert_allclose(session.logits(), expected, atol=1e-5, err_msg=f"{runtime}, {len(others)}")


def test_a_missing_runtime_is_reported(slim_run: Path) -> None:
    for runtime in ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx"):
        if missing(runtime) is not None:
            with pytest.raises(InputError, match=f"cannot run on {runtime}"):
                open_session(runtime, slim_run, "fp16")
    assert torch.cuda.is_available() or missing("tensorrt-rtx") is not None
