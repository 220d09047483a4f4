"""The page that `lowpass report` writes: complete, honest about what was not measured, and safe to open."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import CHROMIUM, Browser
from command_line import answer, refusal
from conftest import MakeViT
from PIL import Image
from report_parts import Outline, add_engine, add_int8, words

import lowpass
from lowpass.benchmarks.latency.compare import benchmark
from lowpass.export.artefacts import export_run
from lowpass.export.forecast.forecast import Target
from lowpass.export.forecast.gpus import GPUS
from lowpass.export.forecast.of_run import forecast_run
from lowpass.export.onnx.verify import VERIFICATION_FILE
from lowpass.export.options import ExportOptions
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_json
from lowpass.pipeline.data.digits import DigitScenes
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.import_released import import_released
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.run.recipe import make_recipe
from lowpass.report.current import exported_files
from lowpass.report.page import Looked, gather, write_report
from lowpass.report.searched import Searched

SECTIONS = [
    "asked",
    "side",
    "latency",
    "blocks",
    "patches",
    "search",
    "recovery",
    "classes",
    "files",
    "kernels",
    "forecasts",
    "use",
]
EVIL = "<img src=x onerror=alert(1)>&\"'"
BLOCKS = [{"heads": 3, "qk_dim": 8, "v_dim": 8, "hidden": 40, "keep": 64}] * 2 + [
    {"heads": 2, "qk_dim": 8, "v_dim": 8, "hidden": 96, "keep": 30}
]


def report(directory: Path, *compare: Path) -> str:
    """The page of a run."""
    return write_report(directory, compare=compare).read_text()


@pytest.fixture(scope="module")
def bare(tiny_source: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A searched run, nothing exported or timed. Shared: copy it before changing it."""
    directory = tmp_path_factory.mktemp("bare") / "run"
    few = {"score_images": 64, "measure_images": 64, "batch_size": 32, "target_macs": 0.6}
    compress(make_recipe(data="digits", **few, **tiny_source), directory)
    return directory


@pytest.fixture(scope="module")
def whole(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with everything that can be made of it in a test. Shared: copy it before changing it."""
    directory = Path(shutil.copytree(bare, tmp_path_factory.mktemp("whole") / "run"))
    export_run(directory, ExportOptions())
    add_int8(directory)
    add_engine(directory)
    benchmark(directory, ["pytorch", "tensorrt"], [1], seconds=0.05)
    return directory


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture(scope="module")
def of_folders(make_vit: MakeViT, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on an image folder, one of whose classes has a name to beware of, and that folder."""
    folder = tmp_path_factory.mktemp("images") / "pictures"
    draw = np.random.default_rng(0)
    for name in ("a", "b", "c", "d", EVIL):
        for split, count in (("train", 6), ("val", 3)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    directory = tmp_path_factory.mktemp("of-folders") / "run"
    lowpass.compress(make_vit(), str(folder), directory, target_macs=0.7, yes=True, score_images=16, workers=0)
    return directory, folder


def test_the_page_is_complete(whole: Path) -> None:
    page = report(whole)
    outline, read = Outline(page), words(page)
    assert [name for name in outline.ids if name in SECTIONS] == SECTIONS
    assert not outline.wrong and len(set(outline.ids)) == len(outline.ids)
    assert outline.levels[0] == 1 and outline.levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(outline.levels, outline.levels[1:], strict=False))
    assert 'class="skip"' in page and "prefers-color-scheme: dark" in page and 'lang="en"' in page
    assert len(page.encode()) < 3e6 and page.count("data:image/png") == 8
    metrics = Metrics.load(whole)
    assert metrics.test_images == 1000 and "on 1,000 test images of digits" in read
    for figures in (metrics.dense, metrics.slim):
        assert f"{figures.top1:.2f} %" in read and f"{figures.macs / 1e6:.2f} M" in read
    assert "model.fp32.onnx" in read and "100.00 % of 1,000" in read and "99.25 % of 1,000" in read
    assert "where they would cost top-1: blocks.1.mlp.fc2.MatMul" in read
    assert "kept in FP32, where FP16 would overflow: blocks.0.mlp.fc1" in read
    assert "47 at 1" in read and "Kernels by block: model.int8.plan, batch 1" in read
    assert f"lowpass compress --recipe {whole / 'recipe.yaml'}" in read and "lowpass deploy" in read
    assert "tensorrt fp16 not measured:" in read  # a runtime that is not here, with the reason


def test_latencies_and_decisions_are_those_of_the_files(whole: Path) -> None:
    read = words(report(whole))
    one = json.loads((whole / "benchmark.json").read_text())["runtimes"]["pytorch"]["batches"]["1"]
    low, high = one["speedup_quartiles"]
    assert f"{one['speedup']:.2f}× ({low:.2f} to {high:.2f}) {one['efficiency']:.2f}" in read
    entries = [json.loads(line) for line in (whole / "search.jsonl").read_text().splitlines()[1:]]
    refits = [refit for entry in entries for refit in entry.get("refits", ())]
    assert refits and all(f"{refit['before']:.3g}" in read for refit in refits)
    searched = gather(whole).searched
    assert isinstance(searched, Searched)
    decided = [entry for entry in entries if "top1" in entry]
    assert [step.top1 for step in searched.decisions] == [entry["top1"] for entry in decided]
    changes = np.diff([entry["top1"] for entry in decided])
    assert [step.change for step in searched.decisions[1:]] == pytest.approx(changes)
    planned = next(entry for entry in entries if entry["kind"] == "plan")
    losses = {entry["block"]: entry["losses"]["hidden"] for entry in entries if entry["kind"] == "curve"}
    for index, row in enumerate(searched.plan):
        size = planned["blocks"][index]["hidden"]
        assert row.hidden_loss == next(option["loss"] for option in losses[index] if option["size"] == size)


def test_forecasts_are_marked_as_such(bare: Path) -> None:
    page = words(report(bare))
    assert "Not measured: what the models would take on GPUs that were not there" in page
    found = forecast_run(bare, Target(GPUS["a100"], "tensorrt", "fp16", (1, 8, 32)))
    assert found.slim is not None
    at = found.slim.batches[32]
    assert "a100, tensorrt fp16 32" in page and f"{at.ms:.2f} ({at.low_ms:.2f} to {at.high_ms:.2f})" in page
    assert "no latency of tensorrt on h100 was published" in page and "leave-one-GPU-out" in page


def test_classes_and_confusions_are_what_the_models_say(bare: Path) -> None:
    looked = gather(bare).looked
    assert isinstance(looked, Looked) and looked.images == looked.total == 1000
    scenes = DigitScenes("test", renders=2)
    images, labels = torch.stack([scenes[i][0] for i in range(1000)]), [scenes[i][1] for i in range(1000)]
    with torch.inference_mode():
        slim, dense = (SlimViT.load(bare, file)(images).argmax(-1).tolist() for file in (
            "slim.safetensors", DENSE_WEIGHTS_FILE))  # fmt: skip
    metrics = Metrics.load(bare)
    assert looked.slim_top1 == pytest.approx(metrics.slim.top1) and looked.dense_top1 == pytest.approx(
        metrics.dense.top1
    )
    for digit, found in enumerate(looked.classes):
        own = [i for i in range(1000) if labels[i] == digit]
        assert (found.name, found.images) == (str(digit), len(own))
        assert found.slim == pytest.approx(100 * sum(slim[i] == digit for i in own) / len(own))
        assert found.dense == pytest.approx(100 * sum(dense[i] == digit for i in own) / len(own))
    pairs = {(a, b): 0 for a in range(10) for b in range(10) if a != b}
    for said, label in zip(slim, labels, strict=True):
        pairs[label, said] = pairs.get((label, said), 0) + 1
    first = looked.confusions[0]
    assert first.slim == pairs[int(first.label), int(first.taken_for)]
    assert max(first.slim, first.dense or 0) == max(max(one.slim, one.dense or 0) for one in looked.confusions)
    right = [[said == label for said, label in zip(every, labels, strict=True)] for every in (dense, slim)]
    assert looked.only_one_right == tuple(
        sum(a and not b for a, b in zip(one, other, strict=True)) for one, other in (right, right[::-1])
    )
    assert [(p.label, p.slim, p.dense) for p in looked.pictures] == [
        (str(labels[p.number]), str(slim[p.number]), str(dense[p.number])) for p in looked.pictures
    ]


def test_what_was_not_measured_says_so(bare: Path) -> None:
    page = gather(bare)
    read = words(report(bare))
    assert page.benchmark == "not measured" and not page.files and not page.engines
    assert "speed-up over dense not measured" in read
    assert "Latency not measured" in read and "Nothing is exported." in read and "No TensorRT engine is built." in read
    assert "Speed-up" not in read and "Export it: nothing current is exported" in read


def test_figures_of_other_weights_are_not_shown(run: Path) -> None:
    slim = SlimViT.load(run)
    with torch.no_grad():
        slim.classifiers["head"].bias.add_(torch.linspace(0, 1, 10))
    slim.save(run)
    metrics = Metrics.load(run)
    metrics.model_copy(update={"slim": metrics.slim.model_copy(update={"top1": 42.0})}).save(run)
    read = words(report(run))
    assert "99.25 %" not in read and "100.00 % of 1,000" not in read
    assert read.count("stale, not shown: made from other weights than the run's present ones") == 2
    assert "47 at 1" not in read and "stale, not shown: built from another export" in read
    assert "lowpass evaluate" in read and "That is not what metrics.json says of the same images" in read
    # Latency does not hang on weights, but on the architecture.
    assert "Efficiency is the speed-up" in read


def test_files_of_another_architecture_are_not_shown(run: Path) -> None:
    slim = SlimViT.load(run)
    slim.set_keep(2, slim.blocks[2].keep - 3)
    slim.save(run)
    read = words(report(run))
    assert "metrics.json is of another model" in read and "top-1 of the slim model not measured" in read
    assert "benchmark.json is of another architecture" in read and "Efficiency is" not in read
    assert "search.jsonl does not lead to the run's present architecture" in read
    with pytest.raises(InputError, match=r"metrics\.json is of another model"):
        write_report(run, compare=[run.parent])


def test_what_a_verification_speaks_of_is_looked_at(run: Path) -> None:
    known = json.loads((run / VERIFICATION_FILE).read_text())
    gone = {"dense.fp16.onnx": known["model.fp32.onnx"]}
    damaged = {"model.fp32.onnx": {"sha256": 1}}
    other = {"model.int8.onnx": known["model.int8.onnx"] | {"sha256": "0" * 64}}
    write_json(run / VERIFICATION_FILE, gone | damaged | other)
    said = {file.name: file.stale or file.unverified for file in exported_files(run)}
    assert said == {
        "model.fp32.onnx": "verification.json cannot be read; export again",
        "dense.fp16.onnx": "the file is gone",
        "model.int8.onnx": "verification.json is of another file of this name",
    }
    (run / VERIFICATION_FILE).write_text("{")
    assert {file.unverified for file in exported_files(run)} == {"verification.json does not describe it"}
    (run / DENSE_WEIGHTS_FILE).unlink()
    assert "search.jsonl is of other dense weights" in words(report(run))


def test_names_are_escaped(of_folders: tuple[Path, Path]) -> None:
    directory, _ = of_folders
    page = report(directory)
    assert "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert not Outline(page).wrong


def test_a_folder_that_is_gone(of_folders: tuple[Path, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(of_folders[0], tmp_path / "run"))
    recipe = (directory / "recipe.yaml").read_text()
    for file in ("recipe.yaml", "metrics.json"):
        text = (directory / file).read_text()
        (directory / file).write_text(text.replace(str(of_folders[1]), "/gone/pictures"))
    page = report(directory)
    read = words(page)
    assert "/gone/pictures" not in recipe and "No pictures can be shown: there is no folder /gone/pictures" in read
    assert "Class by class Not measured: there is no folder" in read
    assert [name for name in Outline(page).ids if name in SECTIONS] == SECTIONS and "What cuts would lose" in read
    shown = write_report(directory, data=str(of_folders[1])).read_text()
    assert "No pictures can be shown" not in words(shown)
    with pytest.raises(InputError, match="there is no folder"):
        write_report(directory, data=str(tmp_path / "none"))


def test_random_weights(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"blocks": BLOCKS}))
    directory = tmp_path / "run"
    compress(make_recipe(model="tiny_deit", random_weights=True, architecture=table), directory)
    export_run(directory, ExportOptions())
    read = words(report(directory))
    assert "top-1 of the slim model not measured" in read and "top-1 not measured not measured –" in read
    assert "recovery off: there are no images" in read and "images that score made up: noise, seed 0" in read
    assert f"lowpass evaluate {directory} --data FOLDER" in read  # without images it could not
    assert "Layers in a higher precision" not in read  # of FP32 alone there are none
    assert "weights random, seed 0" in read and "No search to show: there is no search.jsonl" in read
    assert "noise: says nothing" in read and "No pictures can be shown: the run was made without images" in read


def test_an_imported_run(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    import_released(Path(__file__).parent / "data" / "checkpoint.pth", directory, 0.25, 0.85, data="digits")
    read = words(report(directory))
    assert "none: imported from" in read and "dense: not given" in read and "dense: not measured" in read
    assert "its top-1 is not measured" in read and "Dense: not measured." in read
    assert "lowpass import-vtc" in read and "--qk-scale 0.25 --cutoff 0.85 --data digits" in read
    assert "No search to show" in read and "No errors before and after recovery" in read


def test_images_in_memory(tiny_source: dict[str, Any], tmp_path: Path) -> None:
    data = DigitScenes("train", renders=2), DigitScenes("test")
    model = lowpass.load_model(tiny_source["model"], tiny_source["weights"])
    few = {"score_images": 32, "measure_images": 32, "batch_size": 32}
    made = lowpass.compress(model, data, tmp_path / "run", target_macs=0.6, yes=True, **few)
    assert "500 of the 500 test images of data in memory" in words(made.report().read_text())
    again = lowpass.Run(tmp_path / "run").report()
    read = words(again.read_text())
    assert "the run was made with images in memory" in read and "its images were in memory: the program" in read
    assert f"lowpass evaluate {tmp_path / 'run'} --data FOLDER" in read


def test_runs_side_by_side(whole: Path, bare: Path, tiny_source: dict[str, Any], tmp_path: Path) -> None:
    smaller = tmp_path / "smaller"
    few = {"score_images": 64, "measure_images": 64, "batch_size": 32, "target_macs": 0.4}
    compress(make_recipe(data="digits", **few, **tiny_source), smaller)
    benchmark(smaller, ["pytorch"], [1], seconds=0.05)
    page = gather(whole, compare=[smaller, bare])
    assert page.compared is not None
    by_macs, by_latency = page.compared.charts
    assert (by_macs.title, by_latency.title) == (
        "Top-1 against MACs",
        "Top-1 against latency: pytorch fp32, batch 1",
    )
    names = [shape.words for shape in by_macs.shapes if shape.kind == "text"]
    assert names == ["A", "A dense", "B"] or names == ["A", "A dense", "B", "C"]
    (row,) = page.compared.latencies
    assert row.cells[0] is not None and row.cells[1] is not None and row.cells[2] is None
    read = words(report(whole, smaller, bare))
    assert str(smaller) in read and "Latency of C: not measured." in read

    elsewhere = Path(shutil.copytree(smaller, tmp_path / "elsewhere"))
    for file, field in (("metrics.json", {"data": "other"}), ("benchmark.json", None)):
        content = json.loads((elsewhere / file).read_text())
        if field is None:
            content["machine"]["cores"] = 96
        write_json(elsewhere / file, content | (field or {}))
    page = gather(whole, compare=[elsewhere])
    assert page.compared is not None and page.compared.charts == () and page.compared.latencies == ()
    read = words(report(whole, elsewhere))
    assert "B is not drawn: top-1 is of other images: 1,000 of other, not 1,000 of digits" in read
    assert "B: its latencies are of another machine" in read and "Nothing to draw" in read
    with pytest.raises(InputError, match="is there twice"):
        write_report(whole, compare=[whole])
    with pytest.raises(InputError, match=r"recipe\.yaml|metrics\.json"):
        write_report(whole, compare=[tmp_path])


def test_made_twice_it_is_the_same(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


@pytest.mark.slow
def test_by_command(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(bare, tmp_path / "run"))
    command = [sys.executable, "-m", "lowpass", "report", str(run), "--images", "20", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    told = json.loads(done.stdout)
    assert told == {
        "run": str(run),
        "report": str(run / "report.html"),
        "bytes": (run / "report.html").stat().st_size,
        "compared": [],
    }
    assert "on 20 of the 1,000 test images" in words((run / "report.html").read_text())
    other = Path(shutil.copytree(bare, tmp_path / "other"))
    assert answer(capsys, "report", str(run), "--compare", str(other))["compared"] == [str(other)]
    by_api = lowpass.Run(run).report([other])
    assert by_api == run / "report.html" and "Runs side by side" in by_api.read_text()
    assert "run directory" in refusal(capsys, "report", str(tmp_path / "none"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser(whole: Path, of_folders: tuple[Path, Path], bare: Path, tmp_path: Path) -> None:
    pages = [write_report(whole, compare=[bare]), write_report(of_folders[0])]
    with Browser(tmp_path / "profile") as browser:
        for page in pages:
            for width in (360, 1280):
                browser.open(page, width)
                browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
                sizes = browser.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
                assert sizes[0] == sizes[1] <= width
        colours = []
        for theme in ("light", "dark"):
            browser.open(pages[0], 1280, theme)  # type: ignore[arg-type]
            colours.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert colours == ["rgb(255, 255, 255)", "rgb(20, 24, 27)"]
        assert browser.complaints == []
        assert {url.partition(":")[0] for url in browser.requests} == {"file", "data"}


def test_a_model_that_drops_no_tokens(of_folders: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(of_folders[0], tmp_path / "run"))
    slim = SlimViT.load(run)
    for index in range(len(slim.blocks)):
        slim.blocks[index].set_tokens(16, 16)
    slim.save(run)
    assert "The model drops no patches" in words(report(run))
