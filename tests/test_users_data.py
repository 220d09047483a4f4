"""Images, folders and class names as users have them: read for what they are, or refused in a sentence."""

import os
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_trials import checked, scenes
from written import digits, picture

import lowpass
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_text
from lowpass.pipeline.data.classes import arrange, read_class_names
from lowpass.pipeline.data.folders import read_splits
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.data.pictures import open_picture
from lowpass.pipeline.run.readings import Alternative, _numbered_anew, _trouble

DIGITS = list("0123456789")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def tree(root: Path, *folders: str) -> Path:
    """A grey picture in each folder."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        Image.new("L", (4, 4), 90).save(root / folder / "x.png")
    return root


def split(root: Path) -> tuple[set[str], set[str]]:
    """The classes of the images to train and to test on."""
    train, test = read_splits(str(root), "RGB", 0, DataOptions())
    return train.classes, test.classes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_class_names_of_any_system(encoding: str, end: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(end.join(["Ant", "größe", "c d"]).encode(encoding))
    assert read_class_names(tmp_path / "names", 3) == ("Ant", "größe", "c d")


def test_accents_in_one_character_or_two(tmp_path: Path) -> None:
    """As Macs write them, and others."""
    one, two = (unicodedata.normalize(form, "größe") for form in ("NFC", "NFD"))
    assert one != two
    assert split(tree(tmp_path, f"train/{two}", f"val/{one}")) == ({one}, {one})
    (tmp_path / "names").write_text(two)
    assert read_class_names(tmp_path / "names", 1) == (one,)
    assert arrange([one], 1, DataOptions(classes=(two,), exact=True), "data").names == (one,)


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    """Of old archives: they can be written down, in classes.json and on pages."""
    tree(tmp_path, "train/ant", "val/ant")
    for part in ("train", "val"):
        (tmp_path / part / "ant").rename(tmp_path / part / os.fsdecode(b"f\xe9"))
    ((name,), _) = split(tmp_path)
    assert name.encode() == b"f\\udce9"
    write_text(tmp_path / "page.html", os.fsdecode(b"f\xe9.png"))
    assert (tmp_path / "page.html").read_text() == "f\\udce9.png"


def test_two_classes_of_one_name_are_not_mixed() -> None:
    """As ImageNet's two cranes in id2label: nobody can tell which the folder is of."""
    options = DataOptions(classes=("crane", "ant", "crane"), classes_from="id2label")
    with pytest.raises(InputError, match="id2label calls 2 classes 'crane', which data has; tell them apart"):
        arrange(["ant", "crane"], 3, options, "data")
    assert arrange(["ant"], 3, options, "data").rows == (1,)


def test_folders_that_are_splits_are_never_classes(tmp_path: Path) -> None:
    for number, names in enumerate(
        (("training_set", "test_set"), ("imagenet_train", "imagenet_val"), ("Training", "Testing"), ("train", "others"))
    ):
        with pytest.raises(InputError, match="that looks like splits"):
            split(tree(tmp_path / str(number), *(f"{name}/{kind}" for name in names for kind in "ab")))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    tree(tmp_path, "bus", "car", "train")
    for name in ("bus", "car", "train"):
        Image.new("L", (4, 4)).save(tmp_path / name / "y.png")
    assert split(tmp_path) == ({"bus", "car", "train"},) * 2


def test_what_a_folder_holds_instead_of_classes_is_said() -> None:
    with pytest.raises(InputError, match=r"data has 1 classes, but the model has 3; .*the data's are called images"):
        arrange(["images"], 3, DataOptions(), "data")
    options = DataOptions(classes=("n01 ant", "n02 bee"), classes_from="list.txt", exact=True)
    with pytest.raises(InputError, match=r"list\.txt does not name, such as n01; it names n01 ant, n02 bee"):
        arrange(["n01"], 2, options, "data")


@pytest.mark.parametrize("closed", ["val", "val/a", "."])
def test_closed_folders_are_said_to_be_unreadable(closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may read them: the system's refusal is put in its place."""
    tree(tmp_path, "train/a", "val/a")
    scandir = os.scandir

    def refusing(path: Any = ".") -> Any:
        if Path(path) == tmp_path / closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    monkeypatch.setattr(os, "listdir", lambda path: [entry.name for entry in refusing(path)])
    with pytest.raises(InputError, match=rf"cannot read {tmp_path / closed}: Permission denied"):
        split(tmp_path)


def test_greys_of_real_numbers_are_no_black_pictures(tmp_path: Path) -> None:
    grey = np.arange(16, dtype=np.float32).reshape(4, 4)
    for name, values in (("share", grey / 15), ("to 255", grey * 17)):
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        assert np.array_equal(np.asarray(open_picture(tmp_path / f"{name}.tif", "L")), grey * 17)


def test_few_images_that_are_right_are_no_guess() -> None:
    def trouble(right: int, images: int, classes: int) -> str:
        return _trouble(torch.arange(images) < right, classes, [], "dense", False)

    assert not trouble(1, 1, 10) and not trouble(2, 2, 2) and not trouble(16, 20, 2)
    assert all("where guessing gives" in trouble(*few) for few in ((0, 1, 10), (1, 2, 2), (10, 20, 2), (33, 300, 10)))


def _table(names: list[str], order: list[str]) -> Any:
    images, numbers = zip(*digits("test", 60), strict=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=order)})
    rows = {"image": [picture(image) for image in images], "label": [order.index(names[label]) for label in numbers]}
    return datasets.Dataset.from_dict(rows, features=features)


def _saved(folder: Path, train: list[str], test: list[str]) -> Path:
    tables = {"train": _table(WORDS, train), "validation": _table(WORDS, test)}
    datasets.DatasetDict(tables).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_splits_that_number_classes_in_two_ways_are_refused(reader: str, tmp_path: Path) -> None:
    saved = _saved(tmp_path / "saved", WORDS, sorted(WORDS))
    with pytest.raises(InputError, match="numbers its classes in two ways: 0 is zero to train on, and eight to test"):
        checked(f"{reader}/{saved}")


def test_classes_in_no_order_of_names_are_found_out(tmp_path: Path) -> None:
    """Neither natural nor plain: what suits half of the images is tried on the other half, and named."""
    saved = _saved(tmp_path / "saved", sorted(WORDS), sorted(WORDS))
    listed = ", ".join(WORDS)
    with pytest.raises(
        InputError,
        match=rf"with classes in another order it is .* give --classes FILE, .*of the logits \({listed}\); --yes",
    ):
        checked(f"hfds/{saved}")
    (tmp_path / "names.txt").write_text("\n".join(WORDS))
    found = checked(f"hfds/{saved}", classes=tmp_path / "names.txt")
    assert found.checked_top1 > 90


def test_one_class_out_of_place_is_found_out(tmp_path: Path) -> None:
    """Well above chance: 30 % with the fourth of ten classes sorted to the end."""
    folder = scenes(tmp_path, [*"012", "猫", *"456789"], 60, 200)
    with pytest.raises(InputError, match=r"is 3\d\.\d %.*with classes in another order it is .*\(0, 1, 2, 猫, 4"):
        checked(folder)


def test_training_on_other_images_that_are_labelled_otherwise_is_refused(slim_run: Path, tmp_path: Path) -> None:
    run = lowpass.Run(shutil.copytree(slim_run, tmp_path / "run"))
    before = {path.name for path in run.path.iterdir()}
    other = scenes(tmp_path / "images", DIGITS[1:] + DIGITS[:1], 60, 100)
    with pytest.raises(
        InputError, match=r"with classes in another order it is .*the run's are fixed, so mend the data"
    ):
        run.finetune(str(other), epochs=1)
    assert {path.name for path in run.path.iterdir()} == before


def test_a_remedy_of_a_run_names_no_option() -> None:
    right = torch.arange(100) < 30
    other = [Alternative("classes in another order", "--classes FILE", 98.0, True)]
    said = _trouble(right, 10, other, "dense", True)
    assert said.endswith("with classes in another order it is 98.0 %: the run's are fixed, so mend the data")


def test_a_model_that_always_says_the_same_is_in_no_order() -> None:
    """Whatever it is called, it is right as often as the most frequent class comes."""
    labels = (torch.arange(300) % 5 > 1).long()  # 60 of 100 are of class 1
    always = torch.zeros(300, dtype=torch.long)
    data = SimpleNamespace(num_classes=2, classes=("a", "b"))
    assert _numbered_anew(always, labels, cast(Any, data)) is None
    assert _numbered_anew(1 - labels, labels, cast(Any, data)) is not None
    assert _numbered_anew(always[:1], 1 - always[:1], cast(Any, data)) is None  # one image
