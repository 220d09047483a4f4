"""The Python API: names, what it imports, one path with the command, models and images in memory, and silence."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import answer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import lowpass
from lowpass.api import recipe_of
from lowpass.pipeline.base.progress import report_to
from lowpass.pipeline.data.digits import DigitScenes

QUICK = {"score_images": 64, "measure_images": 64, "batch_size": 32}
FLAGS = ["--score-images", "64", "--measure-images", "64", "--batch-size", "32"]
FILES = ("recipe.yaml", "classes.json", "search.jsonl", "architecture.json", "slim.safetensors", "metrics.json")


def in_memory() -> tuple[DigitScenes, DigitScenes]:
    """The digits as the search sees them."""
    return DigitScenes("train", renders=2), DigitScenes("test", renders=2)


def test_importing_takes_nothing_heavy_along() -> None:
    code = "import sys, lowpass; print(sorted({'torch', 'timm', 'numpy', 'onnx', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented() -> None:
    for name in lowpass.__all__:
        value = getattr(lowpass, name)
        assert name == "__version__" or value.__doc__
        assert name in dir(lowpass)
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = lowpass.compres


def test_api_and_command_give_the_same_bytes(
    tmp_path: Path, tiny_source: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = tmp_path / "api", tmp_path / "command"
    run = lowpass.compress(
        tiny_source["model"], "digits", ours, weights=tiny_source["weights"], target_macs=0.6, yes=True, **QUICK
    )
    told = answer(
        capsys,
        *("compress", "--model", tiny_source["model"], "--weights", str(tiny_source["weights"]), "--data", "digits"),
        *("--target-macs", "0.6", "--out", str(theirs), "--yes", *FLAGS),
    )
    assert {name: (ours / name).read_bytes() for name in FILES} == {
        name: (theirs / name).read_bytes() for name in FILES
    }
    assert run.metrics.slim.macs == told["slim"]["macs"] and run.metrics.slim.top1 == told["slim"]["top1"]


@pytest.mark.parametrize("loaders", [False, True])
def test_what_is_in_memory_is_pruned_like_what_has_a_name(
    tmp_path: Path, tiny_source: dict[str, Any], loaders: bool
) -> None:
    named = lowpass.compress(
        tiny_source["model"],
        "digits",
        tmp_path / "named",
        weights=tiny_source["weights"],
        target_macs=0.6,
        yes=True,
        **QUICK,
    )
    model = lowpass.load_model(tiny_source["model"], tiny_source["weights"])
    data: tuple[Any, Any] = in_memory()
    if loaders:
        data = tuple(DataLoader(part, 16) for part in data)
    held = lowpass.compress(model, data, tmp_path / "held", target_macs=0.6, yes=True, **QUICK)
    for name in ("slim.safetensors", "architecture.json"):
        assert (named.path / name).read_bytes() == (held.path / name).read_bytes()
    assert (named.metrics.data, held.metrics.data) == ("digits", "data in memory")
    assert named.metrics == held.metrics.model_copy(update={"data": "digits"})
    before = held.metrics.slim.top1
    assert held.finetune(epochs=1, lr=1e-3, batch_size=64).finetuned_epochs == 1
    assert held.evaluate().slim.top1 == held.metrics.slim.top1 and before is not None
    # Another process has no images for it, and is told so.
    with pytest.raises(lowpass.InputError, match="images in memory"):
        lowpass.Run(held.path).evaluate()
    assert lowpass.Run(held.path).evaluate("digits").slim.top1 == held.metrics.slim.top1


def test_a_run_says_what_it_is(slim_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = lowpass.Run(slim_run)
    assert run.classes == tuple("0123456789")
    assert run.dense is not None and run.dense.architecture.macs() > run.slim.architecture.macs()
    assert run.architecture == run.slim.architecture and run.recipe.data == "digits"
    images = torch.stack([in_memory()[1][i][0] for i in range(4)])
    exported = run.export("fp32")
    assert exported == slim_run / "model.fp32.onnx" and exported.exists()
    with torch.inference_mode():
        assert run.slim(images).shape == (4, 10)
    deployed = run.deploy(slim_run.parent / "models", "digits")
    assert (deployed.path / "1" / "labels.txt").read_text().split() == list("0123456789")
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_progress_and_log_go_where_the_caller_says(
    tmp_path: Path, tiny_source: dict[str, Any], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[lowpass.Step] = []
    with caplog.at_level(logging.INFO, "lowpass"):
        lowpass.compress(
            tiny_source["model"],
            "digits",
            tmp_path / "run",
            weights=tiny_source["weights"],
            target_macs=0.6,
            progress=steps.append,
            yes=True,
            **QUICK,
        )
    assert capfd.readouterr().err == ""
    assert any(record.getMessage().startswith("plan: ") for record in caplog.records)
    cutting = [step for step in steps if step.description == "cutting blocks"]
    assert [step.done for step in cutting] == [0, 1, 2, 3, 3] and cutting[-1].finished and cutting[0].total == 3


def test_a_run_without_a_listener_leaves_the_one_there_is(slim_run: Path) -> None:
    """So that a command shows the progress of what it does through a run."""
    steps: list[lowpass.Step] = []
    with report_to(steps.append):
        lowpass.Run(slim_run).evaluate()
    assert {step.description for step in steps} == {"testing dense", "testing slim"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_mac": 0.5}, "no setting 'target_mac'; did you mean target_macs"),
        ({}, "exactly one of"),
        ({"target_macs": 1.5}, "target_macs"),
        ({"target_macs": 0.5, "align": 0}, "align"),
        ({"target_latency": 5.0, "runtime": "no-runtime"}, "no runtime 'no-runtime'"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(lowpass.InputError, match=message):
        lowpass.compress("digits_deit", "digits", tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_options_go_by_the_command_s_names() -> None:
    asked: dict[str, Any] = {"target_latency": 5.0, "runtime": "onnxruntime", "batch": 8, "precision": "fp32"}
    recipe = recipe_of("digits_deit", "digits", **asked)
    assert (recipe.latency_batch, recipe.latency_precision) == (8, "fp32")


class Endless(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter(())


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "the train images are empty"),
        ([(torch.zeros(3, 16, 16), 0)], r"the first train image is \(3, 16, 16\); digits_deit takes tensors of"),
        ([("scene.png", 0)], "the first train image is str"),
        (Endless(), "give a data set with a length"),
        ([(torch.zeros(3, 32, 32), 10)] * 8, "class number 10, but the model has 10 classes"),
    ],
)
def test_bad_images_in_memory_are_refused(tmp_path: Path, train: Any, message: str) -> None:
    with pytest.raises(lowpass.InputError, match=message):
        lowpass.compress("digits_deit", (train, in_memory()[1]), tmp_path / "run", target_macs=0.5, **QUICK)


def test_an_unsuitable_model_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lowpass.InputError, match="Linear"):
        lowpass.compress(torch.nn.Linear(3, 3), "digits", tmp_path / "run", target_macs=0.5)
