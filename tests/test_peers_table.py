"""The table of the real model, on a model of seconds: rows are measured once, kept, and written as a CSV."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from lowpass.benchmarks.real import dense, methods, table
from lowpass.benchmarks.real.__main__ import app
from lowpass.benchmarks.real.dense import META, Setting
from lowpass.benchmarks.real.last_blocks import Training
from lowpass.benchmarks.real.methods import METHODS, Pruned
from lowpass.benchmarks.real.table import Request, finished_rows, listed, measure_rows
from lowpass.benchmarks.rows import Origin, read_rows
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import sha256, write_json
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.search.log import SEARCH_FILE

ORIGIN = Origin("a machine", "python 3", "abc1234", "python -m somewhere")
FEW = {"score_images": 16, "test_images": 40}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a setting named `tiny`, whose dense model is three blocks that know nothing of the digits."""

    def make_dense(name: str, cache: Path, seed: int = 0) -> Path:
        checkpoint = cache / name / "dense.safetensors"
        if not checkpoint.exists():
            checkpoint.parent.mkdir(parents=True)
            torch.manual_seed(0)
            state = timm.create_model("tiny_deit").state_dict()
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, checkpoint)
        said = {"model": "tiny_deit", "data": "digits", "sha256": sha256(checkpoint)}
        write_json(cache / name / META, said)
        return checkpoint

    setting = Setting("tiny", 32, 50, Training(epochs=1))
    monkeypatch.setitem(dense.SETTINGS, "tiny", setting)
    monkeypatch.setattr(table, "make_dense", make_dense)
    monkeypatch.setattr(methods, "RUN_TESTED", 20)
    return tmp_path / "cache"


def measured(request: Request, cache: Path) -> int:
    return sum(1 for _ in measure_rows(request, cache, ORIGIN))


def row_file(cache: Path, name: str) -> Path:
    (file,) = cache.glob(f"tiny/table/*/score16-test40/{name}.json")
    return file


def test_a_row_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request("tiny", ("corp", "tome", "evit"), (0.7, 0.6), (0, 1), **FEW)
    assert measured(request, cache) == 2 * 2 + 2 + 2  # what no seed changes is not measured again
    rows = finished_rows(cache)
    shares = {(row.of["method"], row.of["level"]): row.value for row in rows if row.figure == "macs_share"}
    assert shares.keys() == {("corp", 0.7), ("corp", 0.6), ("tome", 0.7), ("tome", 0.6)}
    assert all(isinstance(value, float) and 0.9 * of[1] < value <= of[1] for of, value in shares.items())
    (why, _) = [row.value for row in rows if row.figure == "not_measured"]
    assert "EViT needs 10 or more" in str(why)
    assert {row.of["test_images"] for row in rows} == {40}
    top1 = [row.value for row in rows if row.figure == "top1_dense"]
    assert len(top1) == 6 and len(set(top1)) == 1

    def never(*_: Any, **__: Any) -> Pruned:
        raise AssertionError

    monkeypatch.setattr(table, "_pruned", never)
    assert measured(request, cache) == 8
    assert finished_rows(cache) == rows
    row_file(cache, "corp-macs0.7-seed1").unlink()
    with pytest.raises(AssertionError):
        measured(request, cache)


def test_searches_share_what_they_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second level's curves are the first one's; a recipe that changes is followed anew."""
    monkeypatch.setitem(METHODS, "small", methods.Method({"measure_images": 16, "channel_criterion": "magnitude"}))
    request = Request("tiny", ("small",), (0.7, 0.6), (0,), **FEW)
    assert measured(request, cache) == 2
    runs = cache.glob("tiny/table/*/runs-score16/small-macs*-seed0")
    logs = [[json.loads(line) for line in (run / SEARCH_FILE).read_text().splitlines()[1:]] for run in sorted(runs)]
    curves = [[line for line in log if line["kind"] == "curve"] for log in logs]
    assert len(curves) == 2 and curves[0] == curves[1] and len(curves[0]) == 3
    before = row_file(cache, "small-macs0.6-seed0").read_bytes()

    monkeypatch.setitem(METHODS, "small", methods.Method({"measure_images": 17, "channel_criterion": "magnitude"}))
    assert measured(request, cache) == 2
    assert row_file(cache, "small-macs0.6-seed0").read_bytes() != before
    (run,) = cache.glob("tiny/table/*/runs-score16/small-macs0.6-seed0")
    assert Recipe.load(run).measure_images == 17


def test_the_command_writes_what_is_finished(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "real.csv"
    options = ["--setting", "tiny", "--methods", "vbp,corp", "--levels", "0.8", "--seeds", "0", "--cache", str(cache)]
    app(["rows", *options, "--score-images", "16", "--test-images", "40", "--out", str(out)], standalone_mode=False)
    rows = read_rows(out)
    assert [(row["method"], row["figure"]) for row in rows] == [
        (method, figure)
        for method in ("vbp", "corp")
        for figure in ("macs_share", "top1_no_training", "top1_dense", "seconds")
    ]
    assert {(row["setting"], row["level"], row["seed"], row["score_images"]) for row in rows} == {
        ("tiny", "0.8", "0", "16")
    }
    assert all(row["machine"] and "torch" in row["versions"] and row["command"] for row in rows)


def test_a_killed_table_goes_on(cache: Path) -> None:
    request = Request("tiny", ("corp",), (0.8, 0.7), (0,), **FEW)
    rows: Iterator[None] = measure_rows(request, cache, ORIGIN)
    next(rows)
    rows.close()
    first = row_file(cache, "corp-macs0.8-seed0")
    written = first.stat().st_mtime_ns
    assert measured(request, cache) == 2 and first.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"setting": "imagenet"}, "no setting 'imagenet'; known are fashion-112"),
        ({"methods": ("vbp", "guess")}, "no method 'guess'; known are lowpass"),
        ({"levels": (0.5, 1.5)}, "between 0 and 1, not 1.5"),
        ({"seeds": (-1,)}, "seeds are 0 and up"),
    ],
)
def test_what_there_is_not_is_refused(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=complaint):
        measured(Request(**changes), tmp_path)
    assert not any(tmp_path.iterdir())


def test_lists_of_numbers_are_read() -> None:
    assert listed("0.7, 0.5", "--levels", float) == (0.7, 0.5)
    with pytest.raises(InputError, match="--seeds takes numbers"):
        listed("0,one", "--seeds", int)
