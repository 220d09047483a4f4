"""A model that scores well above chance, and clearly better under another reading of the same inputs, is found out; an
imported one, too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import answer
from test_trials import NUMBERED, W, checked, scenes

import lowpass
from lowpass.cli import main
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.run.readings import _is_better

DIGITS = list("0123456789")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of a refusal; the log comes before it."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def worn(strength: float) -> dict[str, torch.Tensor]:
    """The digits model with some noise on its weights: 98 % goes down to what `strength` leaves."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + strength * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1
        else tensor
        for name, tensor in W.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("images"), DIGITS)


@pytest.mark.slow
def test_better_weights_are_found_out_far_above_chance(folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": worn(0.5), "state_dict_ema": W}, tmp_path / "weights.pth")
    options: dict[str, Any] = {"weights": tmp_path / "weights.pth", "weights_key": "state_dict"}
    found = checked(folder, go_on=True, **options)
    assert 60 < found.checked_top1 < 93
    with pytest.raises(
        InputError, match=r"with the weights state_dict_ema it is 9\d\.\d %: give --weights-key state_dict_"
    ):
        checked(folder, **options)
    # The other way round there is nothing to find, and of two alike neither is better.
    assert checked(folder, weights=tmp_path / "weights.pth").alternatives == {}
    torch.save({"state_dict": worn(0.4), "state_dict_ema": worn(0.41)}, tmp_path / "alike.pth")
    alike = checked(folder, weights=tmp_path / "alike.pth")
    assert abs(alike.checked_top1 - alike.alternatives["--weights-key state_dict"]) < 5


def test_a_dry_run_finds_it_out_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = scenes(tmp_path / "images", NUMBERED["1 to 10"])
    words = ("compress", "--model", "digits_deit", "--data", str(named), "--target-macs", "0.5", "--dry-run")
    beside = ("--out", str(tmp_path / "run"), "--workers", "0")
    assert "give --class-order plain; --yes" in refusal(capsys, *words, *beside)
    told = answer(capsys, *words, *beside, "--yes")
    assert told["checked_images"] == 300 and told["checked_top1"] < 50
    told = answer(capsys, *words, *beside, "--class-order", "plain")
    assert told["checked_top1"] > 96 and told["least_bytes"] > told["search_bytes"] > 0
    assert not (tmp_path / "run").exists()


def test_better_pixels_are_found_out_far_above_chance(folder: Path) -> None:
    options: dict[str, Any] = {"mean": (0.25, 0.25, 0.25), "std": (0.2, 0.2, 0.2)}
    found = checked(folder, go_on=True, **options)
    assert 40 < found.checked_top1 < 93.5
    with pytest.raises(
        InputError, match=r"with a mean and deviation of 0\.5 it is 9\d\.\d %: give --mean 0\.5,0\.5,0\.5"
    ):
        checked(folder, **options)


def test_two_classes_that_changed_places_are_found_out(tmp_path: Path) -> None:
    """Of ten: top-1 is 79 %."""
    names = ["a0", "a1", "a2", "a3", "a10", "b5", "b6", "b7", "b8", "b9"]
    named = scenes(tmp_path / "images", [*names[:4], "a04", *names[5:]])
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(["a0", "a1", "a04", "a3", "a2", *names[5:]]))
    with pytest.raises(
        InputError, match=r"classes in natural order it is 9.*: give --classes FILE, with the names in na"
    ):
        checked(named, classes=listed)
    assert checked(named).checked_top1 > 96


@pytest.mark.parametrize(
    ("wins", "losses", "images", "better"),
    [
        (16, 0, 300, True),
        (14, 0, 300, False),
        (20, 4, 300, True),
        (40, 24, 300, False),
        (8, 0, 20, False),
        (9, 0, 20, True),
    ],
)
def test_what_so_many_images_tell(wins: int, losses: int, images: int, better: bool) -> None:
    """5 points, and 3 deviations of the images that one of the two alone gets right."""
    right, other = torch.ones(2, images, dtype=torch.bool)
    right[:wins] = False
    other[wins : wins + losses] = False
    assert _is_better(other, right) == better


# What VTC-LFC's authors released.


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model in their format."""
    path = tmp_path_factory.mktemp("released") / "checkpoint.pth"
    torch.save({"model": W}, path)
    return path


def words(released: Path, data: Path, out: Path, *more: str) -> tuple[str, ...]:
    pixels = () if "--mean" in more else ("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--crop-pct", "1")
    options = ("--qk-scale", str(32**-0.5), "--data", str(data), "--out", str(out), "--workers", "0")
    return ("import-vtc", str(released), *options, *pixels, *more)


@pytest.mark.slow
def test_an_imported_model_of_other_classes_is_found_out(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = scenes(tmp_path / "images", NUMBERED["1 to 10"])
    said = refusal(capsys, *words(released, named, tmp_path / "run"))[-200:]
    assert "with classes in plain order it is 9" in said and "give --class-order plain; --yes" in said
    assert not (tmp_path / "run").exists()
    made = answer(capsys, *words(released, named, tmp_path / "run", "--class-order", "plain"))
    assert made["slim"]["top1"] == made["dense"]["top1"] > 96
    assert answer(capsys, "evaluate", str(tmp_path / "run"))["slim"]["top1"] == made["slim"]["top1"]
    assert lowpass.Run(tmp_path / "run").classes == tuple(NUMBERED["1 to 10"])
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(NUMBERED["1 to 10"]))
    again = answer(capsys, *words(released, named, tmp_path / "named", "--classes", str(listed)))
    assert again["slim"]["top1"] == made["slim"]["top1"]
    all_the_same = answer(capsys, *words(released, named, tmp_path / "wrong", "--yes"))
    assert all_the_same["slim"]["top1"] < 50


def test_an_imported_model_of_other_pixels_is_found_out(
    released: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ("--mean", "0.25,0.25,0.25", "--std", "0.2,0.2,0.2")
    said = refusal(capsys, *words(released, folder, tmp_path / "run", *other))
    assert "with a mean and deviation of 0.5 it is 9" in said and "give --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5" in said


@pytest.mark.parametrize(
    ("option", "values", "said"),
    [
        ("--std", "0,0,0", "--std must be above 0"),
        ("--std", "1,1e-400,1", "--std must be above 0"),
        ("--crop-pct", "1e-9", "0.1"),
        ("--mean", "inf,0,0", "finite number"),
        ("--mean", "1e308,1,1", "--mean is of pixels from 0 to 1, which 1e+308 is beyond"),
        ("--mean", "123.675,116.28,103.53", "which 123.675 is beyond; divide it by 255"),
    ],
)
def test_pixels_that_make_no_sense_are_refused(
    option: str, values: str, said: str, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an import, which used to take them, as anywhere."""
    words = ("import-vtc", str(released), "--out", str(tmp_path / "run"), "--qk-scale", str(32**-0.5))
    assert said in refusal(capsys, *words, option, values)
    words = ("compress", "--model", "digits_deit", "--data", "digits", "--target-macs", "0.5")
    assert said in refusal(capsys, *words, "--out", str(tmp_path / "run"), option, values)


def test_the_names_of_an_imported_model_need_no_images(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(DIGITS))
    made = words(released, folder, tmp_path / "run", "--classes", str(listed))  # type: ignore[arg-type]
    without = [word for place, word in enumerate(made) if word != "--data" and made[place - 1] != "--data"]
    assert answer(capsys, *without)["slim"]["top1"] is None
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == DIGITS
    listed.write_text("one\ntwo")
    assert "names 2 classes, but the model has 10" in refusal(
        capsys, *[str(tmp_path / "other") if word == str(tmp_path / "run") else word for word in without]
    )
