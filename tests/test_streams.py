"""Shards and streams that the real libraries wrote: every image once, in one order, and nothing wrong in silence."""

import contextlib
import json
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from command_line import answer, refusal
from PIL import Image
from torch import Tensor
from written import as_png, digits, picture, tables, write_parquet, write_shards

import lowpass
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.datasets import Data, load_data, subset
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.data.shards import Shards, read_shards
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.dense_check import check_dense
from lowpass.pipeline.run.inputs import read_inputs
from lowpass.pipeline.run.recipe import make_recipe

DIGITS = list("0123456789")
COUNTS = (60, 130)  # to train and to test on


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, Any]]]:
    """The same scenes by every reader: what `--data` takes, and the options it needs. Not to be changed."""
    import datasets

    root = tmp_path_factory.mktemp("written")
    saved = datasets.DatasetDict(zip(("train", "test"), tables(COUNTS), strict=True))
    saved.save_to_disk(str(root / "saved"))
    keyed = {"target_key": "digit"}
    return {
        "wds": (f"wds/{write_shards(root / 'wds', COUNTS)}", {}),
        "wds, not described": (f"wds/{write_shards(root / 'plain', COUNTS, described=False)}", {}),
        "wds, JSON": (f"wds/{write_shards(root / 'json', COUNTS, json_labels=True)}", keyed),
        "hfids": (f"hfids/{write_parquet(root / 'parquet', COUNTS)}", keyed),
        "hfids, saved": (f"hfids/{root / 'saved'}", keyed),
        "hfds": (f"hfds/{root / 'saved'}", keyed),
    }


EVERY = ["wds", "wds, not described", "wds, JSON", "hfids", "hfids, saved", "hfds"]
STREAMED = [name for name in EVERY if name != "hfds"]


def read(spec: str, slim: SlimViT, workers: int = 0, **options: Any) -> Data:
    return load_data(spec, slim.architecture, options=DataOptions(workers=workers, **options))


def whole(data: Data, batch_size: int = 32) -> tuple[Tensor, Tensor, list[int]]:
    """The test images, their labels, and how many came at a time."""
    batches = list(data.loader(data.test, batch_size))
    return *(torch.cat(part) for part in zip(*batches, strict=True)), [len(labels) for _, labels in batches]  # type: ignore[return-value]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("workers", [0, 2])
def test_every_test_image_comes_once_in_one_order(
    name: str, workers: int, written: dict[str, Any], digits_slim: SlimViT
) -> None:
    spec, options = written[name]
    images, labels, sizes = whole(read(spec, digits_slim, workers, **options))
    scenes, numbers = zip(*digits("test", COUNTS[1]), strict=True)
    assert labels.tolist() == list(numbers) and sizes == [32, 32, 32, 32, 2]
    torch.testing.assert_close(images, torch.stack(scenes), rtol=0, atol=1 / 127)  # PNG has 8 bits


@pytest.mark.parametrize("name", EVERY)
def test_dense_top1_and_what_is_drawn(name: str, written: dict[str, Any], digits_slim: SlimViT) -> None:
    """The embedded model scores what it does; images drawn to score are those of any data set, whoever reads."""
    spec, options = written[name]
    recipe = make_recipe(model="digits_deit", data=spec, target_macs=0.6, workers=0, **options)
    found = check_dense(read_inputs(recipe), False)
    assert found.checked_top1 is not None and found.checked_top1 > 96 and found.checked_images == COUNTS[1]
    data = read(spec, digits_slim, **options)
    scenes = [image for image, _ in digits("train", COUNTS[0])]
    drawn = data.calibration_batches(25, 10, seed=3, description="drawing")
    places = torch.randperm(COUNTS[0], generator=torch.Generator().manual_seed(3))[:25].tolist()
    expected = torch.stack([scenes[place] for place in places])
    torch.testing.assert_close(torch.cat([images for images, _ in drawn]), expected, rtol=0, atol=1 / 127)
    again = read(spec, digits_slim, 2, **options).calibration_batches(25, 10, seed=3, description="drawing")
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(drawn, again, strict=True))


@pytest.mark.parametrize("name", STREAMED)
def test_training_sees_every_image_in_another_order_each_time(
    name: str, written: dict[str, Any], digits_slim: SlimViT
) -> None:
    spec, options = written[name]
    data = read(spec, digits_slim, **options)
    data.train.reading = data.calibration.reading  # type: ignore[attr-defined]  # not augmented, to know them again

    def epoch(number: int, workers: int) -> list[bytes]:
        data.train.set_epoch(number)  # type: ignore[attr-defined]
        loader = torch.utils.data.DataLoader(data.train, 4, num_workers=workers)
        return [image.numpy().tobytes() for images, _ in loader for image in images]

    once = Counter(image.numpy().tobytes() for images, _ in data.loader(data.calibration, 4) for image in images)
    assert set(once.values()) == {1} and len(once) == COUNTS[0]
    orders = [epoch(0, 0), epoch(1, 0), epoch(2, 2)]
    assert all(Counter(order) == once for order in orders)
    assert orders[0] != orders[1]
    assert epoch(0, 0) == orders[0]
    assert all(len(labels) == 8 for _, labels in data.train_loader(8))


def test_samples_are_those_of_the_library(written: dict[str, Any]) -> None:
    """Members of odd names and kinds, too."""
    for name in ("wds", "wds, JSON"):
        spec, options = written[name]
        train, _, _ = read_shards(spec, DataOptions(**options))
        for shard, file in enumerate(train.files):
            theirs = list(webdataset.WebDataset(str(file), shardshuffle=False))
            ours = [sample.read() for sample in train.samples(shard)]
            label = (lambda s: json.loads(s["json"])["digit"]) if options else (lambda s: int(s["cls"]))
            assert ours == [(sample["png"], label(sample)) for sample in theirs]


def odd_shard(folder: Path, samples: list[dict[str, Any]]) -> str:
    """Shards of some samples to train and to test on."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        with webdataset.TarWriter(str(folder / f"{split}-0.tar")) as writer:
            for index, sample in enumerate(samples):
                writer.write({"__key__": f"some/{index:04d}"} | sample)
    return f"wds/{folder}"


PNG = as_png(next(digits("test", 1))[0])


@pytest.mark.parametrize(
    ("sample", "options", "said"),
    [
        ({"png": PNG, "cls": 10}, {}, r"val-0.tar: some/0000 has the class number 10, but there are 10 classes"),
        ({"png": PNG, "cls": -1}, {}, r"some/0000 has the class number -1"),
        ({"png": PNG, "cls": "dog"}, {}, r"some/0000 has no class number: dog; name what holds it with --target-key"),
        ({"png": PNG}, {}, r"some/0000 has no class: no \.cls among png; .*--target-key"),
        ({"png": PNG, "json": {"digit": 1.5}}, {"target_key": "digit"}, "the JSON field 'digit'"),
        ({"png": PNG, "json": {}}, {"target_key": "digit"}, "the JSON field 'digit'"),
        ({"png": PNG, "cls": 1}, {"target_key": "digit"}, r"no class: no \.digit among"),
        ({"png": PNG, "jpg": PNG, "cls": 1}, {}, r"has no single picture but .*--input-key"),
        ({"txt": "x", "cls": 1}, {}, r"has no single picture but .*--input-key"),
        ({"png": PNG[:200], "cls": 1}, {}, r"cannot read the image .*val-0.tar: some/0000: .*--skip-unreadable"),
    ],
)
def test_an_odd_sample_is_refused_by_name(
    sample: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path, digits_slim: SlimViT
) -> None:
    spec = odd_shard(tmp_path, [sample])
    with pytest.raises(InputError, match=said):
        whole(read(spec, digits_slim, **options))


def test_keys_of_shards(tmp_path: Path, digits_slim: SlimViT) -> None:
    sample = {"png": PNG, "jpg": b"no picture", "meta.json": {"x": 1}, "cls": 9, "fine.cls": 3}
    spec = odd_shard(tmp_path, [sample] * 3)
    assert whole(read(spec, digits_slim, input_key="webp;png"))[1].tolist() == [9, 9, 9]
    assert whole(read(spec, digits_slim, input_key="png", target_key="fine.cls"))[1].tolist() == [3, 3, 3]


@pytest.mark.parametrize("name", ["wds", "hfids", "hfds"])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_when_asked_and_counted(
    name: str, workers: int, tmp_path: Path, digits_slim: SlimViT, caplog: pytest.LogCaptureFixture
) -> None:
    files = [as_png(image) for image, _ in digits("test", 20)]
    files = [file[:150] if index % 5 == 2 else file for index, file in enumerate(files)]
    numbers = [label for _, label in digits("test", 20)]
    if name == "wds":
        spec = odd_shard(tmp_path, [{"png": file, "cls": label} for file, label in zip(files, numbers, strict=True)])
    else:
        import datasets

        rows = {"image": [{"bytes": file, "path": None} for file in files], "label": numbers}
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path))
        spec = f"{name}/{tmp_path}"
    with pytest.raises(InputError, match=r"cannot read the image .*--skip-unreadable"):
        whole(read(spec, digits_slim), 4)
    with caplog.at_level("INFO", "lowpass"):
        _, labels, _ = whole(read(spec, digits_slim, workers, skip_unreadable=True), 4)
    assert labels.tolist() == [label for index, label in enumerate(numbers) if index % 5 != 2]
    assert f"{spec}: left out 4 of 20 images that cannot be read" in caplog.text
    seen = [batch for batch in read(spec, digits_slim).train_loader(4) if batch is not None]
    assert sum(len(labels) for _, labels in seen) == 16


def test_shards_that_are_not_whole_are_refused(tmp_path: Path, digits_slim: SlimViT) -> None:
    """`tarfile` takes a file that is cut off between members for one that ends there."""
    spec = f"wds/{write_shards(tmp_path, (20, 20), 2)}"
    shard = tmp_path / "digits-validation-0001.tar"
    content, info = shard.read_bytes(), json.loads((tmp_path / "_info.json").read_text())
    ends = [member.offset_data + -(-member.size // 512) * 512 for member in headers(shard)]
    for length in (ends[7], ends[7] + 100, ends[7] - 600, 100, 0):
        shard.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cannot read the shard .*validation-0001\.tar: .*; copy it anew"):
            whole(read(spec, digits_slim))
    shard.write_bytes(content)
    info["splits"]["validation"]["shard_lengths"][1] = 11
    (tmp_path / "_info.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"validation-0001\.tar holds 10 samples, but should hold 11"):
        whole(read(spec, digits_slim))
    shard.unlink()
    with pytest.raises(InputError, match=r"there is no shard .*validation-0001\.tar, which _info.json lists"):
        read(spec, digits_slim)


def headers(file: Path) -> list[Any]:
    import tarfile

    with tarfile.open(file) as tar:
        return tar.getmembers()


def test_splits_of_shards(tmp_path: Path, digits_slim: SlimViT) -> None:
    plain = write_shards(tmp_path / "plain", (20, 20), 2, described=False)
    shards, _, _ = read_shards(f"wds/{plain}", DataOptions())
    assert [file.name for file in shards.files] == ["digits-train-0000.tar", "digits-train-0001.tar"]
    for split in ("train", "test"):  # as CLIP's benchmark lays them out
        (tmp_path / "folders" / split).mkdir(parents=True)
        for file in plain.glob(f"*{'train' if split == 'train' else 'validation'}*"):
            shutil.copy(file, tmp_path / "folders" / split / f"{int(file.stem[-4:])}.tar")
    assert len(read(f"wds/{tmp_path / 'folders'}", digits_slim).test) == 20  # type: ignore[arg-type]
    shutil.copy(plain / "digits-train-0000.tar", plain / "more.tar")
    with pytest.raises(InputError, match=r"more\.tar does not tell its split"):
        read(f"wds/{plain}", digits_slim)
    (tmp_path / "trained").mkdir()
    shutil.copy(plain / "digits-train-0000.tar", tmp_path / "trained")
    with pytest.raises(InputError, match="no shards to test on: its splits are train, and one should be called val or"):
        read(f"wds/{tmp_path / 'trained'}", digits_slim)
    with pytest.raises(InputError, match="there is no folder nowhere; --data wds/FOLDER takes a folder of tar files"):
        read("wds/nowhere", digits_slim)
    for text in ("[]", "{", '{"splits": {"train": 3}}'):
        (plain / "_info.json").write_text(text)
        with pytest.raises(InputError, match=r"_info\.json (is no JSON object|describes splits otherwise)"):
            read(f"wds/{plain}", digits_slim)


def test_classes_of_shards(tmp_path: Path, digits_slim: SlimViT) -> None:
    """Numbers that are named are put in the order of the model's classes."""
    folder = write_shards(tmp_path / "data", (20, 30), 2)
    numbers = [label for _, label in digits("test", 30)]
    backwards = DIGITS[::-1]
    own = {"classes": tuple(backwards), "classes_from": "names.txt", "exact": True}
    assert read(f"wds/{folder}", digits_slim).classes is None
    named = read(f"wds/{folder}", digits_slim, **own)
    assert named.classes == tuple(backwards) and whole(named)[1].tolist() == numbers  # the numbers are the logits'
    (folder / "classnames.txt").write_text("\n".join(DIGITS))
    assert whole(read(f"wds/{folder}", digits_slim, **own))[1].tolist() == [9 - number for number in numbers]
    assert read(f"wds/{folder}", digits_slim).classes == tuple(DIGITS)
    info = json.loads((folder / "_info.json").read_text())
    (folder / "_info.json").write_text(json.dumps(info | {"classes": [f"digit {name}" for name in DIGITS]}))
    assert read(f"wds/{folder}", digits_slim).classes == tuple(f"digit {name}" for name in DIGITS)
    with pytest.raises(InputError, match=r"has classes that names\.txt does not name, such as digit 0"):
        read(f"wds/{folder}", digits_slim, **own)
    (folder / "_info.json").write_text(json.dumps(info | {"classes": ["a"] * 10}))
    with pytest.raises(InputError, match="names a class twice"):
        read(f"wds/{folder}", digits_slim)


def test_streams_of_the_hub_that_cannot_be_used(tmp_path: Path, digits_slim: SlimViT) -> None:
    for file in write_parquet(tmp_path / "trained", (20, 20), 1).glob("validation*"):
        file.unlink()
    with pytest.raises(InputError, match=r"no split to test on, .*; hfds/.*trained holds a fifth out"):
        read(f"hfids/{tmp_path / 'trained'}", digits_slim, target_key="digit")
    folder = write_parquet(tmp_path / "some", (20, 20), 1)
    with pytest.raises(InputError, match="has the columns picture, digit; name one with --target-key"):
        read(f"hfids/{folder}", digits_slim)
    with pytest.raises(InputError, match="picture holds either pictures or classes"):
        read(f"hfids/{folder}", digits_slim, target_key="picture")
    shard = next(folder.glob("validation*"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"datasets cannot read .*some"):
        whole(read(f"hfids/{folder}", digits_slim, target_key="digit"))


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_rows_of_the_hub(reader: str, tmp_path: Path, digits_slim: SlimViT) -> None:
    """Files beside the table, cameras held sideways, and test sets whose classes are kept secret."""
    import datasets

    exif = Image.Exif()
    exif[0x0112] = 6
    shade = Image.new("RGB", (32, 32))
    shade.paste((255, 255, 255), (0, 0, 32, 16))
    shade.save(tmp_path / "turned.png", exif=exif)
    rows: dict[str, Any] = {"image": [str(tmp_path / "turned.png")] * 4, "label": [0, 1, 2, 3]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    secret = table.remove_columns("label").add_column("label", [-1] * 4)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "data"))
    datasets.DatasetDict({"train": table, "test": secret}).save_to_disk(str(tmp_path / "secret"))
    upright = whole(read(f"{reader}/{tmp_path / 'data'}", digits_slim))[0]
    turned = whole(read(f"{reader}/{tmp_path / 'data'}", digits_slim, exif=True))[0]
    assert float(upright[0, 0, :16].mean()) > 0.99 and torch.equal(turned[0], upright[0].rot90(-1, (1, 2)))
    table = table.remove_columns("label").add_column("label", ["0"] * 4)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(InputError, match=r"image 0 of .* has no class number but '0'; name its column with --target-k"):
        whole(read(f"{reader}/{tmp_path / 'text'}", digits_slim))
    with pytest.raises(InputError, match=r"image 0 of .*secret \(test\) has the class number -1, but there are 10"):
        whole(read(f"{reader}/{tmp_path / 'secret'}", digits_slim))


@pytest.mark.slow
def test_imagenets_number_of_shards_is_read_one_at_a_time(
    tmp_path: Path, digits_slim: SlimViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,282 of them: at any time one is open, and what is held does not grow with their number."""
    with webdataset.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=4, verbose=0) as writer:
        for index in range(4 * 1282):
            writer.write({"__key__": f"{index:06d}", "png": PNG, "cls": index % 10})
    shutil.copy(tmp_path / "train-0000.tar", tmp_path / "val-0000.tar")
    monkeypatch.setattr("lowpass.pipeline.data.streams.BUFFER", 100)
    data = read(f"wds/{tmp_path}", digits_slim)
    assert isinstance(data.calibration.source, Shards) and len(data.calibration.source.lengths) == 1282  # type: ignore[attr-defined]
    for images in (data.calibration, data.train):
        held, opened = [], []
        tracemalloc.start()
        for number, _ in enumerate(images):  # type: ignore[arg-type]
            if number % 200 == 150:
                held.append(tracemalloc.get_traced_memory()[0])
                opened.append(sum(file.suffix == ".tar" for file in open_files()))
        tracemalloc.stop()
        assert number == 4 * 1282 - 1 and max(opened) <= 1
        assert max(held) - held[0] < 2**20
    drawn = subset(data.calibration, [5127, 0, 2500])
    assert [label for _, label in (drawn[place] for place in range(3))] == [7, 0, 0]


def open_files() -> Iterator[Path]:
    for number in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # what listed them
            yield number.readlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wds", "hfids"])
def test_a_stream_goes_all_the_way(
    name: str, written: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, options = written[name]
    words = ["--model", "digits_deit", "--data", spec, "--target-macs", "0.7"]
    words += [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    dry = answer(capsys, "compress", *words, "--dry-run", "--out", str(tmp_path / "run"))
    assert (dry["train_images"], dry["test_images"]) == COUNTS
    made = answer(capsys, "compress", *words, "--out", str(tmp_path / "run"), "--workers", "2")
    assert made["dense"]["top1"] > 96 and made["slim"]["top1"] > 80
    tuned = answer(capsys, "finetune", str(tmp_path / "run"), "--epochs", "1", "--batch-size", "16")
    tested = answer(capsys, "evaluate", str(tmp_path / "run"))
    assert tested["slim"]["top1"] == tuned["slim"]["top1"] > 80
    run = lowpass.Run(tmp_path / "run")
    assert run.metrics.data == spec and run.export().exists()
    again = answer(capsys, "compress", *words, "--out", str(tmp_path / "again"), "--workers", "0")
    assert again["slim"]["top1"] == made["slim"]["top1"]
    logs = [(tmp_path / run / "search.jsonl").read_text() for run in ("run", "again")]
    assert logs[0] == logs[1]


def test_a_data_set_that_is_empty_is_refused_by_the_command(
    written: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", "digits_deit", "--target-macs", "0.7", "--out", str(tmp_path / "run"))
    assert "--data is empty" in refusal(capsys, "compress", *words, "--data", "")
    assert "there is no folder" in refusal(capsys, "compress", *words, "--data", f"wds/{tmp_path / 'none'}")
    assert picture(torch.zeros(3, 4, 4)).size == (4, 4)
