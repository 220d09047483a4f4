"""Targets on GPUs that are not here: planned by the forecast, corrected by the kernels of an engine that is built."""

from pathlib import Path
from typing import Any

import pytest
import timm
from command_line import answer
from hypothesis import given, settings
from hypothesis import strategies as st

import lowpass
from lowpass.api import recipe_of
from lowpass.export.forecast.forecast import forecast_of
from lowpass.export.forecast.target import ForecastCosts, engine_kernels, forecast_target, is_forecast, parse_target
from lowpass.export.forecast.work import ENGINES, total_kernels, work_of
from lowpass.goals import cost_targets_of
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.costs import total
from lowpass.pipeline.search.curves import AttentionOption, BlockCurve, SizeOption
from lowpass.pipeline.search.log import read_log
from lowpass.pipeline.search.log_entries import Plan
from lowpass.pipeline.search.plan import plan
from lowpass.pipeline.search.shaping import SHAPINGS
from lowpass.pipeline.search.target import check_measured_targets


@st.composite
def tables(draw: st.DrawFn, architecture: Architecture) -> Architecture:
    """Some slim model of it."""
    keep, blocks = architecture.dense.num_tokens, []
    for _ in architecture.blocks:
        heads, qk_dim, v_dim = (draw(st.integers(1, most)) for most in (3, 32, 32))
        if draw(st.integers(0, 3)):
            keep = draw(st.integers(1, keep))
        else:  # no attention
            heads = qk_dim = v_dim = 0
        hidden = draw(st.integers(1, 384)) if draw(st.integers(0, 3)) else 0
        blocks.append(BlockShape(heads=heads, qk_dim=qk_dim, v_dim=v_dim, hidden=hidden, keep=keep))
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


def test_parts_go_in_small_batches_and_tokens_in_large_ones() -> None:
    """DeiT-Tiny on an A100, where parts lose the same wherever they are, and tokens less further up."""
    vit = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    dense = SlimViT.from_timm(vit, token_score="cls").architecture
    shaping = SHAPINGS["tensorrt"].model_copy(update={"token_stages": "auto"})
    curves = []
    for index in range(12):
        there = [AttentionOption(heads=h, qk_dim=64, v_dim=64, loss=0.04 * (3 - h)) for h in (1, 2, 3)]
        attention = (AttentionOption(heads=0, qk_dim=0, v_dim=0, loss=0.3), *there)
        hidden = tuple(SizeOption(size=n, loss=0.3 if not n else 0.1 * (1 - n / 768)) for n in range(0, 769, 128))
        # Few may go early at little loss, more further up.
        dropped = [SizeOption(size=n, loss=(0.5 - index / 25) * (1 - n / 196) ** 2) for n in range(16, 197, 20)]
        tokens = tuple(dropped) if index in shaping.stages(12) else ()
        curves.append(BlockCurve(attention=attention, hidden=hidden, tokens=tokens))
    found = {}
    for batch in (1, 128):
        costs = ForecastCosts(dense, parse_target("forecast:a100", None, batch))
        blocks = plan(curves, dense, costs, 0.6 * total(costs, dense))
        assert blocks is not None
        slim = dense.model_copy(update={"blocks": blocks})
        stages = sum(block.keep < slim.tokens_in(index) for index, block in enumerate(blocks))
        found[batch] = (stages, sum(not block.heads for block in blocks) + sum(not block.hidden for block in blocks))
    assert found[1][0] <= 1 and found[1][1] >= 4
    assert found[128][0] >= 2 > found[128][1]


@pytest.mark.slow
def test_a_throughput_is_reached_in_the_batch_that_is_named(tmp_path: Path) -> None:
    """The plan's own engine, in the batch that the log names, gives what was asked for within the limit."""
    run = tmp_path / "run"
    asked: dict[str, Any] = {"runtime": "forecast:t4", "target_throughput": 14000.0, "latency_limit": 0.4}
    small: dict[str, Any] = {"score_images": 64, "measure_images": 64, "recovery": False}
    lowpass.compress("digits_deit", "digits", run, **asked, **small)
    (planned,) = [entry for entry in read_log(run / "search.jsonl")[1] if isinstance(entry, Plan)]
    assert planned.batch in (1, 2, 4, 8) and planned.cost <= 0.4
    slim = SlimViT.load(run).architecture
    measure = forecast_target(slim, 1.0, parse_target("forecast:t4", None, planned.batch)).measure
    assert measure is not None and measure(slim) == pytest.approx(planned.cost)
    assert 1000 * planned.batch / planned.cost >= 0.95 * 14000


def test_a_throughput_that_cannot_be_asked_for_is_refused() -> None:
    asked: dict[str, Any] = {"runtime": "forecast:t4", "target_throughput": 14000.0, "latency_limit": 0.4}
    dense = SlimViT.from_timm(load_model("digits_deit"), token_score="cls").architecture
    for rate, said in (
        (
            10.0,
            r"for a batch of 1 as it is, \d+ images a second; a target must be above that",
        ),
        (
            1e9,
            r"1e\+09 images a second within 0.4 ms are out of reach: there are 1.3\d+e\+06 in batches of 128",
        ),
    ):
        recipe = recipe_of("digits_deit", "digits", **(asked | {"target_throughput": rate}))
        targets_of = cost_targets_of(recipe)
        assert targets_of is not None
        with pytest.raises(InputError, match=said):
            check_measured_targets(targets_of(dense), dense, recipe)
    for changes, said in (
        ({"latency_limit": None}, "--target-throughput IMAGES_PER_S and --latency-limit MS go together"),
        ({"latency_batch": 8}, "--target-throughput picks a batch itself"),
        ({"target_latency": 1.0}, "exactly one of"),
        ({"runtime": None}, "on which runtime"),
    ):
        with pytest.raises(InputError, match=said):
            recipe_of("digits_deit", "digits", **(asked | changes))
