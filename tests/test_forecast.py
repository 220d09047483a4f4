"""Forecasts: how wrong they are on what they have not seen, what they grow with, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import answer
from hypothesis import given, settings
from hypothesis import strategies as st

from lowpass.benchmarks.rows import RESULTS, read_rows
from lowpass.cli import main
from lowpass.export.artefacts import export_run
from lowpass.export.batch import BatchProfile
from lowpass.export.forecast.calibration import calibration, fit, seconds
from lowpass.export.forecast.cost import Flat, Speeds, times
from lowpass.export.forecast.gpus import GPUS, find_gpu
from lowpass.export.forecast.published import published
from lowpass.export.forecast.work import ENGINES, kernels, work_of, work_of_name
from lowpass.export.options import ExportOptions
from lowpass.export.tensorrt.plan import build
from lowpass.pipeline.model.slim_vit import SlimViT

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("batches", "most"), [("32 and more", 0.12), ("less", 0.20)])
def test_a_model_that_was_left_out_is_forecast(batches: str, most: float) -> None:
    """Within a GPU and an engine: the median error of what the committed study left out."""
    rows = read_rows(ROOT / RESULTS / "forecast.csv")
    medians = [
        float(row["value"])
        for row in rows
        if (row["left_out"], row["batches"], row["figure"]) == ("model", batches, "median_error")
    ]
    assert len(medians) >= 4 and max(medians) <= most


def test_a_gpu_that_was_left_out_is_forecast() -> None:
    errors = calibration().gpus_left_out
    gpus = {row.gpu.name for row in published()}
    assert len(gpus) == 5 and all(errors[gpu].median <= 0.30 for gpu in gpus)


def test_rates_are_what_the_rows_give() -> None:
    """The committed rates and errors are those of the committed rows and the present model of costs."""
    kept = calibration()
    again = fit(published())
    assert {len(published()), sum(error.rows for error in kept.models_left_out.values())} == {221}
    for row in published()[::7]:
        assert seconds(row, again) == pytest.approx(seconds(row, kept), rel=0.01)
    without = fit([row for row in published() if row.gpu.name != "rtx5090"])
    off = [abs(1000 * seconds(row, without) / row.ms - 1) for row in published() if row.gpu.name == "rtx5090"]
    assert sorted(off)[len(off) // 2] == pytest.approx(kept.gpus_left_out["rtx5090"].median, abs=0.01)


@settings(max_examples=15)
@given(
    engine=st.sampled_from(ENGINES),
    gpu=st.sampled_from(sorted(GPUS)),
    batch=st.integers(1, 64),
    more=st.floats(1.1, 4),
)
def test_what_a_forecast_grows_with(engine: str, gpu: str, batch: int, more: float) -> None:
    """More images take longer; a GPU that computes or reads faster never does."""

    def took(size: int, **changes: float) -> float:
        chosen = replace(GPUS[gpu], **changes)
        rates = calibration().rates(chosen, engine, "fp16")  # type: ignore[arg-type]
        work = work_of_name("deit_tiny_patch16_224", None)
        flat = Flat.of(kernels(work, engine, size))  # type: ignore[arg-type]
        return float(times(flat, Speeds.of(chosen, "fp16"), rates).whole.sum())

    assert took(2 * batch) > took(batch)
    assert took(batch, tflops=more * GPUS[gpu].tflops) < took(batch)
    assert took(batch, gbs=more * GPUS[gpu].gbs) < took(batch)


def test_a_described_gpu_is_like_one_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """But for what is known of that one alone."""
    options = ("--model", "deit_small_patch16_224", "--batch", "32")
    named = answer(capsys, "forecast", *options, "--gpu", "l4")
    described = answer(capsys, "forecast", *options, "--gpu-spec", "tflops=121,gbs=300")
    assert named["model"]["batches"]["32"]["ms"] == pytest.approx(described["model"]["batches"]["32"]["ms"], rel=0.1)
    assert "leave-one-GPU-out (tensorrt)" in described["held_out"]
    cheap, dear = (
        answer(capsys, "forecast", *options, "--gpu-spec", f"tflops=121,gbs=300,kernel_us={cost}")["model"]["batches"]
        for cost in (1, 21)
    )
    launches = cheap["32"]["kernels"]
    assert dear["32"]["ms"] - cheap["32"]["ms"] == pytest.approx(20e-3 * launches, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "macs"),
    [  # in G, as timm publishes them
        ("deit_tiny_patch16_224", 1.26),
        ("vit_base_patch16_384", 55.5),
        ("vit_small_patch16_18x2_224", 13.7),
        ("beit_base_patch16_224", 17.6),
        ("eva02_small_patch14_224", 6.1),
        ("vit_base_patch16_clip_224", 17.6),
    ],
)
def test_macs_of_dense_models_are_those_published(name: str, macs: float) -> None:
    assert work_of_name(name, None).macs() / 1e9 == pytest.approx(macs, rel=0.03)


def test_macs_of_a_run_are_those_of_its_table(slim_run: Path) -> None:
    architecture = SlimViT.load(slim_run).architecture
    assert work_of(architecture).macs() == pytest.approx(architecture.macs(), rel=0.03)  # scoring is left out


@pytest.mark.slow
def test_a_run_is_forecast_by_the_kernels_of_its_engine(slim_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_shape = answer(capsys, "forecast", str(slim_run), "--gpu", "a100", "--batch", "1,4,64")
    assert by_shape["kind"] == "forecast" and by_shape["slim"]["kernels_from"] == "the model's shape"
    export_run(slim_run, ExportOptions(precision="fp16", profile=BatchProfile.parse("1:2:4")))
    build(slim_run, "fp16", "tensorrt-rtx")
    built = answer(capsys, "forecast", str(slim_run), "--gpu", "a100", "--batch", "1,4,64")
    assert built["slim"]["kernels_from"] == "model.fp16.layers.json (batch 1, 4)"
    layers = json.loads((slim_run / "model.fp16.layers.json").read_text())
    (at_one,) = [at for at in layers if at["batch"] == "1"]
    for batch in ("1", "4", "64"):
        dense, slim = built["dense"]["batches"][batch], built["slim"]["batches"][batch]
        assert slim["low_ms"] < slim["ms"] < slim["high_ms"] and slim["bound_by"] in ("launches", "bytes", "arithmetic")
        assert slim["ms"] == pytest.approx(sum(block["ms"] for block in slim["blocks"]))
        assert slim["ms"] == pytest.approx(by_shape["slim"]["batches"][batch]["ms"], rel=0.35)
        assert built["speedup"][batch] == pytest.approx(dense["ms"] / slim["ms"])
    assert built["slim"]["batches"]["1"]["kernels"] == at_one["whole"]["kernels"]
    with pytest.raises(SystemExit):
        main(["forecast", str(slim_run), "--gpu", "h100", "--precision", "fp8", "--blocks"])
    said = capsys.readouterr().out
    assert "forecast, not measured" in said and "median" in said and "no FP8 latency was published" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "deit_tiny_patch16_224", "--gpu", "gtx9"), "'gtx9' is not in the table of GPUs (t4, l4"),
        (("--model", "deit_tiny_patch16_224"), "name a GPU with --gpu, or describe one with --gpu-spec"),
        (("--model", "deit_tiny_patch16_224", "--gpu-spec", "tflops=fast,gbs=1"), "not 'tflops=fast'"),
        (("--model", "deit_tiny_patch16_224", "--gpu-spec", "tflops=100"), "lacks tflops= or gbs="),
        (("--model", "deit_tiny_patch16_224", "--gpu", "a100", "--precision", "fp8"), "a100 has no tensor cores for"),
        (("--model", "deit_tiny_patch16_224", "--gpu", "a100", "--precision", "fp32"), "no forecast for fp32; choose"),
        (("--model", "deit_huge", "--gpu", "a100"), "timm makes no 'deit_huge' of that size"),
        (("--model", "resnet50", "--gpu", "a100"), "resnet50 is no plain ViT"),
        (("--model", "swin_tiny_patch4_window7_224", "--gpu", "a100"), "is no plain ViT"),
        (("--model", "deit_tiny_patch16_224", "--gpu", "a100", "--batch", "0"), "--batch takes whole numbers above 0"),
        (("--gpu", "a100"), "give a run directory, or the name of a dense model"),
        (("nowhere", "--gpu", "a100"), "nowhere"),
    ],
)
def test_what_cannot_be_forecast_is_refused(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["forecast", *arguments])
    assert stopped.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "Traceback" not in error


def test_names_of_gpus_are_read_as_people_write_them() -> None:
    assert find_gpu("RTX 4090", None) == find_gpu("rtx-4090", None) == GPUS["rtx4090"]
