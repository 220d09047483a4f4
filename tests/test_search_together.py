"""Several processes search as one: the same decisions and weights, one writer, and an end for all when one ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import command, together
from safetensors.torch import load_file
from test_resume import RESULTS

from lowpass.pipeline.base import files
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.launched import rank, started_together
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.recipe import Recipe, make_recipe
from lowpass.pipeline.search.shaping import make_shaping
from lowpass.pipeline.search.state import SearchState

TABLE = [
    {"heads": 2, "qk_dim": 8, "v_dim": 8, "hidden": 96, "keep": 64},
    {"heads": 2, "qk_dim": 5, "v_dim": 7, "hidden": 0, "keep": 40},
    {"heads": 0, "qk_dim": 0, "v_dim": 0, "hidden": 61, "keep": 40},
]
PAPER = make_shaping("tensorrt", as_published=True)
SEARCHES: dict[str, dict[str, Any]] = {
    "planned": {"target_macs": 0.6, "score_images": 72, "measure_images": 104, "batch_size": 16},  # batches: 5 and 7
    "planned by LFS": {
        "target_macs": 0.5, "channel_criterion": "lfs", "shaping": PAPER, "score_images": 30, "batch_size": 6,
    },
    "a cascade": {
        "allowable_drop": 30.0, "sub_blocks": True, "score_images": 72, "measure_images": 104, "batch_size": 16,
    },
    "a cascade by LFS": {
        "allowable_drop": 30.0, "channel_criterion": "lfs", "shaping": PAPER, "score_images": 40, "measure_images": 70,
        "batch_size": 14,
    },
    "fewer batches than processes": {
        "allowable_drop": 30.0, "score_images": 24, "measure_images": 30, "batch_size": 32,
    },
    "a table, top-down": {"architecture": "table.json", "order": "top-down", "score_images": 40, "batch_size": 16},
    "a table, taylor": {
        "architecture": "table.json", "channel_criterion": "taylor", "score_images": 20, "batch_size": 32,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def recipes(tiny_source: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    table = tmp_path_factory.mktemp("table") / "table.json"
    table.write_text(json.dumps({"blocks": TABLE}))
    named = {"measure_images": 60, "data": "digits"} | tiny_source
    found = {}
    for name, asked in SEARCHES.items():
        where = {"architecture": table} if "architecture" in asked else {}
        found[name] = make_recipe(**(named | asked | where))
    return found


def one_writer() -> None:
    """From here on the others may not."""

    def refuse(path: Path) -> Any:
        raise AssertionError(f"process {rank()} writes {path}")

    if rank():
        files.replacing = refuse


def search(recipe: Recipe, directory: Path, resume: bool = False) -> None:
    torch.set_num_threads(1)
    compress(recipe, directory, resume=resume)


def all_of_them(recipes: dict[str, Recipe], directory: Path) -> int:
    one_writer()
    for name, recipe in recipes.items():
        search(recipe, directory / name)
    return started_together()


def decisions(directory: Path) -> list[dict[str, Any]]:
    """With figures that hang on the last bits of sums, such as losses and errors, left to `approx`."""
    lines = [json.loads(line) for line in (directory / "search.jsonl").read_text().splitlines()]
    for line in lines:
        for refit in line.get("refits", ()):
            for name in ("before", "after"):
                refit[name] = pytest.approx(refit[name], rel=1e-3)
        for option in [option for part in line.get("losses", {}).values() for option in part]:
            option["loss"] = pytest.approx(option["loss"], rel=1e-3, abs=1e-9)
    return lines


def check_same(one: Path, other: Path) -> None:
    """Figures, table, decisions and, but for rounding, weights."""
    for name in ("architecture.json", "metrics.json", "recipe.yaml", "classes.json", "inputs.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    if (one / "search.jsonl").exists():
        assert decisions(one) == decisions(other)
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir())
    weights, others = (load_file(run / "slim.safetensors") for run in (one, other))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for name, recipe in recipes.items():
        search(recipe, folder / name)
    return folder


def test_two_processes_search_as_one(recipes: dict[str, Recipe], alone: Path, tmp_path: Path) -> None:
    assert together(all_of_them, recipes, tmp_path) == [2, 2]
    for name in recipes:
        check_same(alone / name, tmp_path / name)
    tables = {(tmp_path / name / "architecture.json").read_text() for name in recipes}
    assert len(tables) > 4  # they were searches of different kinds
