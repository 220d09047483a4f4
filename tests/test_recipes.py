"""Recipe files, and `--dry-run`: what a recipe would cost is known before anything is run, and nothing is written."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import answer, refusal
from conftest import MakeViT
from PIL import Image

from lowpass.benchmarks.search_cost.benchmark import counted, ours
from lowpass.cli import main
from lowpass.pipeline.data.datasets import made_batches
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.estimate import estimate
from lowpass.pipeline.run.measure import Rates, hours, measure
from lowpass.pipeline.run.recipe import Recipe, read_recipe
from lowpass.pipeline.search.settings import TOLD_BY
from lowpass.pipeline.search.shaping import AS_PUBLISHED, SHAPINGS
from lowpass.pipeline.train.settings import FinetuneSettings, finetune_settings

RECIPES = Path(__file__).parent.parent / "recipes"
# What the paper reports: top-1, MACs.
PAPER = {"tiny": ("71.6%", 0.7e9), "small": ("79.4%", 2.1e9), "base": ("81.3%", 7.5e9)}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand classes of one image to train and one to test on."""
    root = tmp_path_factory.mktemp("imagenet")
    image = root / "any.png"
    Image.new("RGB", (8, 8)).save(image)
    for split in ("train", "val"):
        for label in range(1000):
            folder = root / split / f"n{label:08}"
            folder.mkdir(parents=True)
            (folder / "0.png").hardlink_to(image)
    image.unlink()
    return root


@pytest.mark.parametrize("size", PAPER)
def test_imagenet_recipes(
    size: str, imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = RECIPES / f"deit_{size}_imagenet.yaml"
    heading = path.read_text().partition("\n\n")[0]
    top1, macs = PAPER[size]
    assert f"--recipe recipes/{path.name}" in heading and top1 in heading and "not been run" in heading
    told = answer(capsys, "compress", "--recipe", str(path), "--data", str(imagenet), "--dry-run")
    assert told["slim_macs"] == pytest.approx(macs, rel=0.01) and told["weights"] is None
    assert told["train_images"] == told["test_images"] == told["scored_images"] == 1000
    assert told["measured_images"] == TOLD_BY
    epochs = told["finetune_epochs"]
    assert 150 <= epochs <= 300 and told["finetune_images"] == epochs * 896  # whole batches of 128
    assert told["finetune_macs"] == told["finetune_images"] * (3 * told["slim_macs"] + told["dense_macs"])
    assert told["test_macs"] == 1000 * (told["dense_macs"] + told["slim_macs"])
    assert told["search_macs"] == told["search_image_forwards"] * told["dense_macs"]
    assert told["total_macs"] == told["search_macs"] + told["test_macs"] + told["finetune_macs"]
    assert list(tmp_path.iterdir()) == []


def test_imagenet_recipes_agree_with_the_paper() -> None:
    for size in PAPER:
        recipe = read_recipe(RECIPES / f"deit_{size}_imagenet.yaml", data="imagenet")
        assert recipe.shaping == AS_PUBLISHED and (recipe.score_images, recipe.measure_images) == (2000, 5000)
        assert recipe.finetune is not None and 0.1 <= recipe.finetune.distill_weight <= 0.25


@pytest.mark.parametrize(("name", "top1", "macs"), [("2.6g", "81.13%", 2.61e9), ("1.2g", "77.50%", 1.21e9)])
def test_recipes_after_the_records(
    name: str, top1: str, macs: float, imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = RECIPES / f"deit_base_to_{name}_imagenet.yaml"
    heading = path.read_text().partition("\n\n")[0]
    assert f"--recipe recipes/{path.name}" in heading and top1 in heading and "not been run" in heading
    words = ("compress", "--recipe", str(path), "--data", str(imagenet), "--out", str(tmp_path / "run"))
    told = answer(capsys, *words, "--dry-run")
    assert told["slim_macs"] == pytest.approx(macs, rel=0.01) and told["finetune_epochs"] == 300
    line = refusal(capsys, *words, "--ship")
    assert "regnety_160.safetensors, the teacher's weights of the recipe, is no file" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("goal", [{"allowable_drop": 30}, {"target_macs": 0.5}])
def test_the_search_is_estimated_within_a_factor_of_two(goal: dict[str, float], make_vit: MakeViT) -> None:
    model = SlimViT.from_timm(make_vit(img_size=24, embed_dim=48, depth=3))
    made = made_batches(model.architecture, 32, 32, seed=0)
    with torch.no_grad():
        batches = [(images, model(images).argmax(-1)) for images, _ in made]
    recipe = Recipe(model="tiny", data="made", shaping=SHAPINGS["onnxruntime"], **goal)
    told = estimate(recipe, model.architecture, None, 32, 0, FinetuneSettings(), None)
    cost = counted(model, partial(ours, scoring=batches, measuring=batches, recipe=recipe))
    assert 0.5 < told.search_image_forwards / cost.image_forwards < 2


def _write(path: Path, **changes: object) -> Path:
    settings = {"model": "digits_deit", "data": "digits", "target_macs": 0.8, "score_images": 64, "measure_images": 64}
    path.write_text(yaml.safe_dump(settings | changes))
    return path


def test_a_recipe_is_run_and_remembers_how_to_be_fine_tuned(
    tmp_path: Path, slim_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {"target_macs": None, "architecture": str(slim_table), "random_weights": True, "data": None}
    file = _write(tmp_path / "recipe.yaml", **table, finetune={"epochs": 1, "lr": 1e-3})
    run = tmp_path / "run"
    told = answer(capsys, "compress", "--recipe", str(file), "--out", str(run), "--dry-run")
    assert not run.exists() and told["finetune_epochs"] == 1 and told["measured_images"] == 0
    made = answer(capsys, "compress", "--recipe", str(file), "--out", str(run))
    assert (made["slim"]["macs"], made["dense"]["macs"]) == (told["slim_macs"], told["dense_macs"])
    recipe = Recipe.load(run)
    assert recipe == read_recipe(file) and recipe.finetune == FinetuneSettings(epochs=1, lr=1e-3)
    assert finetune_settings("digits", {"lr": 1e-4}, recipe.finetune) == FinetuneSettings(epochs=1, lr=1e-4)
    assert finetune_settings("digits", {}) == FinetuneSettings.for_digits()
    with pytest.raises(SystemExit):
        main(["compress", "--recipe", str(file), "--out", str(run), "--dry-run"])
    assert "already holds a run" in capsys.readouterr().err
    again = answer(capsys, "compress", "--recipe", str(file), "--out", str(run), "--resume", "--dry-run")
    assert again | {"least_bytes": 0} == told | {"least_bytes": 0}


def test_hours_follow_from_rates() -> None:
    """A step of fine-tuning is four forwards of the dense model; what it reads comes on top on a CPU alone."""
    rates = Rates(device="cpu", seconds=1, forward=100, trained=25, read=50, peak_bytes=1)
    macs = {"dense_macs": 10, "search_macs": 3600 * 1000, "test_macs": 1000, "finetune_macs": 3600 * 1000}
    one = hours(rates, **macs, images=3600 * 50)
    assert (one.search, one.test, one.finetune) == pytest.approx((1.0, 1 / 3600, 2.0))
    assert one.total == pytest.approx(one.search + one.test + one.finetune)
    gpu = hours(rates.model_copy(update={"device": "cuda"}), **macs, images=3600 * 50)
    assert gpu.finetune == pytest.approx(1.0)


def test_a_dry_run_that_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowpass.pipeline.run.dry_run.measure", partial(measure, seconds=1.0))
    words = ("compress", "--recipe", str(_write(tmp_path / "recipe.yaml")), "--out", str(tmp_path / "run"))
    assert "--measure is for --dry-run" in refusal(capsys, *words, "--measure")
    told = answer(capsys, *words, "--dry-run", "--measure")
    rates = told["hours"]["rates"]
    assert min(rates["forward"], rates["trained"], rates["read"], rates["peak_bytes"]) > 0
    assert rates["trained"] < rates["forward"]
    assert told["hours"]["search"] == pytest.approx(told["search_macs"] / told["dense_macs"] / rates["forward"] / 3600)
    assert answer(capsys, *words, "--dry-run")["hours"] is None and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, ["--target-macs", "0.5"], ["--recipe settles --target-macs"]),
        ({}, ["--model", "digits_deit"], ["--recipe settles --model"]),
        ({}, ["--seed", "0"], ["--recipe settles --seed"]),
        ({}, ["--data", "nowhere"], ["no folder nowhere"]),
        ({}, ["--weights", "none.pth"], ["none.pth"]),
        ({"target_macs": 0.001}, [], ["out of reach"]),
        ({"target_mac": 0.5}, [], ["recipe.yaml: target_mac:"]),
        ({"finetune": {"epochs": 0}}, [], ["recipe.yaml: finetune.epochs:"]),
        ({"target_macs": None, "target_latency": 5, "runtime": "abacus"}, [], ["abacus"]),
        ({"allowable_drop": 3}, [], ["recipe.yaml: give exactly one of"]),
        ({"data": None}, [], ["recipe.yaml: give --data"]),
        ({"released": "checkpoint.pth"}, [], ["import-vtc"]),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_refused_before_anything_is_written(
    changes: dict[str, Any],
    options: list[str],
    words: list[str],
    dry: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = _write(tmp_path / "recipe.yaml", **changes)
    line = refusal(
        capsys, "compress", "--recipe", str(file), "--out", str(tmp_path / "run"), *options, *["--dry-run"][: int(dry)]
    )
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model NAME, or --recipe" in refusal(capsys, "compress")
    file = tmp_path / "recipe.yaml"
    assert "cannot read the recipe" in refusal(capsys, "compress", "--recipe", str(file))
    for content in ("- a list", "model: [", ""):
        file.write_text(content)
        assert "is not a recipe" in refusal(capsys, "compress", "--recipe", str(file))
