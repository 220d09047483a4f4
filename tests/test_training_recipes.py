"""The comparison of fine-tuning recipes leaves the runs that it is given alone, and does nothing twice."""

from pathlib import Path
from typing import Any

import pytest

import lowpass.benchmarks.training.recipes as recipes
from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.rows import Origin, Row, kept_rows, read_rows, write_rows
from lowpass.pipeline.base.files import sha256
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.recipe import make_recipe

ORIGIN = Origin("a machine", "its versions", "a commit", "a command")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, tiny_source: dict[str, Any]) -> Path:
    directory = tmp_path_factory.mktemp("searched") / "run"
    few = {"score_images": 32, "measure_images": 32}
    compress(make_recipe(**tiny_source, data="digits", target_macs=0.6, seed=3, **few), directory)
    return directory


def rows(searched: Path, work: Path, **changes: Any) -> list[Row]:
    variants = ["default", "labels alone"]
    return list(recipes.compared({3: searched}, variants, {"epochs": 1} | changes, 128, 100, work, ORIGIN))


def test_a_row_a_recipe_and_the_run_as_it_was(searched: Path, tmp_path: Path) -> None:
    before = {file.name: sha256(file) for file in searched.iterdir() if file.is_file()}
    found = rows(searched, tmp_path / "work")
    assert {file.name: sha256(file) for file in searched.iterdir() if file.is_file()} == before
    assert [(row.of["variant"], row.figure) for row in found] == [
        (variant, figure) for variant in ("default", "labels alone") for figure in recipes.FIGURES
    ]
    values = {(row.of["variant"], row.figure): row.value for row in found}
    for figure in ("macs_share", "top1_dense", "top1_no_training"):  # what training does not touch
        assert values["default", figure] == values["labels alone", figure]
    assert found[0].of == {
        "model": "tiny_deit",
        "variant": "default",
        "target": 0.6,
        "seed": 3,
        "epochs": 1,
        "images": 128,
    }
    write_rows(tmp_path / "training_recipes.csv", found, describe(), "a command")
    assert read_rows(tmp_path / "training_recipes.csv")[0]["commit"] == "a commit"
    table = recipes.training_recipes(tmp_path).splitlines()
    assert [line.split("|")[4].strip() for line in table[2:]] == ["default", "labels alone"]


def test_what_is_finished_is_not_trained_again(searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows(searched, tmp_path)
    trained = list[str]()
    train = recipes.finetune
    monkeypatch.setattr(recipes, "finetune", lambda *given: trained.append("one") or train(*given))
    assert rows(searched, tmp_path) == first
    assert not trained
    rows(searched, tmp_path, lr=1e-3)  # another training of the same length
    assert len(trained) == 2


def test_rows_of_other_recipes_stay(searched: Path, tmp_path: Path) -> None:
    found = rows(searched, tmp_path / "work")
    csv = tmp_path / "rows.csv"
    write_rows(csv, found, describe(), "a command")
    anew = [row for row in found if row.of["variant"] == "default"]
    merged = recipes.beside(kept_rows(csv, {"figure": ""}), anew)
    assert [(row.of["variant"], row.figure) for row in merged] == [
        (variant, figure) for variant in ("labels alone", "default") for figure in recipes.FIGURES
    ]
