"""What goes wrong in silence elsewhere: classes numbered otherwise, other weights, broken files. Each is found out
before the search, and said with its remedy."""

import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import answer
from PIL import Image
from written import picture

import lowpass
from lowpass.cli import main
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.digits_deit import DIGITS_WEIGHTS
from lowpass.pipeline.checkpoints.state_dict import read_weights
from lowpass.pipeline.data.classes import arrange, ordered, read_class_names
from lowpass.pipeline.data.datasets import load_data
from lowpass.pipeline.data.digits import DigitScenes
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.data.pictures import open_picture
from lowpass.pipeline.run.dense_check import check_dense
from lowpass.pipeline.run.inputs import read_inputs
from lowpass.pipeline.run.recipe import make_recipe

W = read_weights(DIGITS_WEIGHTS).state


def scenes(
    root: Path, names: Sequence[str], train: int = 60, test: int = 300, splits: Sequence[str] = ("train", "val")
) -> Path:
    """Digit scenes as PNGs, digit k in the folder `names[k]`."""
    for split, count, part in zip(splits, (train, test), ("train", "test"), strict=True):
        images = DigitScenes(part, renders=2)  # type: ignore[arg-type]
        for index in range(count):
            image, label = images[index]
            folder = root / split / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            picture(image).save(folder / f"{index}.png")
    return root


def checked(data: Path | str, model: str = "digits_deit", go_on: bool = False, **settings: Any) -> Any:
    """What the check of the dense model finds."""
    recipe = make_recipe(model=model, data=str(data), target_macs=0.6, **({"workers": 0} | settings))
    return check_dense(read_inputs(recipe), go_on)


def natural(*names: str) -> tuple[str, ...]:
    return ordered(names, "natural")


NUMBERED = {
    "1 to 10": sorted(f"class{number}" for number in range(1, 11)),
    "capitals": sorted(["Ant", "bee", "Cat", "dog", "Eel", "fly", "Gnu", "hen", "Ibis", "jay"]),
}


@pytest.mark.parametrize("names", NUMBERED.values(), ids=NUMBERED.keys())
def test_classes_in_the_other_order_are_found_out(names: list[str], tmp_path: Path) -> None:
    """Trained where folders are numbered as torchvision numbers them."""
    folder = scenes(tmp_path, names)
    with pytest.raises(
        InputError, match=r"with classes in plain order it is 9\d\.\d %: give --class-order plain; --yes"
    ):
        checked(folder)
    found = checked(folder, class_order="plain")
    assert found.checked_top1 > 96 and found.checked_images == 300 and found.classes == "plain order"
    assert found.alternatives["--class-order natural"] < 50
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(names))
    assert checked(folder, classes=listed).checked_top1 == found.checked_top1
    assert checked(folder, go_on=True).checked_top1 < 50


def test_one_numbering_in_every_process(tmp_path: Path) -> None:
    """Names that tie under timm's order fall in hash order there."""
    names = ["1", "01", "001", "a", "A", "b", "B", "10", "2", "02"]
    code = f"from lowpass.pipeline.data.classes import ordered; print(ordered({names!r}, 'natural'))"
    seen = set()
    for seed in "123":
        random.shuffle(names)
        environment = os.environ | {"PYTHONHASHSEED": seed}
        seen.add(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout)
    assert seen == {"('001', '01', '1', '02', '2', '10', 'A', 'a', 'B', 'b')\n"}
    folder = scenes(tmp_path, sorted(names))
    for order in ("natural", "plain"):
        data = load_data(
            str(folder),
            read_inputs(make_recipe(model="digits_deit", data="digits", target_macs=0.5)).dense.architecture,
            options=DataOptions(class_order=order),
        )  # type: ignore[arg-type]
        assert data.classes == ordered(names, order)  # type: ignore[arg-type]
        assert all(path.parent.name == data.classes[label] for path, label in data.test.files)  # type: ignore[attr-defined]


def test_weights_that_are_noise_beside_good_ones(tmp_path: Path) -> None:
    folder = scenes(tmp_path / "images", list("0123456789"))
    noise = {name: torch.randn_like(tensor) * 0.02 for name, tensor in W.items()}
    torch.save({"state_dict": noise, "state_dict_ema": W}, tmp_path / "weights.pth")
    found = checked(folder, weights=tmp_path / "weights.pth")
    assert found.checked_top1 > 96 and found.weights_key == "state_dict_ema"
    with pytest.raises(
        InputError, match=r"with the weights state_dict_ema it is 9\d\.\d %: give --weights-key state_dict_ema"
    ):
        checked(folder, weights=tmp_path / "weights.pth", weights_key="state_dict")


def test_other_pixels_are_found_out(tmp_path: Path) -> None:
    folder = scenes(tmp_path, list("0123456789"))
    with pytest.raises(
        InputError, match=r"with a mean and deviation of 0\.5 it is 9\d\.\d %: give --mean 0\.5,0\.5,0\.5"
    ):
        checked(folder, mean=(0.0, 0.0, 0.0), std=(0.05, 0.05, 0.05))
    found = checked(folder)
    assert found.checked_top1 > 96 and found.preprocessing == "timm's digits_deit"


def test_classes_of_a_model_that_has_more(tmp_path: Path) -> None:
    """By their names; the head is cut to those that the data has."""
    folder = scenes(tmp_path / "images", list("0123456789"))
    for digit in "0369":
        for split in ("train", "val"):
            for file in (folder / split / digit).iterdir():
                file.unlink()
            (folder / split / digit).rmdir()
    names = tmp_path / "names.txt"
    names.write_text("\n".join("0123456789"))
    inputs = read_inputs(make_recipe(model="digits_deit", data=str(folder), target_macs=0.6, classes=names, workers=0))
    assert inputs.data is not None and inputs.data.classes == ("1", "2", "4", "5", "7", "8")
    assert torch.equal(inputs.dense.vit.head.weight, W["head.weight"][[1, 2, 4, 5, 7, 8]])
    assert check_dense(inputs, go_on=False).checked_top1 > 96  # type: ignore[operator]
    with pytest.raises(InputError, match=r"has 6 classes, but the model has 10; .*--classes FILE"):
        checked(folder)
    names.write_text("\n".join("0123456789".replace("4", "x")))
    with pytest.raises(InputError, match=r"has classes that .*names\.txt does not name, such as 4"):
        checked(folder, classes=names)


def test_names_that_a_model_brings(tmp_path: Path) -> None:
    """`id2label` wins over any order of the folders; where it calls them otherwise, that is said."""
    options = DataOptions(classes=("b", "c", "a"), classes_from="id2label")
    assert arrange(("a", "b", "c"), 3, options, "data").names == ("b", "c", "a")
    assert arrange(("x", "y", "z"), 3, options, "data").names == ("x", "y", "z")
    with pytest.raises(InputError, match="data has 2 classes, but the model has 3"):
        arrange(("x", "y"), 3, options, "data")
    for text, said in (("a\nb", "names 2 classes, but the model has 3"), ("a\nb\na", "names 'a' twice")):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(InputError, match=said):
            read_class_names(tmp_path / "names.txt", 3)
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not text"):
        read_class_names(tmp_path / "names.txt", 3)
    with pytest.raises(InputError, match="cannot read the class names"):
        read_class_names(tmp_path / "none.txt", 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "splits", [("train", "valid"), ("Train", "Validation"), ("training", "dev"), ("TRAIN", "eval")]
)
def test_splits_are_never_mixed(splits: tuple[str, str], tmp_path: Path) -> None:
    folder = scenes(tmp_path, list("0123456789"), splits=splits)
    assert checked(folder).checked_images == 300


@pytest.mark.parametrize("splits", [("train", "holdout"), ("val", "test"), ("train", "train2")])
def test_splits_that_are_not_understood_are_refused(splits: tuple[str, str], tmp_path: Path) -> None:
    folder = scenes(tmp_path, list("0123456789"), 20, 20, splits)
    with pytest.raises(InputError, match=r"that looks like splits, of which one must be called train and another val"):
        checked(folder)


def test_classes_are_the_first_level_of_folders(tmp_path: Path) -> None:
    """What lies deeper belongs to them; hidden files, archives' leavings and loops of links are passed over."""
    folder = scenes(tmp_path, list("0123456789"))
    deeper = folder / "val" / "3" / "more" / "again"
    deeper.mkdir(parents=True)
    first = next((folder / "val" / "3").glob("*.png"))
    first.rename(deeper / "moved.png")
    (folder / "val" / "3" / ".hidden.png").write_bytes(b"")
    (folder / "train" / "__MACOSX").mkdir()
    (folder / "train" / "__MACOSX" / "x.png").write_bytes(b"")
    (folder / "val" / "3" / "loop").symlink_to(folder / "val", target_is_directory=True)
    (folder / "val" / "3" / "notes.txt").write_text("seen")
    assert checked(folder).checked_images == 300


@pytest.mark.slow
def test_truncated_test_images_are_refused_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """133 of 1,000."""
    folder = scenes(tmp_path / "images", list("0123456789"), 200, 1000)
    files = sorted((folder / "val").rglob("*.png"))
    for file in files[3 :: len(files) // 133][:133]:
        file.write_bytes(file.read_bytes()[:-300])
    first = files[3]
    with pytest.raises(InputError, match=f"cannot read the image {first}: .*--skip-unreadable"):
        run = lowpass.compress("digits_deit", str(folder), tmp_path / "refused", target_macs=0.6, workers=0)
        run.evaluate()
    table = tmp_path / "table.json"
    architecture = read_inputs(make_recipe(model="digits_deit", data="digits", target_macs=0.5)).dense.architecture
    table.write_text(json.dumps({"blocks": [block.model_dump() for block in architecture.blocks]}))
    options = ("--model", "digits_deit", "--data", str(folder), "--architecture", str(table), "--skip-unreadable")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["compress", *options, "--out", str(tmp_path / "run"), "--score-images", "8", "--json"])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    assert "left out 133 of 1000 images that cannot be read" in printed.err
    assert json.loads(printed.out)["dense"]["top1"] == pytest.approx(98.5, abs=1.5)


@pytest.mark.slow
def test_sixty_images_go_all_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six a class to train on, two to test on."""
    monkeypatch.setattr(lowpass.Run, "benchmark", partialmethod(lowpass.Run.benchmark, seconds=0.05))
    folder = scenes(tmp_path / "images", list("0123456789"), 60, 20)
    options = ("--model", "digits_deit", "--data", str(folder), "--target-macs", "0.7", "--ship", "--epochs", "1")
    result = answer(capsys, "compress", *options, "--out", str(tmp_path / "run"), "--workers", "0")
    assert result["slim"]["macs"] <= 0.7 * result["dense"]["macs"]
    assert (tmp_path / "run" / "model.fp32.onnx").exists()


def test_finetuning_on_other_images_measures_dense_there_too(slim_run: Path, tmp_path: Path) -> None:
    folder = scenes(tmp_path, list("0123456789"), 60, 100)
    before = lowpass.Run(slim_run).metrics
    assert before.data == "digits"
    after = lowpass.Run(slim_run).finetune(str(folder), epochs=1)
    assert after.data == str(folder)
    assert after.dense.top1 != before.dense.top1 and after.dense.top1 == pytest.approx(98, abs=4)
    assert after.pruned_top1 is not None


def test_data_sets_of_hugging_face(tmp_path: Path) -> None:
    import datasets

    images, labels = zip(*(DigitScenes("test")[index] for index in range(200)), strict=True)
    names = ["nine", "eight", "seven", "six", "five", "four", "three", "two", "one", "nil"]
    features = datasets.Features({"picture": datasets.Image(), "digit": datasets.ClassLabel(names=names)})
    rows = {"picture": [picture(image) for image in images], "digit": [9 - label for label in labels]}
    table = datasets.Dataset.from_dict(rows, features=features)
    whole = datasets.DatasetDict({"train": table, "validation": table})
    whole.save_to_disk(str(tmp_path / "saved"))
    spec = f"hfds/{tmp_path / 'saved'}"
    with pytest.raises(InputError, match=r"in another order it is 9\d\.\d %: give --classes FILE, .*\(nil, one, two"):
        checked(spec)
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(reversed(names)))
    assert checked(spec, classes=listed).checked_top1 > 96
    with pytest.raises(InputError, match=r"has no column 'image' \(--input-key\); it has picture, digit"):
        checked(spec, classes=listed, input_key="image")
    keyed = checked(spec, classes=listed, input_key="picture", target_key="digit")
    assert keyed.checked_images == 200
    table.save_to_disk(str(tmp_path / "one"))  # without splits: a fifth is held out
    assert checked(f"hfds/{tmp_path / 'one'}", classes=listed).checked_images == 40


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", ".webp"), ("RGB", ".bmp"), ("RGB", ".tiff"), ("P", ".gif"), ("CMYK", ".jpg")]
)
def test_what_pillow_reads_is_read(mode: str, suffix: str, tmp_path: Path) -> None:
    folder = scenes(tmp_path, list("0123456789"), 60, 60)
    for file in sorted((folder / "val").rglob("*.png")):
        settings = {"lossless": True} if suffix == ".webp" else {"quality": 95} if suffix == ".jpg" else {}
        Image.open(file).convert(mode).save(file.with_suffix(suffix), **settings)  # type: ignore[arg-type]
        file.unlink()
    assert checked(folder).checked_top1 > 80


def test_deep_greys_are_scaled(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 25700, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.asarray(open_picture(tmp_path / "deep.png", "L")).tolist() == [[0, 1, 100, 255]]
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg", "RGB").size == (4, 2)
    assert open_picture(tmp_path / "turned.jpg", "RGB", exif=True).size == (2, 4)


def test_large_pictures_are_read_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns of them as it opens them, before anything is decoded."""
    Image.new("RGB", (10, 9)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with warnings.catch_warnings(action="error"):
        assert open_picture(tmp_path / "large.png", "RGB").size == (10, 9)
