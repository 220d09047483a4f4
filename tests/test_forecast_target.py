"""Targets on GPUs that are not here: planned by the forecast, corrected by the kernels of an engine that is built."""

from pathlib import Path
from typing import Any

import pytest
from command_line import answer
from hypothesis import given, settings
from hypothesis import strategies as st

import lowpass
from lowpass.export.forecast.forecast import forecast_of
from lowpass.export.forecast.target import ForecastCosts, engine_kernels, forecast_target, is_forecast, parse_target
from lowpass.export.forecast.work import ENGINES, total_kernels, work_of
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.costs import total


@st.composite
def tables(draw: st.DrawFn, architecture: Architecture) -> Architecture:
    """Some slim model of it."""
    keep, blocks = architecture.dense.num_tokens, []
    for _ in architecture.blocks:
        keep = draw(st.integers(1, keep))
        heads, qk_dim, v_dim = (draw(st.integers(1, most)) for most in (3, 32, 32))
        blocks.append(BlockShape(heads=heads, qk_dim=qk_dim, v_dim=v_dim, hidden=draw(st.integers(1, 384)), keep=keep))
    return architecture.model_copy(update={"blocks": tuple(blocks)})


@settings(max_examples=25)
@given(data=st.data(), engine=st.sampled_from(ENGINES), batch=st.sampled_from([1, 8, 64]))
def test_parts_add_up_to_the_forecast_of_the_whole(
    digits_slim: SlimViT, data: st.DataObject, engine: str, batch: int
) -> None:
    slim = data.draw(tables(digits_slim.architecture))
    target = parse_target(f"forecast:l4:fp16:{engine}", None, batch)
    whole = forecast_of("slim", work_of(slim), target).batches[batch].ms
    assert total(ForecastCosts(slim, target), slim) == pytest.approx(whole, rel=1e-9)


def test_what_a_name_means() -> None:
    assert is_forecast("forecast:a100") and not is_forecast("tensorrt") and not is_forecast(None)
    plain = parse_target("forecast:a100", None, 8)
    assert (plain.gpu.name, plain.precision, plain.engine, list(plain.batches)) == ("a100", "fp16", "tensorrt", [8])
    full = parse_target("forecast:RTX 4090:bf16:pytorch-compiled", "bf16", 1)
    assert (full.gpu.name, full.precision, full.engine) == ("rtx4090", "bf16", "pytorch-compiled")
    described = parse_target("forecast:tflops=100,gbs=500,kernel_us=3:int8-fp16", None, 1)
    assert (described.gpu.tflops, described.gpu.kernel_us, described.precision) == (100, 3, "int8-fp16")


@pytest.mark.parametrize(
    ("runtime", "precision", "said"),
    [
        ("forecast:", None, "is not in the table of GPUs"),
        ("forecast:a1000", None, "'a1000' is not in the table of GPUs"),
        ("forecast:a100:fp32", None, "no forecast for fp32"),
        ("forecast:a100:fp8", None, "a100 has no tensor cores for fp8"),
        ("forecast:a100:fp16", "bf16", "name two precisions"),
        ("forecast:a100:fp16:triton", None, "no forecast for 'triton'"),
        ("forecast:a100:int8-fp16:pytorch-eager", None, "pytorch-eager runs fp16 or bf16"),
        ("forecast:tflops=100", None, "lacks tflops= or gbs="),
    ],
)
def test_other_names_are_refused(runtime: str, precision: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_target(runtime, precision, 1)


def test_an_engine_has_the_kernels_that_its_shape_says(digits_slim: SlimViT) -> None:
    """About: the builder fuses some of what is small."""
    architecture = digits_slim.architecture.model_copy(update={"token_score": "cls"})
    target = parse_target("forecast:a100", None, 4)
    by_shape = forecast_of("dense", work_of(architecture), target).batches[4]
    made = engine_kernels(architecture, "fp16", 4)
    assert total_kernels(made) == pytest.approx(by_shape.kernels, rel=0.15)
    measured = forecast_target(architecture, 0.1, target).measure
    assert measured is not None and measured(architecture) == pytest.approx(by_shape.ms, rel=0.25)


@pytest.mark.slow
def test_compress_to_a_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan's engine takes by its forecast what was asked for, and the model that was cut is that plan."""
    run, there = tmp_path / "run", ("--runtime", "forecast:a100", "--batch", "512")
    table = answer(capsys, "profile", "--model", "digits_deit", *there)
    assert "forecast, not measured" in table["machine"]["gpu"] and min(table["selection_ms"]) > 0
    target = parse_target("forecast:a100", None, 512)
    dense = forecast_of("dense", work_of(SlimViT.from_timm(load_model("digits_deit")).architecture), target)
    asked, whole = 0.7 * dense.batches[512].ms, dense.batches[512].ms
    small: dict[str, Any] = {"score_images": 128, "measure_images": 128, "runtime": "forecast:a100"}
    for ms, said in (
        (2 * whole, r"ms \(forecast\) for a batch of 512 as it is; a target must be below that"),
        (0.01, "is out of reach"),
    ):
        with pytest.raises(InputError, match=said):
            lowpass.compress("digits_deit", "digits", run, target_latency=ms, latency_batch=512, **small)
        assert not run.exists()  # so that another target may be asked for
    few = ("--data", "digits", "--score-images", "128", "--measure-images", "128", "--out", str(run))
    told = answer(capsys, "compress", "--model", "digits_deit", *few, *there, "--target-latency", f"{asked:.6f}")
    assert told["slim"]["macs"] < told["dense"]["macs"]
    made = forecast_target(SlimViT.load(run).architecture, asked, target).measure
    assert made is not None and made(SlimViT.load(run).architecture) == pytest.approx(asked, rel=0.05)
    assert "runtime: forecast:a100\n" in (run / "recipe.yaml").read_text()
