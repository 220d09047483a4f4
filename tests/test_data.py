"""Images: the embedded digits, and folders of every layout that people have, or have broken."""

import random
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeViT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.datasets import Data, load_data, made_batches
from lowpass.pipeline.data.digits import CANVAS, NUM_CLASSES, DigitScenes, Split, _photographs, _scans
from lowpass.pipeline.model.architecture import Architecture, Preprocessing
from lowpass.pipeline.model.slim_vit import SlimViT


@pytest.fixture(scope="module")
def two_classes(make_vit: MakeViT) -> Architecture:
    """Of a model for 3x16x16 images of two classes."""
    return SlimViT.from_timm(make_vit(num_classes=2)).architecture


@pytest.fixture(autouse=True)
def seeds() -> None:
    """timm's augmentation draws from all three generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def paint(path: Path, value: int = 0, mode: str = "RGB") -> None:
    """A small image of noise, drawn by `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 5, seed: int = 0) -> Path:
    for label, name in enumerate(classes):
        for i in range(count):
            paint(root / name / f"{i}.png", seed + 100 * label + i)
    return root


# The embedded digits.


def test_no_test_digit_is_trained_on() -> None:
    train, test = ({scan.tobytes() for scan in _scans(split)[0]} for split in ("train", "test"))
    assert len(test) == 500
    assert len(train) == 1297
    assert not train & test


def test_no_test_photograph_is_trained_on() -> None:
    for train, test in zip(_photographs("train"), _photographs("test"), strict=True):
        assert test.shape[1] / (train.shape[1] + test.shape[1]) == pytest.approx(0.3, abs=0.005)
        trained, tested = ({column.tobytes() for column in photo.swapaxes(0, 1)} for photo in (train, test))
        assert not trained & tested


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_are_stratified(split: Split) -> None:
    counts = Counter(_scans(split)[1].tolist())
    assert sorted(counts) == list(range(NUM_CLASSES))
    assert min(counts.values()) > 0.09 * sum(counts.values())


@given(st.integers(0, 999), st.integers(0, 5), st.integers(0, 3), st.sampled_from(["train", "test"]))
def test_an_item_is_the_same_whenever_it_is_drawn(index: int, epoch: int, seed: int, split: Split) -> None:
    first, second = DigitScenes(split, renders=2, seed=seed), DigitScenes(split, renders=2, seed=seed)
    first.epoch = second.epoch = epoch
    _ = first[(index + 1) % len(first)]  # whatever was drawn before
    (image, label), (again, same) = first[index], second[index]
    assert torch.equal(image, again)
    assert label == same == _scans(split)[1][index % len(_scans(split)[1])]
    assert image.shape == (3, CANVAS, CANVAS)
    assert image.dtype == torch.float32
    assert -1 <= float(image.min()) < float(image.max()) <= 1


def test_epochs_seeds_and_renders_draw_other_scenes() -> None:
    scenes = DigitScenes("train", renders=2)
    plain = scenes[3][0]
    assert not torch.equal(scenes[3 + len(scenes) // 2][0], plain)  # the same digit again
    assert scenes[3 + len(scenes) // 2][1] == scenes[3][1]
    assert not torch.equal(DigitScenes("train", renders=2, seed=1)[3][0], plain)
    scenes.epoch = 1
    assert not torch.equal(scenes[3][0], plain)


def test_the_photographs_are_not_drawn_on() -> None:
    before = [photo.copy() for photo in _photographs("test")]
    _ = [DigitScenes("test")[i] for i in range(20)]
    assert all(np.array_equal(photo, old) for photo, old in zip(_photographs("test"), before, strict=True))


def test_digits_as_data(digits_slim: SlimViT) -> None:
    data = load_data("digits", digits_slim.architecture)
    assert (len(data.train), len(data.calibration), len(data.test)) == (1297, 2594, 1000)
    assert data.num_classes == 10
    assert not torch.equal(data.train[0][0], data.calibration[0][0])
    assert torch.equal(data.test[7][0], load_data("digits", digits_slim.architecture, seed=5).test[7][0])


def test_digits_for_another_model_refused(make_vit: MakeViT, two_classes: Architecture) -> None:
    with pytest.raises(InputError, match=r"3x32x32 images, but VisionTransformer takes 3x\(16, 16\)"):
        load_data("digits", two_classes)
    five = SlimViT.from_timm(make_vit(img_size=32)).architecture
    with pytest.raises(InputError, match="digits has 10 classes, but the model has 5"):
        load_data("digits", five)


# Folders.


def images_of(data: Data, split: str) -> list[tuple[torch.Tensor, int]]:
    images = getattr(data, split)
    return [images[i] for i in range(len(images))]


def same(one: list[tuple[torch.Tensor, int]], two: list[tuple[torch.Tensor, int]]) -> bool:
    return [label for _, label in one] == [label for _, label in two] and all(
        torch.equal(a, b) for (a, _), (b, _) in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("test_name", ["val", "validation", "test"])
def test_train_and_test_folders(test_name: str, tmp_path: Path, two_classes: Architecture) -> None:
    folder(tmp_path / "train", count=4)
    folder(tmp_path / test_name, count=3, seed=50)
    data = load_data(str(tmp_path), two_classes)
    assert (len(data.train), len(data.calibration), len(data.test), data.num_classes) == (8, 8, 6, 2)
    assert [label for _, label in images_of(data, "test")] == [0, 0, 0, 1, 1, 1]
    plain = images_of(data, "calibration")
    assert all(image.shape == (3, 16, 16) for image, _ in plain + images_of(data, "train"))
    assert same(plain, images_of(data, "calibration"))
    assert not same(plain, images_of(data, "train"))  # augmented


def test_validation_is_preferred_to_test(tmp_path: Path, two_classes: Architecture) -> None:
    folder(tmp_path / "train")
    folder(tmp_path / "val", count=2, seed=50)
    folder(tmp_path / "test", count=3, seed=70)
    assert len(load_data(str(tmp_path), two_classes).test) == 4


def test_images_are_normalised_as_the_model_wants(tmp_path: Path, two_classes: Architecture) -> None:
    for name in ("cat", "dog"):
        for i in range(2):
            path = tmp_path / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (16, 16), (255, 0, 51)).save(path)
    prep = two_classes.preprocessing.model_copy(update={"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 0.1)})
    image = load_data(str(tmp_path), two_classes.model_copy(update={"preprocessing": prep})).test[0][0]
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor([1.0, -1.0, 2.0]))


def test_images_are_cropped_and_shrunk_as_the_model_wants(tmp_path: Path, two_classes: Architecture) -> None:
    grid = np.indices((64, 64)).sum(0) % 2 * 255  # a checkerboard, which averages to grey, in a white frame
    grid[:8] = grid[-8:] = grid[:, :8] = grid[:, -8:] = 255
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(grid.astype(np.uint8)).save(tmp_path / name / "0.png")

    def seen(crop_pct: float, interpolation: str) -> torch.Tensor:
        prep = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": crop_pct, "interpolation": interpolation}
        changed = two_classes.model_copy(update={"preprocessing": Preprocessing.model_validate(prep)})
        return load_data(str(tmp_path), changed).test[0][0]

    whole, middle, nearest = seen(1.0, "bilinear"), seen(0.5, "bilinear"), seen(1.0, "nearest")
    assert float(whole[:, 0].min()) > 0.9
    torch.testing.assert_close(middle, torch.full((3, 16, 16), 0.5), rtol=0, atol=0.05)
    assert set(nearest.unique().tolist()) <= {0.0, 1.0}


def names_of(data: Data, split: str) -> list[str]:
    return ["/".join(path.parts[-2:]) for path, _ in getattr(data, split).files]


def test_a_fifth_is_held_out_of_a_folder_without_splits(tmp_path: Path, two_classes: Architecture) -> None:
    folder(tmp_path, count=100)
    data = load_data(str(tmp_path), two_classes)
    assert len(data.train) == len(data.calibration) == 200 - len(data.test)
    assert not set(names_of(data, "train")) & set(names_of(data, "test"))
    for name in ("cat", "dog"):  # of each class
        assert 10 <= sum(file.startswith(name) for file in names_of(data, "test")) <= 30
    assert not same(images_of(data, "calibration"), images_of(data, "train"))  # augmented
    assert names_of(load_data(str(tmp_path), two_classes), "test") == names_of(data, "test")
    assert names_of(load_data(str(tmp_path), two_classes, seed=1), "test") != names_of(data, "test")


def test_another_file_moves_none(tmp_path: Path, two_classes: Architecture) -> None:
    folder(tmp_path, count=30)
    before = load_data(str(tmp_path), two_classes)
    for number in range(5):
        paint(tmp_path / "dog" / f"new{number}.png", 7 + number)
    after = load_data(str(tmp_path), two_classes)
    for split in ("train", "test"):
        assert set(names_of(before, split)) <= set(names_of(after, split))


def test_training_and_calibration_are_the_same_images(tmp_path: Path, two_classes: Architecture) -> None:
    for name in ("cat", "dog"):
        for i in range(10):
            path = tmp_path / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (16, 16), (25 * i, 0, 255 * (name == "cat"))).save(path)
    data = load_data(str(tmp_path), two_classes)
    assert data.train.files == data.calibration.files
    assert [label for _, label in images_of(data, "train")] == [label for _, label in images_of(data, "calibration")]


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos", "nearest"])
def test_the_strongest_augmentation_still_gives_images(
    interpolation: str, tmp_path: Path, two_classes: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "gauss", lambda mean, deviation: mean + 3 * deviation)  # of an operation's magnitude
    prep = two_classes.preprocessing.model_copy(update={"interpolation": interpolation})
    data = load_data(str(folder(tmp_path)), two_classes.model_copy(update={"preprocessing": prep}))
    for draw in range(200):
        image, _ = data.train[draw % len(data.train)]
        assert image.shape == (3, 16, 16)
        assert image.isfinite().all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK", "I;16"])
def test_other_kinds_of_image(mode: str, tmp_path: Path, two_classes: Architecture) -> None:
    folder(tmp_path, count=3)
    suffix = "jpg" if mode == "CMYK" else "png"  # PNG has no CMYK
    for name in ("cat", "dog"):
        paint(tmp_path / name / f"odd.{suffix}", 9, mode)
    data = load_data(str(tmp_path), two_classes)
    for image, _ in images_of(data, "calibration") + images_of(data, "test"):
        assert image.shape == (3, 16, 16)
        assert image.isfinite().all()


def test_classes_may_be_called_like_splits(tmp_path: Path, two_classes: Architecture) -> None:
    for root in (tmp_path / "whole", tmp_path / "split" / "train", tmp_path / "split" / "val"):
        folder(root, classes=("ant", "val"))
    assert len(load_data(str(tmp_path / "split"), two_classes).train) == 10
    whole = load_data(str(tmp_path / "whole"), two_classes)
    assert len(whole.train) + len(whole.test) == 10


@pytest.mark.parametrize("layout", ["empty", "empty classes", "no images", "train without images"])
def test_a_folder_without_images_is_refused(layout: str, tmp_path: Path, two_classes: Architecture) -> None:
    if layout == "empty classes":
        (tmp_path / "cat").mkdir()
    if layout == "no images":
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "notes.txt").write_text("none yet")
    if layout == "train without images":
        folder(tmp_path / "val")
        (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images in class folders"):
        load_data(str(tmp_path), two_classes)


def test_a_missing_folder_is_refused(tmp_path: Path, two_classes: Architecture) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*nowhere; --data takes 'digits', a folder, hfds"):
        load_data(str(tmp_path / "nowhere"), two_classes)
    paint(tmp_path / "file.png")
    with pytest.raises(InputError, match="there is no folder"):
        load_data(str(tmp_path / "file.png"), two_classes)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "broken chunk", "huge"])
def test_an_unreadable_image_is_named(damage: str, tmp_path: Path, two_classes: Architecture) -> None:
    folder(tmp_path)
    path = tmp_path / "dog" / "3.png"
    whole = path.read_bytes()
    pixels = whole.index(b"IDAT")
    header = b"IHDR" + 2 * (30_000).to_bytes(4) + whole[24:29]  # a width and height that Pillow takes for an attack
    path.write_bytes(
        {
            "empty": b"",
            "text": b"not an image",
            "truncated": whole[: len(whole) // 2],
            "broken chunk": whole[: pixels - 4] + (500).to_bytes(4) + whole[pixels:],  # it says it ends before it does
            "huge": whole[:12] + header + zlib.crc32(header).to_bytes(4) + whole[33:],
        }[damage]
    )
    with pytest.raises(InputError, match=r"cannot read the image .*dog.3\.png"):
        load_data(str(tmp_path), two_classes)


def test_splits_of_different_classes_are_refused(tmp_path: Path, two_classes: Architecture) -> None:
    folder(tmp_path / "train")
    folder(tmp_path / "val", classes=("cat", "doge"))
    with pytest.raises(InputError, match="hold different classes, such as dog, doge"):
        load_data(str(tmp_path), two_classes)


@pytest.mark.parametrize("classes", [("cat",), ("cat", "dog", "eel")])
def test_another_number_of_classes_is_refused(
    classes: tuple[str, ...], tmp_path: Path, two_classes: Architecture
) -> None:
    folder(tmp_path, classes)
    with pytest.raises(InputError, match=f"has {len(classes)} classes, but the model has 2"):
        load_data(str(tmp_path), two_classes)


def test_a_single_image_is_refused(tmp_path: Path, two_classes: Architecture) -> None:
    paint(tmp_path / "cat" / "0.png")
    with pytest.raises(InputError, match="holds a single image"):
        load_data(str(tmp_path), two_classes)


def test_two_images_are_enough(tmp_path: Path, two_classes: Architecture) -> None:
    folder(tmp_path, count=1)
    data = load_data(str(tmp_path), two_classes)
    assert (len(data.train), len(data.test)) == (1, 1)


def test_an_unknown_data_set_of_a_reader_is_refused(two_classes: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # or it tries for a while
    with pytest.raises(InputError, match="datasets cannot read nobody/no_such_set"):
        load_data("hfds/nobody/no_such_set", two_classes)


def test_an_unknown_reader_is_no_folder(two_classes: Architecture) -> None:
    with pytest.raises(InputError, match=r"there is no folder nosuch.*or wds/FOLDER"):
        load_data("nosuch/imagenet", two_classes)


# What the search is given.


def test_calibration_batches_are_drawn_by_the_seed(digits_slim: SlimViT) -> None:
    data = load_data("digits", digits_slim.architecture)
    batches = data.calibration_batches(25, 10, seed=3, description="drawing")
    assert [len(labels) for _, labels in batches] == [10, 10, 5]
    drawn = [image for images, _ in batches for image in images]
    calibration = torch.stack([image for image, _ in images_of(data, "calibration")])
    places = [int((calibration == image).all((1, 2, 3)).nonzero()) for image in drawn]
    assert len(set(places)) == 25
    assert places != sorted(places)
    assert [int(y) for _, labels in batches for y in labels] == [data.calibration[i][1] for i in places]
    again = data.calibration_batches(25, 10, seed=3, description="drawing")
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))
    other = data.calibration_batches(25, 10, seed=4, description="drawing")
    assert not torch.equal(batches[0][0], other[0][0])


def test_calibration_batches_never_repeat_an_image(tmp_path: Path, two_classes: Architecture) -> None:
    folder(tmp_path / "train", count=4)
    folder(tmp_path / "val", count=1)
    batches = load_data(str(tmp_path), two_classes).calibration_batches(100, 3, seed=0, description="drawing")
    assert [len(labels) for _, labels in batches] == [3, 3, 2]


def test_made_batches_fit_the_model(two_classes: Architecture) -> None:
    batches = made_batches(two_classes, 10, 4, seed=1)
    assert [images.shape for images, _ in batches] == [(4, 3, 16, 16), (4, 3, 16, 16), (2, 3, 16, 16)]
    assert {int(label) for _, labels in batches for label in labels} == {0, 1}
    again, other = made_batches(two_classes, 10, 4, seed=1), made_batches(two_classes, 10, 4, seed=2)
    assert all(torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(batches, again, strict=True))
    assert not torch.equal(batches[0][0], other[0][0])


def test_a_grey_model_gets_grey_images(tmp_path: Path, make_vit: MakeViT) -> None:
    grey = SlimViT.from_timm(make_vit(num_classes=2, in_chans=1)).architecture
    data = load_data(str(folder(tmp_path, count=20)), grey)
    for images in (data.train, data.test):
        assert {tuple(images[i][0].shape) for i in range(len(images))} == {(1, 16, 16)}  # type: ignore[arg-type]
    with pytest.raises(InputError, match="takes 5 channels"):
        load_data(str(tmp_path), SlimViT.from_timm(make_vit(num_classes=2, in_chans=5)).architecture)


def test_images_outside_class_folders_are_refused(tmp_path: Path, two_classes: Architecture) -> None:
    paint(folder(tmp_path) / "loose.png")
    with pytest.raises(InputError, match=r"loose.png lies outside any class folder"):
        load_data(str(tmp_path), two_classes)
