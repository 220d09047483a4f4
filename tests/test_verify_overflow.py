"""FP16 that overflows in a real engine is found on a CPU, and mended or refused."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command_line import answer
from conftest import MakeViT
from families import FAMILIES
from marks import few
from PIL import Image
from test_families import cut, dense_of, pictures
from test_trials import scenes
from torch import Tensor, nn

import lowpass
from lowpass.export.artefacts import export_run, open_session
from lowpass.export.graph.deployable import deployable
from lowpass.export.graph.keep_fp32 import kept_layers, layer_of
from lowpass.export.onnx.file import onnx_path, read_metadata, serialise
from lowpass.export.onnx.half import HALF, LARGEST_HALF, half_tensors, magnitudes, rounded
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.onnx.verify import VERIFICATION_FILE
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.session import logits_of
from lowpass.export.tensorrt.plan import build
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.images import image_name, verification_batches

FP16 = ExportOptions(precision="fp16")
Spoil = Callable[[SlimViT, Tensor], None]


def largest_output(slim: SlimViT, layer: nn.Module, images: Tensor) -> tuple[int, float]:
    """The channel of a layer that reaches the largest number, and that."""
    seen = list[Tensor]()
    hook = layer.register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.inference_mode():
        slim(images)
    hook.remove()
    peaks = seen[0].flatten(0, 1).amax(0)
    return int(peaks.argmax()), float(peaks.max())


def larger_hidden(block: int, factor: float) -> Spoil:
    """A hidden channel larger, what reads it smaller: nearly the same function, as GELU is nearly linear in parts."""

    def spoil(slim: SlimViT, images: Tensor) -> None:
        mlp = slim.blocks[block].mlp
        enlarge(mlp.fc1, mlp.fc2, largest_output(slim, mlp.fc1, images)[0], factor)

    return spoil


def larger_value(block: int, factor: float) -> Spoil:
    """A value channel larger, what reads it smaller: exactly the same function."""

    def spoil(slim: SlimViT, images: Tensor) -> None:
        attention = slim.blocks[block].attn
        enlarge(attention.value, attention.proj, largest_output(slim, attention.value, images)[0], factor)

    return spoil


def enlarge(layer: nn.Linear, reader: nn.Linear, channel: int, factor: float) -> None:
    layer.weight.data[channel] *= factor
    layer.bias.data[channel] *= factor
    reader.weight.data[:, channel] /= factor


def larger_position(slim: SlimViT, _: Tensor) -> None:
    """A channel of the tokens at 1e5, from the position embedding on."""
    slim.vit.pos_embed.data[..., 5] = 1e5


def larger_tokens(slim: SlimViT, _: Tensor) -> None:
    """The same in two halves, of which either fits into FP16."""
    slim.vit.pos_embed.data[..., 5] = 5e4
    slim.vit.patch_embed.proj.bias.data[5] = 5e4


@pytest.fixture(scope="module")
def images(tuned_run: Path) -> Batches:
    return verification_batches(tuned_run, None)[0]


@pytest.fixture
def spoilt(tuned_run: Path, tmp_path: Path, images: Batches) -> Callable[[Spoil], Path]:
    """A copy of the run with a spoilt model."""

    def make(spoil: Spoil) -> Path:
        run = Path(shutil.copytree(tuned_run, tmp_path / "run", ignore=shutil.ignore_patterns("model.*")))
        slim = SlimViT.load(run)
        spoil(slim, images[0][0])
        slim.save(run)
        return run

    return make


def in_pytorch(model: nn.Module, images: Batches) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([model(batch).numpy() for batch, _ in images])


def all_of(*spoils: Spoil) -> Spoil:
    def spoil(slim: SlimViT, images: Tensor) -> None:
        for one in spoils:
            one(slim, images)

    return spoil


MLP, ATTENTION = "blocks.{0}.mlp.fc1 blocks.{0}.mlp.fc2", "blocks.{0}.attn.qkv blocks.{0}.attn.proj"
MENDED = {  # in block 1 tokens are scored, in the last only CLS is computed
    "hidden, and the last value": (
        all_of(larger_hidden(1, 1e5), larger_value(5, 2.0**17)),
        f"{MLP.format(1)} {ATTENTION.format(5)}",
    ),
    "value, and the last hidden": (
        all_of(larger_value(1, 2.0**17), larger_hidden(5, 1e5)),
        f"{ATTENTION.format(1)} {MLP.format(5)}",
    ),
    "infinite weights": (larger_hidden(2, 1e9), MLP.format(2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MENDED)
def test_mended(case: str, spoilt: Callable[[Spoil], Path], images: Batches, caplog: pytest.LogCaptureFixture) -> None:
    spoil, names = MENDED[case]
    run, kept = spoilt(spoil), tuple(names.split())
    slim = SlimViT.load(run)
    few = images[:2]
    wanted = in_pytorch(slim, few)
    assert not np.isfinite(in_pytorch(deployable(slim, "fp16"), few)).all()  # real half overflows
    with caplog.at_level(logging.INFO, "lowpass"):
        done = export_run(run, FP16)
    assert done.kept_fp32 == kept and done.same_top1 >= 99.5 and done.images == 1000
    assert done.largest_magnitude is not None and done.largest_magnitude < LARGEST_HALF / 2
    assert "beyond FP16's 65504; kept in FP32: blocks." in caplog.text or "infinite in FP16; kept" in caplog.text
    # The same in real half precision, which PyTorch computes on CPUs too.
    half = np.concatenate([logits_of(open_session("pytorch", run, "fp16"), batch.numpy()) for batch, _ in few])
    assert np.isfinite(half).all() and (half.argmax(-1) == wanted.argmax(-1)).mean() >= 0.99
    # It is written where it can be read later.
    file = onnx_path(run, "fp16")
    assert json.loads(read_metadata(file)["kept_fp32"]) == list(kept)
    assert json.loads((run / VERIFICATION_FILE).read_text())[file.name]["kept_fp32"] == list(kept)
    # These layers, and these alone, have FP32 weights. TensorRT takes it.
    model = onnx.load(file)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 2}
    wide = {
        layer_of(node.name)
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and kinds.get(node.input[1]) == onnx.TensorProto.FLOAT
    }
    assert wide == set(kept)
    assert build(run, "fp16", "tensorrt-rtx").stat().st_size > 0


def test_onnx_runtime_sees_an_overflow_once_it_is_rounded(spoilt: Callable[[Spoil], Path], images: Batches) -> None:
    content, batch = serialise(spoilt(larger_hidden(1, 1e5)), FP16), images[0][0].numpy()
    assert np.isfinite(logits_of(OnnxRuntime(content), batch)).all()
    assert not np.isfinite(logits_of(OnnxRuntime(rounded(content)), batch)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (larger_position, "model.vit.pos_embed, which vit.Add reads, is infinite in FP16"),
        (larger_tokens, "vit.Add reaches 1e+05 on test image "),
    ],
)
def test_the_residual_stream_is_refused(spoilt: Callable[[Spoil], Path], spoil: Spoil, wrong: str) -> None:
    run = spoilt(spoil)
    slim = SlimViT.load(run)
    batch = verification_batches(run, None)[0][0][0]
    with torch.inference_mode():
        assert torch.isfinite(slim(batch)).all() and not torch.isfinite(deployable(slim, "fp16")(batch)).all()
    with pytest.raises(RunError, match=re.escape(wrong) + r".*; it was not written \(export bf16\)"):
        export_run(run, FP16)
    assert not onnx_path(run, "fp16").exists()


@pytest.mark.slow
def test_too_many_layers_are_refused_and_named(spoilt: Callable[[Spoil], Path]) -> None:
    """Whoever names them gets them."""

    run = spoilt(all_of(*(larger_hidden(block, 1e5) for block in range(3))))
    with pytest.raises(RunError, match=r"keep layers in FP32: --keep-fp32 blocks\.0\.mlp\.fc1 --keep-fp32") as refused:
        export_run(run, FP16)
    named = tuple(str(refused.value).rstrip(")").split("--keep-fp32 ")[1:])
    asked = FP16.model_copy(update={"keep_fp32": tuple(name.strip() for name in named)})
    assert len(named) == 6 and export_run(run, asked).kept_fp32 == asked.keep_fp32


@pytest.mark.slow
def test_half_way_is_warned_of(spoilt: Callable[[Spoil], Path], caplog: pytest.LogCaptureFixture) -> None:
    def near(slim: SlimViT, images: Tensor) -> None:
        larger_hidden(3, 40_000 / largest_output(slim, slim.blocks[3].mlp.fc1, images)[1])(slim, images)

    run = spoilt(near)
    with caplog.at_level(logging.WARNING, "lowpass"):
        done = export_run(run, FP16)
    assert done.largest_magnitude is not None and LARGEST_HALF / 2 < done.largest_magnitude < LARGEST_HALF
    assert done.largest_magnitude_at is not None and done.largest_magnitude_at.startswith("blocks.3.mlp.fc1.")
    assert f"{done.largest_magnitude_at} reaches {done.largest_magnitude:.3g} on test image" in caplog.text
    assert "--keep-fp32 blocks.3.mlp.fc1" in caplog.text and not done.kept_fp32


@pytest.mark.slow
def test_nothing_is_said_of_a_sound_file(tuned_run: Path, images: Batches, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lowpass"):
        done = export_run(tuned_run, FP16)
        other = export_run(tuned_run, ExportOptions(precision="bf16"))
    assert not caplog.text and not done.kept_fp32 and 1 < (done.largest_magnitude or 0) < 1000
    assert other.largest_magnitude is None  # BF16 has the range of FP32


def test_rounded_is_half_precision(tuned_run: Path, images: Batches) -> None:
    """As PyTorch computes it in half, and not as ONNX Runtime does: the same distance from FP32."""
    content, slim = serialise(tuned_run, FP16), SlimViT.load(tuned_run)
    batch = [images[0]]
    exact, half = in_pytorch(slim, batch), in_pytorch(deployable(slim, "fp16"), batch)
    ours, wide = (logits_of(OnnxRuntime(file), batch[0][0].numpy()) for file in (rounded(content), content))
    off = {
        name: float(np.median(np.abs(got - exact))) for name, got in (("half", half), ("ours", ours), ("wide", wide))
    }
    assert off["ours"] == pytest.approx(off["half"], rel=0.25) and off["wide"] < 0.9 * off["ours"]


def test_magnitudes_are_those_of_pytorch(tuned_run: Path, images: Batches) -> None:
    """Every FP16 tensor is looked at, by image, and the largest is where it is."""
    content, slim = serialise(tuned_run, FP16), SlimViT.load(tuned_run)
    found = {one.node: one for one in magnitudes(content, [batch.numpy() for batch, _ in images], "")}
    names = {tensor.node for tensor in half_tensors(onnx.load_model_from_string(content))}
    attention = ("norm1.LayerNormalization", "attn.query.MatMul", "attn.Attention")
    for part in (*attention, "Add", "mlp.fc1.Add", "mlp.act.Gelu"):
        assert f"blocks.1.{part}" in names
    seen = list[Tensor]()
    slim.blocks[0].mlp.fc1.register_forward_hook(lambda *given: seen.append(given[2].abs().flatten(1).amax(1)))
    in_pytorch(slim, images)
    peaks = torch.cat(seen)
    one = found["blocks.0.mlp.fc1.Add"]
    assert one.value == pytest.approx(float(peaks.max()), rel=1e-2) and one.image == int(peaks.argmax())


def test_a_query_that_attention_multiplies_is_looked_at() -> None:
    def graph(scale: float) -> onnx.ModelProto:
        value = partial(onnx.helper.make_tensor_value_info, elem_type=HALF, shape=["batch", 1, 2, 4])
        node = onnx.helper.make_node("Attention", ["x", "x", "x"], ["y"], name="attention", scale=scale)
        inner = onnx.helper.make_graph([node], "", [value("x")], [value("y")])
        return onnx.helper.make_model(inner, opset_imports=[onnx.helper.make_opsetid("", 23)])

    assert [tensor.name for tensor in half_tensors(graph(0.5))] == ["y"]
    assert [(tensor.name, tensor.factor) for tensor in half_tensors(graph(4.0))] == [("x", 4.0), ("y", 1.0)]


@pytest.mark.parametrize("name", ["blocks.3.mlp", "blocks.6.mlp.fc1", "head", "fc1"])
def test_unknown_layers_are_refused(tuned_run: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"--keep-fp32 {name}: there is no such layer"):
        export_run(tuned_run, FP16.model_copy(update={"keep_fp32": (name,)}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_other_precisions_keep_nothing(tuned_run: Path, precision: Precision) -> None:
    with pytest.raises(InputError, match="--keep-fp32 is for FP16"):
        export_run(tuned_run, ExportOptions(precision=precision, keep_fp32=("blocks.3.mlp.fc1",)))


@pytest.mark.parametrize("family", few(FAMILIES, "registers", "SwiGLU, gate and value in one layer"))
def test_every_layer_of_every_family_can_be_kept(family: str, make_vit: MakeViT) -> None:
    """One by one and all at once: real half precision stays as near to FP32."""
    slim = cut(SlimViT.from_timm(dense_of(family, make_vit), token_score="cls"))
    every = [f"blocks.{block}.{part}" for block in range(2) for part in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    pixels = pictures(slim, 8)
    with torch.inference_mode():
        exact = slim(pixels)

        def off(*names: str) -> float:
            return float((deployable(slim, "fp16", kept=kept_layers(names, 2))(pixels) - exact).abs().median())

        plain = off()
        assert plain > 0 and all(off(*names) < 2 * plain for names in (every, *([name] for name in every)))
    asked = ExportOptions(precision="fp16", keep_fp32=tuple(every))
    content = to_onnx(slim, asked).SerializeToString()
    got = logits_of(OnnxRuntime(rounded(content)), pixels.numpy())
    assert np.median(np.abs(got - exact.numpy())) < 2 * plain


@pytest.mark.slow
def test_command(tuned_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("--keep-fp32", "blocks.2.mlp.fc2", "--keep-fp32", "blocks.0.attn.qkv.MatMul")  # a node's name will do
    told = answer(capsys, "export", str(tuned_run), "--precision", "fp16", *names)
    assert told["kept_fp32"] == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.2.mlp.fc2"]
    path = lowpass.Run(tuned_run).export("fp16", keep_fp32=["blocks.2.mlp.fc2", "blocks.0.attn.proj"])
    assert json.loads(read_metadata(path)["kept_fp32"]) == told["kept_fp32"]


def test_images_are_named_by_file(tuned_run: Path, tmp_path: Path) -> None:
    """Of a folder, the file that was looked at."""
    folder = scenes(tmp_path, list("0123456789"), 60, 20)
    batches, _ = verification_batches(tuned_run, str(folder))
    named = image_name(tuned_run, str(folder), 17)
    file = re.fullmatch(r"test image 17 \((.*\.png)\)", named)
    assert file is not None
    with Image.open(file[1]) as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    torch.testing.assert_close(torch.cat([images for images, _ in batches])[17], (pixels - 0.5) / 0.5)
