"""Digit scenes written by the libraries whose formats are read: shards by `webdataset`, Parquet by `datasets`."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image

from lowpass.pipeline.data.digits import DigitScenes, Split

SPLITS: tuple[tuple[str, Split], ...] = (("train", "train"), ("validation", "test"))


def picture(image: torch.Tensor) -> Image.Image:
    """A normalised scene [3, H, W] as a picture."""
    pixels = (image.permute(1, 2, 0) * 0.5 + 0.5) * 255
    return Image.fromarray(pixels.round().clip(0, 255).to(torch.uint8).numpy())


def as_png(image: torch.Tensor) -> bytes:
    """The same, as a file."""
    file = io.BytesIO()
    picture(image).save(file, "png")
    return file.getvalue()


def digits(split: Split, count: int) -> Iterator[tuple[torch.Tensor, int]]:
    """The first scenes of a split."""
    scenes = DigitScenes(split, renders=2)
    yield from (scenes[index] for index in range(count))


def write_shards(
    root: Path, counts: Sequence[int] = (200, 500), shards: int = 5, described: bool = True, json_labels: bool = False
) -> Path:
    """`counts` scenes to train and to test on in `shards` tar files each, beside timm's description or without one."""
    root.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {"splits": {}}
    for (name, split), count in zip(SPLITS, counts, strict=True):
        each = -(-count // shards)
        pattern = str(root / f"digits-{name}-%04d.tar")
        with webdataset.ShardWriter(pattern, maxcount=each, verbose=0) as writer:
            for index, (image, label) in enumerate(digits(split, count)):
                sample = {"json": {"digit": label}} if json_labels else {"cls": label}
                writer.write({"__key__": f"{index:06d}", "png": as_png(image), **sample})
        files = sorted(file.name for file in root.glob(f"digits-{name}-*.tar"))
        lengths = [min(each, count - start) for start in range(0, count, each)]
        info["splits"][name] = {"name": name, "num_samples": count, "filenames": files, "shard_lengths": lengths}
    if described:
        (root / "_info.json").write_text(json.dumps(info))
    return root


def write_parquet(root: Path, counts: Sequence[int] = (200, 500), shards: int = 5, names: Sequence[str] = ()) -> Path:
    """The same as Parquet files that the Hub has, with columns `picture` and `digit`."""
    import datasets

    root.mkdir(parents=True, exist_ok=True)
    for table, name in zip(tables(counts, names), ("train", "validation"), strict=True):
        for shard in range(shards):
            path = root / f"{name}-{shard:05d}-of-{shards:05d}.parquet"
            assert isinstance(table, datasets.Dataset)
            table.shard(shards, shard).to_parquet(str(path))
    return root


def tables(counts: Sequence[int] = (200, 500), names: Sequence[str] = ()) -> list[Any]:
    """Two tables of scenes; `names`: of the classes, by number."""
    import datasets

    labels = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"picture": datasets.Image(), "digit": labels})
    made = []
    for (_, split), count in zip(SPLITS, counts, strict=True):
        images, numbers = zip(*digits(split, count), strict=True)
        rows = {"picture": [picture(image) for image in images], "digit": list(numbers)}
        made.append(datasets.Dataset.from_dict(rows, features=features))
    return made
