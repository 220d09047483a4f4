"""Every opset of every precision: sound, read here, as near to PyTorch as the newest, fused as often by TensorRT."""

import re
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from command_line import refusal
from conftest import MakeViT
from families import FAMILIES
from onnx import TensorProto, helper

import lowpass
from lowpass.benchmarks.compatibility.benchmark import OLDER, answer
from lowpass.benchmarks.compatibility.benchmark import main as compare_runtimes
from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.attention_nodes import without_attention_nodes
from lowpass.export.onnx.export import export as export_verified
from lowpass.export.onnx.file import onnx_path, serialise
from lowpass.export.onnx.opset import at_opset
from lowpass.export.onnx.quantize import Quantization
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.options import OPSET, OPSETS, ExportOptions, Opset, Precision, checked_opset
from lowpass.export.runtimes.engine import tensorrt_module
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.session import logits_of
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.images import quantization_batches, verification_batches

ROOT = Path(__file__).parent.parent
FEW = {"ir_version": 10}


@pytest.fixture(scope="module")
def images(tuned_run: Path) -> Batches:
    return verification_batches(tuned_run, None)[0][:2]


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_agrees_with_pytorch(tuned_run: Path, images: Batches, opset: Opset, precision: Precision) -> None:
    done = export_verified(tuned_run, ExportOptions(precision=precision, opset=opset), images)
    assert done.images == 128 and done.same_top1 == 100
    assert done.largest_difference <= (1e-4 if precision == "fp32" else 1)
    model = onnx.load(onnx_path(tuned_run, precision))
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", opset)]
    assert model.ir_version == {17: 8, 18: 8, 19: 9, 20: 9}.get(opset, 10)
    assert ("Attention" in kinds(model)) == (opset >= 23) and ("Gelu" in kinds(model)) == (opset >= 20)
    read = {value for node in model.graph.node for value in node.input}
    assert {constant.name for constant in model.graph.initializer} <= read
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [17, 20, 22])
def test_bf16_and_int8(tuned_run: Path, opset: Opset) -> None:
    images = verification_batches(tuned_run, None)[0]
    calibration = Quantization(quantization_batches(tuned_run, None)[0])
    for precision, least in (("bf16", 99.5), ("int8", 98.0)):
        options = ExportOptions(precision=precision, opset=opset)
        done = export_verified(tuned_run, options, images, made_images=True, calibration=calibration)
        assert done.images == 1000 and done.same_top1 >= least, precision
        assert onnx.load(onnx_path(tuned_run, precision)).opset_import[0].version == opset


def test_the_newest_is_the_default_and_stays_as_it_was_traced(tuned_run: Path) -> None:
    model = to_onnx(SlimViT.load(tuned_run), ExportOptions())
    assert OPSET == OPSETS[-1] == 23 and at_opset(model, OPSET) is model
    before = model.SerializeToString()
    assert at_opset(model, 17).SerializeToString() != before == model.SerializeToString()
    assert serialise(tuned_run, ExportOptions()) == serialise(tuned_run, ExportOptions(opset=23))


@pytest.mark.parametrize("family", ["differential attention", "tanh GELU", "BEiT-3: norms inside the block"])
@pytest.mark.parametrize("score", ["cls", "full"])
def test_families(family: str, score: Any, make_vit: MakeViT) -> None:
    """What came after 17: `RMSNormalization`, both kinds of `Gelu`, axes of `ReduceL2` as an input."""
    slim = SlimViT.from_timm(make_vit(**FAMILIES[family][0]), token_score="full" if "CLS" in family else score)
    slim.set_keep(0, 9)
    batch = np.random.default_rng(0).standard_normal((3, 3, 16, 16), np.float32)
    for precision, apart in (("fp32", 1e-5), ("fp16", 0.05)):
        newest = to_onnx(slim, ExportOptions(precision=precision))
        wanted = logits_of(OnnxRuntime(newest.SerializeToString()), batch)
        for opset in (17, 19, 22):
            older = at_opset(newest, opset)
            got = logits_of(OnnxRuntime(older.SerializeToString()), batch)
            np.testing.assert_allclose(got, wanted, atol=apart, rtol=apart)
            assert not kinds(older) & {"Attention", "RMSNormalization"}
    assert wanted.std() > 0.01  # there is something to compare


def attention(inputs: dict[str, tuple[int, ...]], dtype: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node("Attention", list(inputs), ["mixed"], name="attention", **attributes)
    given = [
        helper.make_tensor_value_info(name, TensorProto.BOOL if name == "mask" else dtype, shape)
        for name, shape in inputs.items()
    ]
    mixed = helper.make_tensor_value_info("mixed", dtype, [None] * len(inputs["query"]))
    graph = helper.make_graph([node], "one", given, [mixed])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], **FEW)


@pytest.mark.parametrize("given", [{}, {"scale": 0.3}])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_attention_written_out_is_attention(given: dict[str, float], by_row: bool, dtype: int) -> None:
    """Heads and rows; query and key as long as they are, value of another length; the scale given or ONNX's own."""
    sizes = {"query": (5, 6), "key": (7, 6), "value": (7, 4)}
    shapes = {name: (2, t, 3 * d) if by_row else (2, 3, t, d) for name, (t, d) in sizes.items()}
    heads = {"q_num_heads": 3, "kv_num_heads": 3} if by_row else {}
    model = attention(shapes, dtype, **heads, **given)
    written = at_opset(model, 17)
    assert "Attention" not in kinds(written)
    draw = np.random.default_rng(0)
    feed = {
        name: draw.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(dtype))
        for name, shape in shapes.items()
    }
    both = [OnnxRuntime(one.SerializeToString()).session.run(None, feed)[0] for one in (model, written)]
    np.testing.assert_allclose(*both, atol=1e-6 if dtype == TensorProto.FLOAT else 5e-3)
    made_by = {node.output[0]: node for node in written.graph.node}
    (softmax,) = (node for node in written.graph.node if node.op_type == "Softmax")
    product = made_by[softmax.input[0]]
    assert product.op_type == "MatMul"  # nothing between it and the softmax: the query was scaled before


@pytest.mark.parametrize(
    ("more", "attributes", "said"),
    [
        ({"mask": (5, 7)}, {}, "a mask of booleans"),
        ({"mask": (5, 7), "past_key": (2, 3, 1, 6), "past_value": (2, 3, 1, 4)}, {}, "a cache"),
        ({}, {"is_causal": 1}, "is_causal"),
        ({}, {"softcap": 2.0}, "softcap"),
    ],
)
def test_other_attention_is_refused(more: dict[str, Any], attributes: dict[str, Any], said: str) -> None:
    shapes = {"query": (2, 3, 5, 6), "key": (2, 3, 7, 6), "value": (2, 3, 7, 4)}
    with pytest.raises(RunError, match=f"{said}.*opset 23"):
        without_attention_nodes(attention(shapes | more, **attributes))


@pytest.mark.parametrize("opset", [16, 24, 0, -1])
def test_other_opsets_are_refused(opset: int, tuned_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tuned_run.iterdir())
    line = refusal(capsys, "export", str(tuned_run), "--opset", str(opset))
    assert "--opset takes 17 to 23" in line and str(opset) in line
    with pytest.raises(InputError, match="17 to 23"):
        lowpass.Run(tuned_run).export("fp32", opset=opset)
    assert sorted(tuned_run.iterdir()) == before


def test_what_an_opset_cannot_say_is_refused() -> None:
    """FP16 scales came with 19, FP8 with it."""
    scale = onnx.numpy_helper.from_array(np.float16(0.1), "scale")
    zero = onnx.numpy_helper.from_array(np.int8(0), "zero")
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], name="quantize")
    ends = (
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, (2,))],
        [helper.make_tensor_value_info("y", TensorProto.INT8, (2,))],
    )
    graph = helper.make_graph([node], "one", *ends, [scale, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], **FEW)
    at_opset(model, 19)
    with pytest.raises(InputError, match=r"opset 18 .*later --opset .*QuantizeLinear"):
        at_opset(model, 18)


def fused_attentions(content: bytes, profile: str) -> int:
    """How many of the kernels that TensorRT-RTX chose are fused attention."""
    trt: Any = tensorrt_module("tensorrt-rtx")
    said = []

    class Log(trt.ILogger):
        def log(self, _: Any, message: str) -> None:
            said.extend(message.splitlines())

    log, batch = Log(), BatchProfile.parse(profile)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(content)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    shapes, image = builder.create_optimization_profile(), network.get_input(0)
    shapes.set_shape(image.name, *((size, *tuple(image.shape)[1:]) for size in (batch.least, batch.best, batch.most)))
    config.add_optimization_profile(shapes)
    assert builder.build_serialized_network(network, config) is not None
    del parser  # before the network, see `_parse` of engine.py
    kernels = [line.strip() for line in said if line.strip().startswith("Name: ") and "LayerType:" in line]
    assert len(kernels) > 50
    return sum(kernel.startswith("Name: _gemm_mha") for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_tensorrt_fuses_as_many_attentions(tuned_run: Path, precision: Precision) -> None:
    serialised = partial(serialise, tuned_run)
    for opset in (17, 20, 23):
        content = serialised(ExportOptions(precision=precision, opset=opset))
        assert fused_attentions(content, "1:8:32") == 6 - 1, opset  # the last asks for CLS alone
    assert fused_attentions(serialised(ExportOptions(precision=precision, opset=20)), "8") == 6 - 1


def test_floors_tags_and_documents_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["tensorrt"]]
    needed += project["optional-dependencies"]["openvino"]
    floors = {name: floor for name, _, floor in (one.partition(">=") for one in needed)}
    export = (ROOT / "docs/export-and-runtimes.md").read_text()
    for name, floor in (("onnxruntime", "ONNX Runtime"), ("tensorrt", "TensorRT"), ("openvino", "OpenVINO")):
        assert f"{floor} {floors[name]}" in export, name
    # The floors were tried, but for TensorRT, which needs NVIDIA's own index.
    assert {f"onnxruntime=={floors['onnxruntime']}.1", f"openvino=={floors['openvino']}.0"} <= set(OLDER)
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]["triton"]["image"]
    (tag,) = re.findall(r"TRITON_TAG:-(\S+)}", compose)
    kserve = yaml.safe_load((ROOT / "deploy/kserve.yaml").read_text())["spec"]["predictor"]["model"]
    serving = (ROOT / "docs/serving.md").read_text()
    assert kserve["runtimeVersion"] == tag and f"tritonserver:{tag}" in serving
    (opset,) = re.findall(rf"\| {tag.removesuffix('-py3')} \|.*\| `--opset (\d+)` \|", serving)
    assert checked_opset(int(opset)) < 23  # its TensorRT is older than 10.14
    for file in ("compose.yaml", "kserve.yaml"):
        assert f"--opset {opset}" in (ROOT / "deploy" / file).read_text()


def test_the_loader_tells_what_a_runtime_says(tuned_run: Path, images: Batches, tmp_path: Path) -> None:
    python, batch = Path(sys.executable), tmp_path / "images.npy"
    np.save(batch, images[0][0].numpy())
    file = tmp_path / "model.onnx"
    file.write_bytes(serialise(tuned_run, ExportOptions(opset=20)))
    wanted = logits_of(OnnxRuntime(file.read_bytes()), images[0][0].numpy())
    for runtime in ("onnxruntime", "openvino"):
        np.testing.assert_allclose(answer(python, runtime, "fp32", file, batch), wanted, atol=1e-4)
    file.write_bytes(b"none")
    for runtime in ("onnxruntime", "openvino"):
        said = answer(python, runtime, "fp32", file, batch)
        assert isinstance(said, str) and len(said) > 10 and "\n" not in said
    with pytest.raises(InputError, match="not 'abacus==1'"):
        compare_runtimes(tuned_run, tmp_path / "out", "abacus==1", tmp_path)
