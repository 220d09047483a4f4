"""A training survives kills at any moment and full disks, and several processes train as one."""

import csv
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from children import started
from conftest import MadeOnce
from safetensors.torch import load_file
from test_trials import scenes
from written import write_shards

import lowpass
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import PART
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.finetune import finetune_run
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.run.recipe import Recipe, make_recipe

RESULTS = ("slim.safetensors", "architecture.json", "metrics.json", "pruned.safetensors")
SETTINGS = {"epochs": 2, "batch_size": 128, "lr": 4e-3}
TABLE = {"heads": 2, "qk_dim": 8, "v_dim": 8, "hidden": 64, "keep": 40}


@pytest.fixture(scope="module")
def searched(tiny_source: dict[str, object], made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model that was not trained."""
    table = tmp_path_factory.mktemp("table") / "table.json"
    table.write_text(json.dumps({"blocks": 3 * [TABLE]}))
    recipe = make_recipe(**tiny_source, data="digits", architecture=table, score_images=64)
    return made_once("tiny-run", lambda directory: compress(recipe, directory))


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def train(run: Path, data: str | None = None, **settings: Any) -> Metrics:
    """In this process, in mid-epoch saved after every step."""
    torch.set_num_threads(1)
    return finetune_run(run, data, SETTINGS | settings, None, resume=True, save_minutes=0)


def results(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def trained(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, trained without a break."""
    run = copy(searched, tmp_path_factory.mktemp("trained") / "run")
    finetune_run(run, None, SETTINGS, None)
    return run


def test_what_training_leaves(searched: Path, trained: Path) -> None:
    assert not (trained / "training").exists()
    assert (trained / "pruned.safetensors").read_bytes() == (searched / "slim.safetensors").read_bytes()
    with (trained / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    losses = [float(row["loss"]) for row in rows]
    assert losses[1] < losses[0] and all(int(row["images"]) == 10 * 128 for row in rows)
    assert all(0 <= float(row["reading_share"]) < 1 and float(row["images_per_s"]) > 0 for row in rows)


def test_ten_kills_change_nothing(searched: Path, trained: Path, tmp_path: Path) -> None:
    """At ten random moments, in mid-epoch and in the making of files too; the last of each three is let go on."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["lowpass.pipeline.run.finetune", "tiny"])
    process = started(forks, train, copy(searched, tmp_path / "timed"))
    began = time.monotonic()
    process.join()
    seconds, draw, interrupted = time.monotonic() - began, random.Random(0), 0
    assert results(tmp_path / "timed") == results(trained)  # saving changes nothing
    run, kills = copy(searched, tmp_path / "0"), 0
    while kills < 10:
        process = started(forks, train, run)
        process.join(draw.uniform(0.05, 0.6) * seconds)
        process.kill()
        process.join()
        kills += 1
        interrupted += (run / "training").exists()
        for file in run.glob("[!.]*.safetensors"):
            assert load_file(file)
        if kills % 3 == 0 or kills == 10:
            train(run)
            assert results(run) == results(trained)
            assert not list(run.glob(".*")) and not (run / "training").exists()
            run = copy(searched, tmp_path / str(kills))
    assert interrupted >= 5


@pytest.mark.parametrize("saved", [False, True], ids=["weights", "figures"])
def test_a_kill_in_the_making_of_the_result_leaves_no_part(
    searched: Path, trained: Path, tmp_path: Path, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the weights are written, or the figures behind them."""
    run = copy(searched, tmp_path / "run")

    def killed(_: object, directory: Path) -> None:
        (directory / f".half-written{PART}").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Metrics if saved else SlimViT, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert list(run.glob(".*"))
    train(run)
    assert results(run) == results(trained) and not list(run.glob(".*"))
    (run / f".half-written{PART}").touch()
    train(run)  # which has ended
    assert results(run) == results(trained) and not list(run.glob(".*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_goes_on_where_it_was(
    searched: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-epoch, with real pictures, whoever reads them."""
    data = str(scenes(tmp_path / "images", list("0123456789"), 60, 20))
    settings = {"epochs": 2, "batch_size": 8}
    for name in ("whole", "broken"):
        run = copy(searched, tmp_path / name)
        recipe = Recipe.load(run)
        recipe.model_copy(update={"workers": workers if name == "broken" else 0}).save(run)
    train(tmp_path / "whole", data, **settings)
    steps, backward = [], torch.Tensor.backward

    def interrupted(self: torch.Tensor, *arguments: Any, **others: Any) -> None:
        steps.append(1)
        if len(steps) in (5, 9):
            raise KeyboardInterrupt
        backward(self, *arguments, **others)

    monkeypatch.setattr(torch.Tensor, "backward", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", data, **settings)
    train(tmp_path / "broken", data, **settings)
    assert len(steps) == 2 * 7 + 2  # no step was done twice but those that were broken off
    assert results(tmp_path / "broken") == results(tmp_path / "whole")


def interrupted(searched: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose training was broken off in its second epoch."""
    run, calls, backward = copy(searched, to), [], torch.Tensor.backward

    def broken(self: torch.Tensor, *arguments: Any, **others: Any) -> None:
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        backward(self, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", broken)
        with pytest.raises(KeyboardInterrupt):
            finetune_run(run, None, SETTINGS, None)
    return run


def test_an_interrupted_training_is_never_lost_in_silence(
    searched: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = interrupted(searched, tmp_path / "run", monkeypatch)
    before = results(run) | {"training": b"".join(sorted(map(bytes, (run / "training").rglob("*"))))}
    with pytest.raises(InputError, match="was interrupted: --resume goes on with it, --restart begins anew"):
        finetune_run(run, None, SETTINGS, None)
    with pytest.raises(InputError, match=r"has lr = 0\.004, now it is 0\.1; leave it as it was, or --restart"):
        finetune_run(run, None, {"lr": 0.1}, None, resume=True)
    with pytest.raises(InputError, match="has seed = 0, now it is 1"):
        finetune_run(run, None, {}, 1, resume=True)
    with pytest.raises(InputError, match="give one of them"):
        finetune_run(run, None, {}, None, resume=True, restart=True)
    after = results(run) | {"training": b"".join(sorted(map(bytes, (run / "training").rglob("*"))))}
    assert after == before
    finetune_run(run, None, {}, None, resume=True)  # what it was asked for is known
    assert results(run) == results(trained)
    (run / "training" / "epoch-0002-step-000000").mkdir(parents=True)  # what a kill at the very end may leave
    assert finetune_run(run, None, {}, None, resume=True).finetuned_epochs == 2  # it has ended: no second training
    assert results(run) == results(trained) and not (run / "training").exists()
    finetune_run(run, None, SETTINGS, None, restart=True)
    assert results(run) == results(trained)
    assert finetune_run(run, None, {"epochs": 1}, None).finetuned_epochs == 3


def test_a_damaged_state_is_said(searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(searched, tmp_path / "run", monkeypatch)
    (state,) = (run / "training").glob("epoch-*")
    assert state.name == "epoch-0001-step-000000"
    (state / "optimizer.bin").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"epoch-0001-step-000000 is damaged .*--restart` begins anew"):
        finetune_run(run, None, {}, None, resume=True)
    (run / "training" / "begun.json").write_text("{}")
    with pytest.raises(InputError, match="training is damaged; --restart begins anew"):
        finetune_run(run, None, {}, None, resume=True)


def test_a_search_resumed_does_not_undo_training(tmp_path: Path, trained: Path) -> None:
    run = copy(trained, tmp_path / "run")
    before = results(run)
    compress(Recipe.load(run), run, resume=True)
    assert results(run) == before


def fill_the_disk(run: Path, told: Path) -> None:
    """As a full disk does: writing fails past some bytes."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    try:
        finetune_run(run, None, SETTINGS, None, resume=True, save_minutes=0)
    except RunError as error:
        told.write_text(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_trained_on_to_the_end(searched: Path, tmp_path: Path, workers: int) -> None:
    """Processes that read drop what fills no batch: an epoch has fewer of them than was thought."""
    shards = write_shards(tmp_path / "shards", (70, 20), 2)
    run = copy(searched, tmp_path / "run")
    recipe = Recipe.load(run)
    recipe.model_copy(update={"workers": workers}).save(run)
    metrics = train(run, f"wds/{shards}", epochs=3, batch_size=2)
    assert metrics.finetuned_epochs == 3 and not (run / "training").exists()
    with (run / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2] and {int(row["images"]) for row in rows} == {70 - workers}


def test_a_full_disk_leaves_the_last_state(
    searched: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = interrupted(searched, tmp_path / "run", monkeypatch), tmp_path / "told"
    process = multiprocessing.get_context("forkserver").Process(target=fill_the_disk, args=(run, told))
    process.start()
    process.join()
    assert "cannot save the training's state in" in told.read_text()
    assert "epoch-0001-step-000000 is as it was" in told.read_text()
    assert [path.name for path in (run / "training").glob("*epoch*")] == ["epoch-0001-step-000000"]
    finetune_run(run, None, {}, None, resume=True)
    assert results(run) == results(trained)


COMMAND = "import sys; sys.path.append('tests'); import tiny; from lowpass.cli import main; main()"


def test_two_processes_train_as_one_of_twice_the_batch(searched: Path, tmp_path: Path) -> None:
    one, two = copy(searched, tmp_path / "one"), copy(searched, tmp_path / "two")
    finetune_run(one, None, SETTINGS, None)
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--epochs", "2", "--batch-size", "64", "--lr", "4e-3", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(script), "finetune", str(two), *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(two)  # one of them answers
    assert done.stderr.count("epoch 2 of 2") == 1

    def losses(run: Path) -> list[float]:
        with (run / "training.csv").open() as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]

    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    first, second = lowpass.Run(one).slim.state_dict(), lowpass.Run(two).slim.state_dict()
    assert all(torch.allclose(tensor, second[name], atol=1e-3) for name, tensor in first.items())
    assert lowpass.Run(two).metrics.slim.top1 == lowpass.Run(two).evaluate().slim.top1  # each measured half
    assert lowpass.Run(one).metrics.slim.top1 == pytest.approx(lowpass.Run(two).metrics.slim.top1, abs=0.5)
