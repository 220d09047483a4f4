"""What the report says of a target, a plan, exports and guesses: nothing that was not so."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import CHROMIUM, Browser
from gone_parts import NO_ATTENTION, NO_MLP
from report_parts import words

import lowpass
from lowpass.export.artefacts import export_run
from lowpass.export.onnx.verify import VERIFICATION_FILE
from lowpass.export.options import ExportOptions
from lowpass.export.torch_program import program_path
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.run.recipe import Recipe, make_recipe
from lowpass.report.asked import commands
from lowpass.report.charts import Row, bars, columns, pairs
from lowpass.report.current import exported_files
from lowpass.report.page import Looked, forecast_targets, gather, render, write_report
from lowpass.report.searched import Searched, _cost, read_search

FEW = {"score_images": 32, "measure_images": 32, "batch_size": 32}
TABLE = [
    {"heads": 3, "qk_dim": 8, "v_dim": 8, "hidden": 40, "keep": 64},
    {"heads": 3, "qk_dim": 8, "v_dim": 8, "hidden": 40, "keep": 64} | NO_ATTENTION,
    {"heads": 2, "qk_dim": 8, "v_dim": 8, "hidden": 96, "keep": 64} | NO_MLP,
]


@pytest.fixture(scope="module")
def of_table(tiny_source: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by a table that takes whole parts and drops no tokens. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "table.json").write_text(json.dumps({"blocks": TABLE}))
    compress(make_recipe(data="digits", architecture=folder / "table.json", **FEW, **tiny_source), folder / "run")
    return folder / "run"


@pytest.fixture
def run(of_table: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(of_table, tmp_path / "run"))


def of_latency(run: Path, **told: Any) -> Recipe:
    """The recipe of a run, as if its target had been one of time."""
    given = Recipe.load(run).model_dump() | {"architecture": None, "target_latency": 0.5} | told
    return Recipe.model_validate(given)


def planned(batch: int) -> Searched:
    """A search that was for batches of this size."""
    return Searched(None, None, (), (), (), "", batch, ())


def said(run: Path, recipe: Recipe, batch: int | None) -> str:
    """The commands of a report, in one text."""
    architecture = SlimViT.load(run).architecture
    found = commands(run, recipe, Metrics.load(run), architecture, [], [], batch)
    return "\n".join(f"{command.what}\n{command.lines}" for command in found)


def test_parts_that_are_gone_are_no_zeros(of_table: Path) -> None:
    read = words(write_report(of_table).read_text())
    assert "1 no attention – – 40 64" in read and "2 2 8 8 no MLP 64" in read
    assert "shapes" not in words(render(gather(of_table))).split("The whole recipe")[0]  # a table settles them


def test_what_a_plan_takes_is_told_with_how_that_is_known() -> None:
    plan = {"blocks": [], "cost": 0.25, "batch": 4}
    of_time = lowpass.pipeline.search.log_entries.Plan.model_validate(plan)
    of_macs = of_time.model_copy(update={"cost": 24.1e6, "batch": None})
    assert words(_cost(of_macs, None)) == "It takes 24.10 M MACs."
    assert _cost(of_time, "onnxruntime") == (
        "A model of these shapes took 0.25 ms for a batch of 4, measured on onnxruntime in the search."
    )
    forecast = _cost(of_time, "forecast:l4:int8-fp16")
    assert forecast == "By the forecast (l4:int8-fp16) it takes 0.25 ms for a batch of 4: that was not measured."


def test_the_forecast_of_the_target_comes_first(run: Path) -> None:
    usual = forecast_targets(Recipe.load(run), "no search")
    assert [target.gpu.name for target in usual] == ["t4", "a100", "h100", "rtx4090"]
    own = forecast_targets(of_latency(run, runtime="forecast:l4:int8-fp16"), planned(16))
    assert [(target.gpu.name, target.precision) for target in own][:2] == [("l4", "int8-fp16"), ("t4", "fp16")]
    assert list(own[0].batches) == [1, 8, 16, 32] and len(own) == 5
    same = forecast_targets(of_latency(run, runtime="forecast:a100", latency_batch=8), "no search")
    assert [target.gpu.name for target in same] == ["a100", "t4", "h100", "rtx4090"]
    assert forecast_targets(of_latency(run, runtime="onnxruntime"), planned(16)) == usual


def test_an_engine_is_built_as_it_was_planned(run: Path) -> None:
    usual = f"lowpass export {run} --precision fp16\nlowpass build {run} --precision fp16"
    assert usual in said(run, Recipe.load(run), None)
    assert usual in said(run, of_latency(run, runtime="onnxruntime", latency_precision="int8"), 128)
    own = said(run, of_latency(run, runtime="forecast:l4:int8-fp16"), 128)
    assert f"lowpass export {run} --precision int8-fp16 --batch 1:128:128\nlowpass build {run} --precision int8" in own
    assert usual in said(run, of_latency(run, runtime="forecast:a100"), 8)
    bf16 = said(run, of_latency(run, runtime="tensorrt", latency_precision="bf16"), 12)
    assert f"lowpass export {run} --precision bf16 --batch 1:12:12\n" in bf16


def test_how_it_is_made_again(run: Path, tiny_source: dict[str, Any]) -> None:
    recipe, metrics = Recipe.load(run), Metrics.load(run)
    again = f"lowpass compress --recipe {run / 'recipe.yaml'} --out {run}-again"
    assert said(run, recipe, None).endswith(again)
    for model in ("digits_deit", "hf-hub:timm/some", str(run)):
        assert said(run, recipe.model_copy(update={"model": model, "weights": None}), None).endswith(again)
    in_memory = said(run, recipe.model_copy(update={"weights": None}), None)
    assert "its model was in memory: the program" in in_memory and again not in in_memory
    metrics.model_copy(update={"finetuned_epochs": 3}).save(run)
    assert "which other options fine-tuning was given was not written down\nlowpass finetune" in said(run, recipe, None)


def test_a_model_that_guesses_is_told(run: Path) -> None:
    metrics = Metrics.load(run)

    def warned(dense: float | None, slim: float) -> str | None:
        figures = {"dense": metrics.dense, "slim": metrics.slim}
        changed = {
            name: figures[name].model_copy(update={"top1": top1}) for name, top1 in (("dense", dense), ("slim", slim))
        }
        metrics.model_copy(update=changed).save(run)
        return gather(run, images=4).guesses

    assert warned(98.0, 90.0) is None
    said = "The top-1 of the {} model is no better than that of a guess, 10 %."
    assert warned(98.0, 11.0) == said.format("slim") and warned(None, 9.0) == said.format("slim")
    assert warned(10.0, 12.0) == said.format("dense and the slim")
    assert 'class="note warn">The top-1' in write_report(run, images=4).read_text()


def test_a_difference_has_a_standard_error() -> None:
    looked = Looked("digits", 200, 200, 95.0, 97.0, (7, 3), (), (), {}, ())
    difference = np.array([-1] * 7 + [1] * 3 + [0] * 190)
    assert looked.standard_error == pytest.approx(100 * difference.std() / math.sqrt(200))
    assert Looked("digits", 200, 200, 95.0, None, None, (), (), {}, ()).standard_error is None


def test_programs_and_folders_are_exported_files_too(run: Path) -> None:
    export_run(run, ExportOptions(format="torch-export"))
    read = words(write_report(run).read_text())
    assert "Nothing is exported" not in read and "nothing current is exported" not in read
    assert f"torch.export.load('{program_path(run)}')" in read and "onnxruntime.InferenceSession" not in read
    looked = gather(run).looked
    assert isinstance(looked, Looked)
    measured = looked.files["model.fp32.pt2"]
    assert measured.top1 is not None and measured.top1 == measured.pytorch
    assert "model.fp32.pt2" in read and "pytorch 100.00 % of 1,000" in read
    export_run(run, ExportOptions(format="optimum"))
    files = {file.name: file for file in exported_files(run)}
    assert list(files) == ["model.fp32.onnx", "model.fp32.pt2", "model.fp32.optimum"]
    assert files["model.fp32.optimum"].unverified == "made from model.fp32.onnx, with another input name"
    assert all(file.stale is None for file in files.values())
    slim = SlimViT.load(run)
    with torch.no_grad():
        slim.classifiers["head"].bias.add_(1)
    slim.save(run)
    assert {file.stale for file in exported_files(run)} == {
        "made from other weights than the run's present ones; export again"
    }
    program_path(run).write_bytes(b"no archive")
    (run / "model.fp32.optimum" / "model.onnx").write_bytes(b"no graph")
    assert [file.stale is None for file in exported_files(run)] == [False, False, False]
    program_path(run).unlink()
    assert {file.name: file.stale for file in exported_files(run)}["model.fp32.pt2"] == "the file is gone"
    assert "model.fp32.pt2" in (run / VERIFICATION_FILE).read_text()


def test_pixels_are_asked_for_where_the_file_takes_them(run: Path) -> None:
    export_run(run, ExportOptions(input="uint8"))
    page = gather(run)
    assert isinstance(page.looked, Looked) and page.looked.files["model.fp32.onnx"].top1 == pytest.approx(
        page.looked.files["model.fp32.onnx"].pytorch
    )
    assert "# [B, H, W, C] uint8 pixels" in words(render(page))


def test_what_is_written_behind_a_bar_is_not_struck_through() -> None:
    rows = [Row("short", 1.0, None, "1.00×"), Row("near", 1.9, None, "1.90×"), Row("long", 2.5, None, "2.50×")]
    drawn = bars("title", rows, (), 2.0)
    mark = next(float(shape.points.split(",")[0]) for shape in drawn.shapes if shape.kind == "other")
    for row in rows:
        label = next(shape for shape in drawn.shapes if shape.words == row.words)
        assert not label.x < mark < label.x + 7 * len(row.words)


def test_an_axis_of_percent_tells_percent() -> None:
    drawn = pairs("title", [Row("one", 0.0, 0.0, ""), Row("two", 0.0, None, "")])
    told = [float(shape.words) for shape in drawn.shapes if shape.kind == "muted" and shape.words]
    assert told and all(0 <= value <= 1 for value in told) and not any(0 < value < 0.1 for value in told)


def test_numbers_on_columns_do_not_run_together() -> None:
    for dense, shown in ((196, 0), (64, 12)):
        labels = [s.words for s in columns("title", [dense] * 12, dense, "tokens").shapes if s.kind == "text"]
        assert labels == [str(dense)] * shown


def test_curves_are_also_tables(tiny_source: dict[str, Any], tmp_path: Path) -> None:
    compress(make_recipe(data="digits", target_macs=0.6, **FEW, **tiny_source), tmp_path / "run")
    entries = [json.loads(line) for line in (tmp_path / "run" / "search.jsonl").read_text().splitlines()[1:]]
    curves = {entry["block"]: entry["losses"] for entry in entries if entry["kind"] == "curve"}
    searched = read_search(tmp_path / "run", SlimViT.load(tmp_path / "run").architecture, None)
    assert isinstance(searched, Searched)
    hidden, heads, tokens = searched.losses
    for part, name in ((hidden, "hidden"), (tokens, "tokens")):
        assert {b: dict(losses) for b, losses in part.blocks} == {
            block: {option["size"]: option["loss"] for option in losses[name]} for block, losses in curves.items()
        }
    assert heads.sizes == sorted({option["heads"] for losses in curves.values() for option in losses["attention"]})
    read = words(write_report(tmp_path / "run").read_text())
    assert "The same as tables Loss of a narrower MLP block " + " ".join(map(str, hidden.sizes)) in read


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_on_a_phone_and_on_a_desk(of_table: Path, tmp_path: Path) -> None:
    """What a row is of stays in sight, and a picture alone is no smaller than beside others."""
    page = write_report(of_table)
    with Browser(tmp_path / "profile") as browser:
        browser.open(page, 360)
        browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        moved = browser.evaluate(
            "[...document.querySelectorAll('.scroll')].filter(e => e.querySelector('table') && "
            "e.scrollWidth > e.clientWidth + 40).map(e => { e.scrollLeft = 40; const h = e.querySelector('tbody th');"
            "return [e.scrollLeft, h.getBoundingClientRect().left - e.getBoundingClientRect().left, "
            "h.getBoundingClientRect().width / e.clientWidth]; })"
        )
        assert moved and all(scrolled == 40 and abs(left) < 1 and share < 0.6 for scrolled, left, share in moved)
        browser.open(page, 1280)
        widths = browser.evaluate("[...document.querySelectorAll('.stage')].map(e => e.clientWidth)")
        assert len(widths) == 8 and min(widths) >= 140
        assert browser.complaints == []
