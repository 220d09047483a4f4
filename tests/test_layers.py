"""How many kernels an engine has: what decides its time at batch 1, and can be counted without a GPU."""

import json
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from marks import few

from lowpass.export.batch import BatchProfile
from lowpass.export.graph.deployable import deployable
from lowpass.export.onnx.quantize import Quantization
from lowpass.export.onnx.quantize_half import quantize_half
from lowpass.export.onnx.trace import trace
from lowpass.export.options import Precision
from lowpass.export.runtimes.engine import compile_engine
from lowpass.export.tensorrt.layers import Layers, macs_by_node, read_layers, table
from lowpass.export.tensorrt.plan import build, layers_path, load_layers
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.architecture import read_blocks
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.shaping import SHAPINGS

RECIPES = Path(str(resources.files("lowpass"))) / "recipes"
ONE = BatchProfile.parse("1")


def layers_of(slim: SlimViT, precision: Precision = "fp16", profile: BatchProfile = ONE) -> list[Layers]:
    model = graph(slim, precision)
    compiled = compile_engine("tensorrt-rtx", model.SerializeToString(), profile)
    return read_layers(compiled.log, model, profile)


@cache
def graph(slim: SlimViT, precision: Precision) -> onnx.ModelProto:
    return trace(deployable(slim, precision), torch.zeros(2, 3, *slim.architecture.dense.img_size))


@cache
def dense(size: str) -> SlimViT:
    return SlimViT.from_timm(timm.create_model(f"deit_{size}_patch16_224").eval(), token_score="cls")


@cache
def as_the_paper(size: str) -> SlimViT:
    blocks = read_blocks(RECIPES / f"deit_{size}_paper.json")
    return SlimViT(dense(size).architecture.model_copy(update={"blocks": blocks})).eval()


def in_stages(slim: SlimViT, stages: int) -> SlimViT:
    """Tokens dropped as `--token-stages` does."""
    slim = SlimViT(slim.architecture).eval()
    for index in SHAPINGS["tensorrt"].model_copy(update={"token_stages": stages}).stages(len(slim.blocks)):
        slim.set_keep(index, max(1, slim.blocks[index].tokens_in * 5 // 8))
    return slim


def extra_kernels(layers: Layers) -> list[int]:
    """Of each block but the last, above the seven of one that keeps all tokens."""
    return [totals.kernels - 7 for totals in layers.blocks[:-1]]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_block_is_seven_kernels(digits_slim: SlimViT, precision: Precision) -> None:
    """And its attention one: nothing moves between the product of query, key and value and it."""
    (layers,) = layers_of(digits_slim, precision)
    assert extra_kernels(layers) == [0] * 5
    assert sum(kernel.is_attention for kernel in layers.kernels if kernel.block != 5) == 5
    half = "Half" if precision == "fp16" else "BFloat16"
    products = [k for k in layers.kernels if k.kind in ("gemm", "runtime_fusion")]
    assert {k.computes_in for k in products if k.block is not None} == {half}
    if precision == "fp16":  # BF16's classifier is FP32, which T4 could not run
        assert "Float" not in {k.computes_in for k in products}


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_blocks_that_score(digits_slim: SlimViT, stages: int) -> None:
    """Four kernels more, and a fifth that sorts the tokens where a later low-pass reads their order."""
    slim = SlimViT(digits_slim.architecture.model_copy(update={"token_score": "cls"})).eval()
    slim.load_state_dict(digits_slim.state_dict())
    slim = in_stages(slim, stages)
    (layers,) = layers_of(slim)
    scoring = [index for index, block in enumerate(slim.blocks[:-1]) if block.scores_tokens]
    assert len(scoring) == stages
    expected = [0] * 5
    for index in scoring:
        expected[index] = 4 if index == scoring[-1] else 5
    assert extra_kernels(layers) == expected


@pytest.mark.slow
def test_blocks_that_score_in_a_range_of_batches(digits_slim: SlimViT) -> None:
    """They cost no more than that there, where a block has more kernels than seven."""
    slim = SlimViT(digits_slim.architecture.model_copy(update={"token_score": "cls"})).eval()
    layers = layers_of(in_stages(slim, 2), profile=BatchProfile.parse("1:2:4"))[0]
    kernels = [totals.kernels for totals in layers.blocks[:-1]]
    assert max(kernels) - min(kernels) <= 5


@pytest.mark.parametrize("size", few(["tiny", "small", "base"], "tiny"))
def test_deit(size: str) -> None:
    """At most 92 kernels dense, 105 as in the paper or with three token stages, 95 with one."""
    models = dense(size), as_the_paper(size), in_stages(dense(size), 3), in_stages(dense(size), 1)
    whole, slim, three, one = (layers_of(model)[0] for model in models)
    assert whole.whole.kernels <= 92 and one.whole.kernels <= 95
    assert slim.whole.kernels <= 105 and three.whole.kernels <= 105
    assert extra_kernels(whole) == [0] * 11
    assert sorted(extra_kernels(three)) == [0] * 8 + [4, 5, 5]
    assert sum(kernel.is_attention for kernel in slim.kernels if kernel.block != 11) == 11


@pytest.mark.slow
def test_a_larger_batch_moves_nothing_either() -> None:
    """Heads narrower together than the model is wide: query, key and value are read where they are. Blocks whose
    tokens another made fewer, or that choose, may lay them out anew."""
    (layers,) = layers_of(as_the_paper("small"), profile=BatchProfile.parse("8"))
    assert sorted(extra_kernels(layers))[:9] == [0] * 6 + [1] * 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8-fp16", "fp8"])
def test_eight_bits_keep_attention_fused(precision: Precision) -> None:
    """All of DeiT-Small's linear layers but CLS's in 8 bits, and few kernels more than in FP16."""
    slim, generator = as_the_paper("small"), np.random.default_rng(0)
    plain = graph(slim, precision)
    noise = generator.standard_normal((2, 3, 224, 224), np.float32)
    model, left_out = quantize_half(plain, Quantization([noise]), precision)
    assert not left_out
    compiled = compile_engine("tensorrt-rtx", model.SerializeToString(), ONE)
    (layers,), (half,) = read_layers(compiled.log, model, ONE), layers_of(slim)
    assert layers.whole.kernels <= 1.35 * half.whole.kernels
    assert layers.blocks[11].kernels <= 8  # heads of its query, key and value are set apart in one kernel
    assert sum(kernel.is_attention for kernel in layers.kernels if kernel.block != 11) == 11
    products = [kernel for kernel in layers.kernels if kernel.kind in ("gemm", "runtime_fusion")]
    narrow = "Int8" if precision == "int8-fp16" else "FP8"
    assert sum(kernel.computes_in == narrow for kernel in products) == 4 * 11 + 1
    assert "Float" not in {kernel.computes_in for kernel in products}


def test_macs_are_those_of_the_table(digits_slim: SlimViT) -> None:
    """But for the last block, which is computed for what is read, and biases, which the table does not count."""
    model = graph(digits_slim, "fp16")
    by_node, (layers,) = macs_by_node(model, 1), layers_of(digits_slim)
    assert layers.whole.macs == sum(by_node.values())
    block = sum(macs for node, macs in by_node.items() if node.startswith("blocks.2."))
    tokens, width, hidden = 65, 96, 384
    assert block == 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
    assert layers.blocks[2].macs == block
    assert sum(macs_by_node(model, 4).values()) == 4 * layers.whole.macs  # type: ignore[operator]


def test_what_build_writes(slim_run: Path) -> None:
    from lowpass.export.artefacts import export_run
    from lowpass.export.options import ExportOptions

    export_run(slim_run, ExportOptions(precision="fp16", profile=BatchProfile.parse("1:2:4")))
    plan = build(slim_run, "fp16", "tensorrt-rtx")
    assert layers_path(plan) == slim_run / "model.fp16.layers.json"
    found = load_layers(plan)
    assert [at.batch for at in found] == ["1:2:4", "1", "2", "4"]
    whole, one, two, four = (at.whole for at in found)
    assert one.kernels <= two.kernels <= four.kernels < whole.kernels
    assert whole.macs is None and whole.bytes_read is None  # they hang on the batch
    assert one.macs is not None and two.macs == 2 * one.macs and four.macs == 4 * one.macs
    assert one.bytes_written is not None and two.bytes_written is not None and one.bytes_written < two.bytes_written
    written = json.loads(layers_path(plan).read_text())[1]["kernels"]
    assert {"name", "kind", "inputs", "constants", "outputs", "nodes", "macs", "bytes_read", "block"} <= set(written[0])
    assert "fc1" in table(found[1]) and f"{one.kernels} kernels" in table(found[1])
    # Another engine from the same file takes their place, and one for a single kind of GPU says so.
    build(slim_run, "fp16", "tensorrt-rtx", capability="75")
    assert json.loads(plan.with_name(plan.name + ".json").read_text())["capability"] == "75"
    assert load_layers(plan)
    with pytest.raises(InputError, match="--compute-capability is for tensorrt-rtx"):
        compile_engine("tensorrt", b"", ONE, capability="75")
