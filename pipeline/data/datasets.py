"""Images to score, measure, train and test on: the embedded digits, an image folder, or any reader timm knows."""

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.data.digits import NUM_CLASSES, DigitScenes
from lowpass.pipeline.model.architecture import Architecture

Images = Dataset[tuple[Tensor, int]]
Batches = list[tuple[Tensor, Tensor]]

READERS = ("hfds", "hfids", "wds", "tfds", "torch")  # timm's dataset readers besides the image folder
TEST_FOLDERS = ("val", "validation", "test")
HELD_OUT = 0.2  # of a folder without a train/val split
MODES = {1: "L", 3: "RGB"}  # input channels -> how Pillow opens an image
PROBED = 256  # images opened before anything is run


@dataclass(frozen=True)
class Data:
    """One data set, normalised for one model. `train` is augmented; `calibration` is the same images, plain."""

    name: str
    train: Images
    calibration: Images
    test: Images
    num_classes: int | None  # None: the reader does not say
    workers: int = 0

    def loader(self, images: Images, batch_size: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches in fixed order."""
        return DataLoader(cast(Any, images), batch_size, num_workers=self.workers)

    def calibration_batches(self, count: int, batch_size: int, seed: int, description: str) -> Batches:
        """At most `count` plain training images in memory, drawn by `seed`."""
        total = len(cast(Sized, self.calibration))
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
        batches = self.loader(Subset(self.calibration, chosen.tolist()), batch_size)
        return [(images, labels) for images, labels in track(batches, description)]


def load_data(spec: str, architecture: Architecture, seed: int = 0) -> Data:
    """The data set that `spec` names, preprocessed as the model expects.

    Args:
        spec: `digits`; a folder in the ImageNet layout (`train/CLASS/...` and `val/CLASS/...`, or `CLASS/...` alone, of
            which a fifth is then held out for testing); or a timm reader such as `hfds/NAME` or `wds/NAME`.
        architecture: of the model that will see the images.
        seed: of the held-out split and of the digit scenes.

    Raises:
        InputError: missing, empty or unreadable, or its class count is not the model's.
    """
    dense = architecture.dense
    if spec == "digits":
        if dense.img_size != (32, 32) or dense.in_chans != 3:
            raise InputError(f"digits are 3x32x32 images, but {dense.name} takes {dense.in_chans}x{dense.img_size}")
        scenes = (DigitScenes("train", seed=seed + 1), DigitScenes("train", renders=2), DigitScenes("test", renders=2))
        data = Data("digits", *scenes, num_classes=NUM_CLASSES)
    else:
        data = _from_timm(spec, architecture, seed)
    if data.num_classes is not None and data.num_classes != dense.num_classes:
        raise InputError(
            f"{spec} has {data.num_classes} classes, but the model has {dense.num_classes}; "
            "give the data the model was trained on, or weights trained on this data"
        )
    return data


def _from_timm(spec: str, architecture: Architecture, seed: int) -> Data:
    dense, prep = architecture.dense, architecture.preprocessing
    if dense.in_chans not in MODES:
        raise InputError(f"{dense.name} takes {dense.in_chans} channels; images can be read as 1 (grey) or 3 (RGB)")
    mode = MODES[dense.in_chans]
    settings: dict[str, Any] = {
        "input_size": (dense.in_chans, *dense.img_size),
        "mean": prep.mean,
        "std": prep.std,
        "interpolation": prep.interpolation,
    }
    plain = create_transform(**settings, crop_pct=prep.crop_pct)
    # DeiT's augmentation (Touvron et al., 2021), without mixing. Beyond magnitude 9 timm may posterize to 0 bits, which
    # Pillow 13 refuses.
    augment = create_transform(**settings, is_training=True, auto_augment="rand-m9-mstd0.5-mmax9-inc1", re_prob=0.25)

    if spec.split("/")[0] in READERS:
        make = {
            split: lambda t, s=split: create_dataset(spec, None, split=s, transform=t, input_img_mode=mode)
            for split in ("train", "val")
        }
        try:
            return Data(spec, make["train"](augment), make["train"](plain), make["val"](plain), None, _workers())
        except Exception as error:  # whatever the third-party reader raises: the spec is the user's
            raise InputError(f"timm cannot read {spec}: {error}") from None

    root = Path(spec)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; --data takes 'digits', a folder or a timm reader like hfds/NAME")
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test_root is not None:
        train, calibration, test = (
            _folder(root / "train", augment, mode),
            _folder(root / "train", plain, mode),
            _folder(test_root, plain, mode),
        )
        if _classes(train) != _classes(test):
            odd = sorted(set(_classes(train)) ^ set(_classes(test)))[:3]
            raise InputError(f"{root / 'train'} and {test_root} hold different classes, such as {', '.join(odd)}")
        num_classes = len(_classes(train))
    else:
        whole, whole_plain = _folder(root, augment, mode), _folder(root, plain, mode)
        order = torch.randperm(len(cast(Sized, whole)), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, round(HELD_OUT * len(order)))
        if held_out == len(order):
            raise InputError(f"{root} holds a single image; some must be held out for testing")
        num_classes = len(_classes(whole))
        test, rest = Subset(whole_plain, order[:held_out]), order[held_out:]
        train, calibration = Subset(whole, rest), Subset(whole_plain, rest)
    return Data(spec, train, calibration, test, num_classes, _workers())


def _folder(root: Path, transform: Any, mode: str) -> Images:
    """timm's image folder, some of whose images have been opened.

    Raises:
        InputError: it has no images, or one of them cannot be read.
    """
    try:
        images = create_dataset("", str(root), transform=transform, search_split=False, input_img_mode=mode)
    except (RuntimeError, OSError) as error:
        raise InputError(f"{root} holds no images in class folders ({error})") from None
    names = images.filenames(absolute=True)
    loose = [name for name in names if Path(name).parent == root.absolute() or Path(name).parent == root]
    if loose:
        raise InputError(f"{loose[0]} lies outside any class folder; images belong in {root}/CLASS/")
    if not names:
        raise InputError(f"{root} holds no images in class folders")
    for name in names[:: max(1, len(names) // PROBED)]:
        try:
            with Image.open(name) as image:
                image.load()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
            raise InputError(f"cannot read the image {name}: {error}") from None
    return cast(Images, images)


def _classes(images: Images) -> list[str]:
    return sorted(cast(Any, images).reader.class_to_idx)


def _workers() -> int:
    return min(8, torch.multiprocessing.cpu_count())


def made_batches(architecture: Architecture, count: int, batch_size: int, seed: int) -> Batches:
    """Noise with random labels, for speed studies of a model without a checkpoint: it has nothing to be accurate on."""
    dense = architecture.dense
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, dense.in_chans, *dense.img_size, generator=generator)
    labels = torch.randint(dense.num_classes, (count,), generator=generator)
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
