"""Several processes search as one: the same decisions and weights, one writer, and an end for all when one ends."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import together
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch.utils.data import TensorDataset

from lowpass.pipeline.base import files
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.launched import rank, started_together
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.recipe import IN_MEMORY, Recipe, make_recipe
from lowpass.pipeline.search.shaping import make_shaping
from lowpass.pipeline.search.state import Cut, SearchState

CLASSES, EXACT = 5, 1e-9
# Of what is looked at: few enough for the searches here to meet them in the midst of their batches.
LIMITS = {
    "search.PROFILE_SCORED": 60,
    "state.REFIT_ROWS": 17 * 50,
    "obs_scores.OBSERVED_TOKENS": 17 * 35,
    "loss_curves.PROFILED_IMAGES": 40,
    "error_metric.METRIC_IMAGES": 43,
    "error_metric.IMAGES_AT_ONCE": 5,
}
PATCH = pytest.MonkeyPatch()  # of processes of their own, which end with it
TABLE = [
    {"heads": 2, "qk_dim": 8, "v_dim": 8, "hidden": 80, "keep": 16},
    {"heads": 2, "qk_dim": 5, "v_dim": 7, "hidden": 0, "keep": 12},
    {"heads": 0, "qk_dim": 0, "v_dim": 0, "hidden": 61, "keep": 12},
]
PAPER = make_shaping("tensorrt", as_published=True)
PARTS = make_shaping("tensorrt", False, align=8, token_stages=2)
SEARCHES: dict[str, dict[str, Any]] = {
    "planned": {"target_macs": 0.6, "shaping": PARTS, "score_images": 72, "batch_size": 16},  # batches: 5 and 7
    "planned by LFS": {"target_macs": 0.5, "channel_criterion": "lfs", "shaping": PAPER, "batch_size": 24},
    "a cascade": {"allowable_drop": 40.0, "sub_blocks": True, "shaping": PARTS, "score_images": 72, "batch_size": 16},
    "a cascade by LFS": {
        "allowable_drop": 40.0, "channel_criterion": "lfs", "shaping": PAPER, "score_images": 72, "batch_size": 14,
    },
    "fewer batches than processes": {
        "allowable_drop": 40.0, "shaping": PARTS, "score_images": 100, "measure_images": 100, "batch_size": 128,
    },
    "a table, top-down": {"architecture": "table", "order": "top-down", "score_images": 40, "batch_size": 16},
    "a table, taylor": {"architecture": "table", "channel_criterion": "taylor", "score_images": 20, "batch_size": 32},
}  # fmt: skip


def made() -> tuple[VisionTransformer, tuple[TensorDataset, TensorDataset]]:
    """A model, and images that are what it takes them for: it has something to lose."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        images = torch.randn(300, 3, 16, 16)
        data = TensorDataset(images, model.eval()(images).argmax(-1))
    return model, (data, data)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    table = tmp_path_factory.mktemp("table") / "table.json"
    table.write_text(json.dumps({"blocks": TABLE}))
    found = {}
    for name, asked in SEARCHES.items():
        where = {"architecture": table} if "architecture" in asked else {}
        found[name] = make_recipe(**{"model": "made", "data": IN_MEMORY, "measure_images": 104, **asked, **where})
    return found


def one_writer() -> None:
    """From here on the others may not."""

    def refuse(path: Path) -> Any:
        raise AssertionError(f"process {rank()} writes {path}")

    if rank():
        PATCH.setattr(files, "replacing", refuse)


def search(recipe: Recipe, directory: Path, resume: bool = False) -> None:
    torch.set_num_threads(1)
    model, data = made()
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in LIMITS.items():
            patch.setattr(f"lowpass.pipeline.search.{name}", limit)
        compress(recipe, directory, resume=resume, model=model, data=data)


def all_of_them(recipes: dict[str, Recipe], directory: Path) -> int:
    one_writer()
    for name, recipe in recipes.items():
        search(recipe, directory / name)
    return started_together()


def decisions(directory: Path) -> list[dict[str, Any]]:
    """With losses and errors left to `approx`: they hang on the last bits of sums. Where nothing is left to mend, so
    does whether a refit is taken."""
    lines = [json.loads(line) for line in (directory / "search.jsonl").read_text().splitlines()]
    for line in lines:
        for refit in line.get("refits", ()):
            if refit["before"] < EXACT:
                refit["ridge"] = None
            for name in ("before", "after"):
                refit[name] = pytest.approx(refit[name], rel=1e-6, abs=EXACT)
        for option in [option for part in ("attention", "hidden", "tokens") for option in _options(line, part)]:
            option["loss"] = pytest.approx(option["loss"], rel=1e-6, abs=EXACT)
    return lines


def _options(line: dict[str, Any], part: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = line.get("losses", {}).get(part, [])
    return found


def check_same(one: Path, other: Path) -> None:
    """Figures, table, decisions and, but for rounding, weights."""
    for name in ("architecture.json", "metrics.json", "recipe.yaml", "inputs.json"):
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


@pytest.fixture(scope="module")
def shared(recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    assert together(all_of_them, recipes, folder) == [2, 2]
    return folder


def test_two_processes_search_as_one(recipes: dict[str, Recipe], alone: Path, shared: Path) -> None:
    for name in recipes:
        check_same(alone / name, shared / name)
    tables = {(shared / name / "architecture.json").read_text() for name in recipes}
    assert len(tables) > 4  # they were searches of different kinds


def killed(recipe: Recipe, directory: Path, block: int, resume: bool) -> None:
    """The second process dies at a block."""
    ascend = SearchState.ascend

    def dying(state: SearchState) -> None:
        if rank() == 1 and state.measured and state.index == block:
            os.kill(os.getpid(), signal.SIGKILL)
        ascend(state)

    PATCH.setattr(SearchState, "ascend", dying)
    search(recipe, directory, resume)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["planned by LFS", "a cascade"])
def test_one_that_dies_ends_all_and_any_number_goes_on(
    name: str, recipes: dict[str, Recipe], alone: Path, shared: Path, tmp_path: Path
) -> None:
    """Two, then three, then one; as many as before end with the bytes of those that were never interrupted."""
    run = tmp_path / "run"
    first, second = together(killed, recipes[name], run, 0, False)
    assert second is None and isinstance(first, RunError) and "the processes have lost each other" in str(first)
    begun = (run / "search.jsonl").read_text()
    assert len(begun.splitlines()) >= 2 and not (run / "metrics.json").exists()
    results = together(killed, recipes[name], run, 1, True, count=3)
    assert results[1] is None and {type(results[0]), type(results[2])} == {RunError}
    assert (run / "search.jsonl").read_text().startswith(begun)
    search(recipes[name], run, resume=True)
    check_same(alone / name, run)
    both = tmp_path / "both"
    together(killed, recipes[name], both, 1, False)
    assert together(search, recipes[name], both, True) == [None, None]
    for file in ("search.jsonl", "architecture.json", "slim.safetensors", "metrics.json"):
        assert (both / file).read_bytes() == (shared / name / file).read_bytes()
    assert together(search, recipes[name], both, True) == [None, None]  # which has ended


def deciding_otherwise(recipe: Recipe, directory: Path) -> None:
    divergence = SearchState.divergence
    PATCH.setattr(SearchState, "divergence", lambda *given: divergence(*given) + 1e-6 * rank())
    search(recipe, directory)


def with_other_weights(recipe: Recipe, directory: Path) -> None:
    accept = SearchState.accept

    def differently(state: SearchState, cut: Cut) -> None:
        with torch.no_grad():
            cut.block.norm1.bias.add_(1e-6 * rank())
        accept(state, cut)

    PATCH.setattr(SearchState, "accept", differently)
    search(recipe, directory)


def with_other_weights_last(recipe: Recipe, directory: Path) -> None:
    refit = SearchState.refit_classifier

    def differently(state: SearchState) -> Any:
        done = refit(state)
        with torch.no_grad():
            state.model.vit.norm.bias.add_(1e-6 * rank())
        return done

    PATCH.setattr(SearchState, "refit_classifier", differently)
    search(recipe, directory)


def with_other_images(recipe: Recipe, directory: Path) -> None:
    torch.set_num_threads(1)
    model, (train, test) = made()
    train.tensors[0][rank()] += 1
    compress(recipe, directory, model=model, data=(train, test))


def asking_otherwise(recipe: Recipe, directory: Path) -> None:
    search(recipe.model_copy(update={"seed": rank()}), directory)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (deciding_otherwise, r"decision 1 \(curve\) is not the same in all processes"),
        (with_other_weights, "block 0 is not the same in all processes"),
        (with_other_weights_last, "the slim model is not the same in all processes"),
        (with_other_images, "what goes into the search is not the same"),
        (asking_otherwise, "what is asked for is not the same"),
    ],
)
def test_no_process_goes_its_own_way(work: Any, said: str, recipes: dict[str, Recipe], tmp_path: Path) -> None:
    for error in together(work, recipes["planned"], tmp_path / "run"):
        assert isinstance(error, RunError) and re.search(said, str(error)), error
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert (tmp_path / "run" / "search.jsonl").exists() == (work in (with_other_weights, with_other_weights_last))


def test_a_target_out_of_reach_is_told_by_the_first(recipes: dict[str, Recipe], tmp_path: Path) -> None:
    """And nothing is left behind."""
    recipe = recipes["planned"].model_copy(update={"target_macs": 0.01})
    first, second = together(search, recipe, tmp_path / "run")
    assert isinstance(first, InputError) and "out of reach" in str(first)
    assert type(second).__name__ == "ElsewhereError" and "process 0: " in str(second)
    assert not (tmp_path / "run").exists()


COMMAND = """
import os, signal
from lowpass.cli import main
from lowpass.pipeline.search.state import SearchState

ascend = SearchState.ascend

def dying(state):
    if os.environ["RANK"] == "1" and state.measured and state.index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    ascend(state)

if "DIES" in os.environ:
    SearchState.ascend = dying
main()
"""


@pytest.mark.slow
def test_by_torchrun_and_accelerate(tmp_path: Path) -> None:
    """One killed is exit code 1; then one of them answers, and one tells how far it is."""
    script, run = tmp_path / "command.py", tmp_path / "run"
    script.write_text(COMMAND)
    torchrun = "torch.distributed.run --standalone --nproc-per-node 2"
    accelerate = "accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"
    images = {"score_images": 64, "measure_images": 96, "target_macs": 0.6, "batch_size": 32}
    options = [text for name, value in images.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    asked = ["compress", "--model", "digits_deit", "--data", "digits", *options, "--out", str(run), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def launched(launcher: str, *more: str, **others: str) -> subprocess.CompletedProcess[str]:
        full = [sys.executable, "-m", *launcher.split(), str(script), *asked, *more]
        return subprocess.run(full, capture_output=True, text=True, env=environment | others, timeout=300, check=False)

    done = launched(torchrun, DIES="")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("plan: ") == 1 and not (run / "metrics.json").exists()
    done = launched(accelerate, "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(run)
    assert done.stderr.count("resuming after the decisions") == done.stderr.count("classifier refitted") == 1
    compress(make_recipe(model="digits_deit", data="digits", **images), tmp_path / "alone")
    check_same(tmp_path / "alone", run)
