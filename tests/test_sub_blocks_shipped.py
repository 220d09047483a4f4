"""Blocks without a part, from a run to its files and engines: what is gone leaves no node and no kernel."""

import json
from pathlib import Path
from typing import cast

import onnx
import pytest
import torch
from command_line import answer, refusal
from conftest import MakeViT
from gone_parts import MODELS, NO_ATTENTION, NO_MLP, NOTHING, cut_from, images_for, some_vit, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import few

import lowpass
from lowpass.export.forecast.forecast import forecast_of
from lowpass.export.forecast.target import ForecastCosts, engine_kernels, parse_target
from lowpass.export.forecast.work import ENGINES, total_kernels, work_of
from lowpass.export.graph.deployable import deployable
from lowpass.export.graph.keep_fp32 import gone_layers
from lowpass.export.graph.last_block import LastBlock
from lowpass.export.onnx.export import export as export_verified
from lowpass.export.onnx.file import onnx_path
from lowpass.export.onnx.quantize import Quantization
from lowpass.export.options import ExportOptions, Precision
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.model.architecture import read_blocks
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.images import quantization_batches, verification_batches
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.search.costs import Macs, total

SHAPE = {"heads": 3, "qk_dim": 32, "v_dim": 32, "hidden": 384, "keep": 64}
# The first block, one in the middle and the last, each without attention, and the same without an MLP; tokens go where
# there is an MLP and where there is none. The digits keep most of their top-1, which the verification of a file reads.
TABLES = {
    "attention": (
        NO_ATTENTION,
        {},
        {"keep": 47},
        NO_ATTENTION | {"keep": 47},
        {"keep": 47},
        NO_ATTENTION | {"keep": 47},
    ),
    "mlp": (NO_MLP, {}, NO_MLP | {"keep": 47}, NOTHING | {"keep": 47}, {"keep": 47}, NO_MLP | {"keep": 47}),
}


@pytest.fixture(scope="module", params=sorted(TABLES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compressed to a table with recovery, and fine-tuned for an epoch."""
    folder = tmp_path_factory.mktemp(request.param)
    table, directory = folder / "table.json", folder / "run"
    table.write_text(json.dumps({"blocks": [SHAPE | changes for changes in TABLES[request.param]]}))
    lowpass.compress("digits_deit", "digits", directory, architecture=table, score_images=128, seed=1)
    assert SlimViT.load(directory).architecture.blocks == read_blocks(table)
    before = Metrics.load(directory).slim
    assert before.top1 is not None and before.top1 > 60 and before.macs == SlimViT.load(directory).architecture.macs()
    lowpass.Run(directory).finetune(epochs=1)
    return directory


@pytest.fixture(scope="module")
def images(run: Path) -> Batches:
    return verification_batches(run, None)[0][:4]


@pytest.mark.parametrize("precision", few(["fp32", "fp16", "bf16", "int8", "int8-fp16", "fp8"], "fp32", "int8"))
def test_nothing_of_a_part_is_exported(run: Path, images: Batches, precision: Precision) -> None:
    calibration = None
    if precision not in ("fp32", "fp16", "bf16"):
        fitted, judging = quantization_batches(run, None)
        calibration = Quantization(fitted[:2], judging[:2])
    done = export_verified(run, ExportOptions(precision=precision), images, calibration=calibration)
    assert done.same_top1 == 100 if precision == "fp32" else done.same_top1 >= 97
    nodes = [node.name for node in onnx.load(onnx_path(run, precision)).graph.node]
    for index, shape in enumerate(SlimViT.load(run).architecture.blocks):
        own = [name.removeprefix(f"blocks.{index}.") for name in nodes if name.startswith(f"blocks.{index}.")]
        attention = [
            name for name in own if name.startswith(("attn", "norm1", "qkv", "query", "key", "proj", "weights"))
        ]
        assert bool(attention) == bool(shape.heads), attention
        assert any(name.startswith(("mlp", "norm2")) for name in own) == bool(shape.hidden)
        assert shape.heads or shape.hidden or not own


def test_an_older_opset(run: Path, images: Batches) -> None:
    for precision in ("fp32", "fp16"):
        done = export_verified(run, ExportOptions(precision=precision, opset=20), images)
        assert done.same_top1 == 100 if precision == "fp32" else done.same_top1 >= 99


@pytest.mark.slow
def test_a_run_is_reported_and_its_layers_are_named(
    run: Path, images: Batches, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, "evaluate", str(run))
    assert told["slim"]["top1"] > 60
    scoring = 64 * 64 * 96  # which the forecast leaves out
    assert answer(capsys, "forecast", str(run), "--gpu", "a100")["slim"]["macs"] == told["slim"]["macs"] - scoring
    answer(capsys, "report", str(run))
    gone = gone_layers(SlimViT.load(run).architecture.blocks)
    assert gone and "there is no such layer" in refusal(
        capsys, "export", str(run), "--precision", "fp16", "--keep-fp32", gone[0]
    )


@given(st.data())
@settings(max_examples=25)
@torch.inference_mode()
def test_any_table_is_deployed(make_vit: MakeViT, data: st.DataObject) -> None:
    """Where parts are gone at the end, or everywhere, no more tokens are computed than the classifier reads."""
    name = data.draw(st.sampled_from([name for name in MODELS if name not in ("distilled", "norms inside")]))
    architecture = some_vit(make_vit, name).architecture
    if architecture.dense.differential:  # whose heads cannot be thinned
        gone = data.draw(st.lists(st.sampled_from([{}, NO_ATTENTION, NO_MLP, NOTHING]), min_size=3, max_size=3))
        architecture = cut_from(architecture, dict(enumerate(gone)))
    else:
        architecture = data.draw(tables(architecture))
    torch.manual_seed(0)
    slim = SlimViT(architecture).eval()
    deployed = cast(SlimViT, deployable(slim))
    torch.testing.assert_close(deployed(images_for(slim)), slim(images_for(slim)), rtol=1e-5, atol=1e-5)
    if not (architecture.dense.reads_image_tokens or architecture.dense.differential):
        assert isinstance(deployed.vit.blocks[architecture.last_attention], LastBlock)
        assert deployed.vit.blocks(deployed.embed(images_for(slim))).shape[1] == 1


@pytest.mark.parametrize("gone", [{0: NO_ATTENTION, 2: NO_ATTENTION}, {1: NOTHING}, {2: NO_MLP}])
@torch.inference_mode()
def test_rotary_positions_are_deployed(make_vit: MakeViT, gone: dict[int, dict[str, int]]) -> None:
    architecture = cut_from(some_vit(make_vit, "rotary").architecture, gone)
    architecture = architecture.with_keep(0 if architecture.blocks[0].heads else 1, 40)
    torch.manual_seed(0)
    slim = SlimViT(architecture).eval()
    torch.testing.assert_close(deployable(slim)(images_for(slim)), slim(images_for(slim)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("gone", "fewer"),
    [
        ({1: NO_ATTENTION, 4: NO_MLP}, 7),
        ({0: NO_ATTENTION, 2: NO_MLP, 3: NO_ATTENTION, 5: NO_MLP}, 14),
        (
            {3: NO_ATTENTION, 4: NO_ATTENTION, 5: NO_ATTENTION},
            12,
        ),  # the last attention is then block 2's, for CLS alone
        ({5: NOTHING}, 7),
    ],
)
def test_an_engine_has_as_many_kernels_less_as_the_forecast_says(
    digits_slim: SlimViT, gone: dict[int, dict[str, int]], fewer: int
) -> None:
    """Four kernels an attention, three an MLP."""
    whole = digits_slim.architecture.model_copy(update={"token_score": "cls"})
    slim = cut_from(whole, gone)
    target = parse_target("forecast:a100", None, 1)
    said = {one: forecast_of("", work_of(one), target).batches[1].kernels for one in (whole, slim)}
    built = {one: total_kernels(engine_kernels(one, "fp16", 1)) for one in (whole, slim)}
    assert said[whole] - said[slim] == fewer == built[whole] - built[slim]
    assert built[slim] == pytest.approx(said[slim], rel=0.15)


@given(data=st.data(), engine=st.sampled_from(ENGINES), batch=st.sampled_from([1, 64]))
@settings(max_examples=25)
def test_parts_add_up_to_the_forecast(digits_slim: SlimViT, data: st.DataObject, engine: str, batch: int) -> None:
    slim = data.draw(tables(digits_slim.architecture))
    target = parse_target(f"forecast:l4:fp16:{engine}", None, batch)
    whole = forecast_of("slim", work_of(slim), target).batches[batch].ms
    assert total(ForecastCosts(slim, target), slim) == pytest.approx(whole, rel=1e-9)
    assert total(Macs(slim), slim) == slim.macs()
