"""A real model on real pictures, from packages to a dense checkpoint: each step on a few pictures made here."""

import gzip
import json
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from lowpass.benchmarks.real import convert, dense, last_blocks, packages, pictures, tokens
from lowpass.benchmarks.real.clipart import FOLDER as CLIPART_FOLDER
from lowpass.benchmarks.real.clipart import SIDE, write_clipart
from lowpass.benchmarks.real.dense import Setting, make_dense
from lowpass.benchmarks.real.dinov2 import NAME
from lowpass.benchmarks.real.fashion import CLASSES, read_idx
from lowpass.benchmarks.real.fashion import FOLDER as FASHION_FOLDER
from lowpass.benchmarks.real.head import fit_head, head_top1
from lowpass.benchmarks.real.last_blocks import Training, some_tokens
from lowpass.benchmarks.real.packages import CLIPART, FASHION, fetch
from lowpass.benchmarks.real.steps import begin, finish, whole_folder
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.run.dense_check import check_dense
from lowpass.pipeline.run.inputs import read_inputs
from lowpass.pipeline.run.recipe import make_recipe

TRAIN, VAL = 6, 3  # made pictures of each class
TINY = Setting("tiny", 28, 50, Training(epochs=2, lr=2e-5, batch_size=16), block=10)
debian = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds a Debian package")


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def made_fashion(tree: Path) -> None:
    """Fashion-MNIST's files with noise on a pattern of each class."""
    folder = tree / FASHION_FOLDER
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (len(CLASSES), 4, 4)).repeat(7, 1).repeat(7, 2)
    for prefix, count in (("train", TRAIN), ("t10k", VAL)):
        labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), count)).astype(np.uint8)
        noisy = (patterns[labels] + rng.integers(0, 56, (len(labels), 28, 28))).astype(np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", noisy)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a made package and the converted backbone. Copy it before changing it."""
    cache = tmp_path_factory.mktemp("real")
    (cache / "packages").mkdir()
    (cache / "packages" / f"{FASHION}_1%3a2.0-1_all.deb").touch()
    made_fashion(cache / "packages" / FASHION)
    convert.convert(cache)
    return cache


@pytest.fixture
def cache(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, a data set and a setting named `tiny`, and files of 20 images."""
    monkeypatch.setitem(pictures.DATA, "tiny", pictures.Fashion())
    monkeypatch.setitem(dense.SETTINGS, "tiny", TINY)
    monkeypatch.setattr(tokens, "SHARD", 20)
    return Path(shutil.copytree(prepared, tmp_path / "cache"))


def test_the_backbone_gives_the_features_of_its_file(prepared: Path) -> None:
    said = json.loads((prepared / "dinov2" / "done.json").read_text())
    assert 0 < said["largest_difference"] <= 1e-4
    weights = load_file(prepared / "dinov2" / convert.CHECKPOINT)
    assert weights["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    images = convert.photographs()[:1]
    assert convert.largest_difference(weights, images) <= 1e-4
    # Were two blocks mixed up, it would show.
    mixed = weights | {"blocks.3.ls1.gamma": weights["blocks.4.ls1.gamma"]}
    assert convert.largest_difference(mixed, images) > 1e-2


def test_other_features_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "largest_difference", lambda weights, images: float("nan"))
    with pytest.raises(RunError, match="features differ"):
        convert.convert(tmp_path)
    assert not (tmp_path / "dinov2" / convert.CHECKPOINT).exists()


def test_a_dense_model_from_pictures_to_checkpoint(cache: Path) -> None:
    """What is written down is what `lowpass compress` finds."""
    checkpoint = make_dense("tiny", cache)
    meta = json.loads((cache / "tiny" / dense.META).read_text())
    assert meta["pictures"]["package"] == f"{FASHION} 1:2.0-1"
    assert (meta["train_images"], meta["test_images"]) == (50, 10 * VAL)
    assert meta["top1"] > 50 and meta["linear_top1"] > 50, meta  # guessing gives 10
    assert set(meta["seconds"]) == {"tokens", "head", "training", "testing"} and min(meta["seconds"].values()) > 0
    folder = Path(meta["data"])
    assert {entry.name for entry in (folder / "train").iterdir()} == set(CLASSES)
    backbone, tuned = load_file(cache / "dinov2" / convert.CHECKPOINT), load_file(checkpoint)
    changed = {key for key, tensor in backbone.items() if key != "pos_embed" and not torch.equal(tensor, tuned[key])}
    assert {key.split(".")[1] for key in changed if key.startswith("blocks.")} == {"10", "11"}
    recipe = make_recipe(model=NAME, weights=checkpoint, data=str(folder), img_size="28", target_macs=0.9, workers=0)
    assert check_dense(read_inputs(recipe), go_on=False).checked_top1 == pytest.approx(meta["top1"])


def test_what_is_done_is_not_done_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_dense("tiny", cache)
    written = checkpoint.stat().st_mtime_ns

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    for part in ("frozen_tokens", "fit_head", "train_last_blocks", "top1"):
        monkeypatch.setattr(dense, part, never)
    assert make_dense("tiny", cache).stat().st_mtime_ns == written
    # Another way to train keeps the tokens, and nothing of the training.
    monkeypatch.undo()
    monkeypatch.setitem(pictures.DATA, "tiny", pictures.Fashion())
    monkeypatch.setitem(dense.SETTINGS, "tiny", Setting("tiny", 28, 50, Training(epochs=1), block=10))
    monkeypatch.setattr(tokens, "_shard", never)
    monkeypatch.setattr(tokens, "SHARD", 20)
    make_dense("tiny", cache)
    assert json.loads((cache / "tiny" / dense.META).read_text())["setting"]["training"]["epochs"] == 1


@pytest.mark.parametrize("killed", ["frozen blocks", "last blocks"])
def test_a_killed_step_goes_on(cache: Path, tmp_path: Path, killed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed half-way and started again, it ends with the same bytes and repeats no finished piece."""
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    whole = make_dense("tiny", other).read_bytes()
    module, name, pieces = (tokens, "_shard", 5) if killed == "frozen blocks" else (last_blocks, "some_tokens", 8)
    real, calls = getattr(module, name), list[int]()

    def dies(*arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == pieces // 2 + 2:  # with a file or an epoch behind it
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, name, dies)
    with pytest.raises(KeyboardInterrupt):
        make_dense("tiny", cache)
    assert not (cache / "tiny" / dense.CHECKPOINT).exists()
    assert make_dense("tiny", cache).read_bytes() == whole
    # The piece it died in is done again; in training that is an epoch of four steps.
    assert len(calls) == pieces + (1 if killed == "frozen blocks" else 2)


def test_a_loss_that_is_none_is_a_failure(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_blocks, "some_tokens", lambda tokens, kept, draw: tokens * float("nan"))
    with pytest.raises(RunError, match="the loss became nan in epoch 1"):
        make_dense("tiny", cache)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no setting 'imagenet'; known are fashion-112"):
        make_dense("imagenet", tmp_path)
    with pytest.raises(InputError, match="no data set 'imagenet'; known are fashion"):
        pictures.image_folder(tmp_path, "imagenet")


def test_a_head_classifies_what_is_linear() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = 5 + 3 * torch.randn(90, 8, generator=draw) + 20 * torch.eye(3, 8)[labels]
    assert head_top1(fit_head(features, labels, 3, 1.0), features, labels) == 100
    with pytest.raises(InputError, match="no training image is of class number 3"):
        fit_head(features, labels, 4, 1.0)


def test_dropped_tokens_leave_cls() -> None:
    entering = torch.arange(2 * 9 * 4.0).reshape(2, 9, 4)
    kept = some_tokens(entering, 0.5, torch.Generator().manual_seed(0))
    assert kept.shape == (2, 5, 4) and torch.equal(kept[:, 0], entering[:, 0])
    for image, (all_tokens, some) in enumerate(zip(entering.tolist(), kept.tolist(), strict=True)):
        assert all(token in all_tokens for token in some) and len({tuple(token) for token in some}) == 5, image


def test_clip_art_becomes_an_image_folder(tmp_path: Path) -> None:
    root, rng = tmp_path / "tree" / CLIPART_FOLDER, np.random.default_rng(0)
    for category, count in {"animals/birds": 12, "food": 6, "tools": 2, "special": 9}.items():
        (root / category).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 255, (20, 40, 4), np.uint8)
            pixels[:, :, 3] = np.where(np.arange(40) < 20, 0, 255)  # the left half shows the page
            Image.fromarray(pixels, "RGBA").save(root / category / f"{number}.png")
    (root / "animals" / "link.png").symlink_to(root / "food" / "0.png")
    shutil.copy(root / "food" / "1.png", root / "food" / "twice.png")
    (root / "food" / "broken.png").write_bytes(b"\x89PNG and no more")
    counts = write_clipart(tmp_path / "tree", tmp_path / "out", least=5, most=8)
    assert counts["unreadable"] == 1 and counts["train"] + counts["val"] == 8 + 6 and min(counts.values()) > 0
    written = sorted((tmp_path / "out").rglob("*.png"))
    assert {file.parent.name for file in written} == {"animals", "food"}
    assert len(written) == len({file.name for file in written}) == 14
    with Image.open(written[0]) as picture:
        assert picture.mode == "RGB" and picture.size == (SIDE, SIDE)
        seen = np.asarray(picture)
    assert seen[:, : SIDE // 2 - 24].min() > 250  # margins, and what is transparent, are white
    write_clipart(tmp_path / "tree", tmp_path / "again", least=5, most=8)
    assert [file.relative_to(tmp_path / "again") for file in sorted((tmp_path / "again").rglob("*.png"))] == [
        file.relative_to(tmp_path / "out") for file in written
    ]
    with pytest.raises(InputError, match="no category of 50 pictures"):
        write_clipart(tmp_path / "tree", tmp_path / "none", least=50, most=100)


def test_files_that_are_no_idx_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "labels.gz"
    write_idx(file, np.arange(5, dtype=np.uint8))
    assert read_idx(file, 1).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match="no whole IDX file of bytes in 3 dimensions"):
        read_idx(file, 3)
    content = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(InputError, match="no whole IDX file"):
        read_idx(file, 1)
    file.write_bytes(b"no gzip")
    with pytest.raises(InputError, match="cannot read"):
        read_idx(file, 1)


def test_a_step_knows_its_inputs(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    assert begin(folder, {"seed": 0}) is None
    (folder / "result").touch()
    (folder / ".result.part").touch()
    assert begin(folder, {"seed": 0}) is None
    assert (folder / "result").exists() and not (folder / ".result.part").exists()
    finish(folder, {"top1": 90.0})
    assert begin(folder, {"seed": 0}) == {"top1": 90.0}
    assert begin(folder, {"seed": 1}) is None and not (folder / "result").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds files that this step did not make"):
        begin(tmp_path / "mine", {})
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(KeyError), whole_folder(tmp_path / "whole") as part:
        (part / "half").touch()
        raise KeyError
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "step"]


@debian
def test_a_package_that_is_there_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made" / "DEBIAN").mkdir(parents=True)
    control = (
        f"Package: {CLIPART}\nVersion: 1:0.18-1\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: -\n"
    )
    (tmp_path / "made" / "DEBIAN" / "control").write_text(control)
    (tmp_path / "made" / "usr").mkdir()
    (tmp_path / "made" / "usr" / "picture").write_text("here")
    (tmp_path / "packages").mkdir()
    archive = tmp_path / "packages" / f"{CLIPART}_1%3a0.18-1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tmp_path / "made"), str(archive)], check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    package = fetch(CLIPART, Path())
    assert package.version == "1:0.18-1" and (package.tree / "usr" / "picture").read_text() == "here"
    shutil.rmtree(package.tree)
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(RunError, match=r"cannot unpack .* remove it and try again"):
        fetch(CLIPART, Path())
    assert not package.tree.exists()


def test_no_package_lists_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get's own words, where it is here; elsewhere that it is not."""
    for name in ("lists/partial", "empty"):
        (tmp_path / name).mkdir(parents=True)
    settings = tmp_path / "apt.conf"
    places = {"State::Lists": "lists", "State::Status": "status", "Cache": "empty"}
    settings.write_text("".join(f'Dir::{key} "{tmp_path / name}";\n' for key, name in places.items()))
    (tmp_path / "status").touch()
    monkeypatch.setenv("APT_CONFIG", str(settings))
    with pytest.raises(InputError, match=r"`apt-get update` as root|there is no apt-get"):
        fetch(FASHION, tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="there is no apt-get: these pictures come as Debian packages"):
        fetch(FASHION, tmp_path / "cache")


def test_a_download_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 100, "", "W: slow\nE: Failed to fetch the archive\n")

    monkeypatch.setattr(packages, "_run", fails)
    with pytest.raises(RunError, match=f"cannot download {FASHION}: E: Failed to fetch the archive"):
        fetch(FASHION, tmp_path)
