"""Images to score, measure, train and test on: the embedded digits, an image folder, any reader timm knows, or what is
in memory already."""

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.data.digits import NUM_CLASSES, DigitScenes
from lowpass.pipeline.data.folders import Split, read_folders
from lowpass.pipeline.model.architecture import Architecture

Images = Dataset[tuple[Tensor, int]]
Batches = list[tuple[Tensor, Tensor]]

READERS = ("hfds", "hfids", "wds", "tfds", "torch")  # timm's dataset readers besides the image folder
MODES = {1: "L", 3: "RGB"}  # input channels -> how Pillow opens an image


@dataclass(frozen=True)
class Data:
    """One data set, normalised for one model. `train` is augmented; `calibration` is the same images, plain. `classes`
    are named in the order of the labels; None: the reader does not say."""

    name: str
    train: Images
    calibration: Images
    test: Images
    classes: tuple[str, ...] | None
    num_classes: int
    workers: int = 0

    def loader(self, images: Images, batch_size: int) -> "Checked":
        """Batches in fixed order.

        Raises:
            InputError: as they are read, a label is none of the model's classes.
        """
        return Checked(DataLoader(cast(Any, images), batch_size, num_workers=self.workers), self)

    def calibration_batches(self, count: int, batch_size: int, seed: int, description: str) -> Batches:
        """At most `count` plain training images in memory, drawn by `seed`."""
        total = len(cast(Sized, self.calibration))
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
        batches = self.loader(Subset(self.calibration, chosen.tolist()), batch_size)
        return [(images, labels) for images, labels in track(batches, description)]

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels that are none of the model's classes.

        Raises:
            InputError: with the first of them.
        """
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise InputError(
                f"{self.name} has an image of class number {int(outside[0])}, but the model has {self.num_classes} "
                "classes, 0 and up; give the data the model was trained on"
            )


class Checked:
    """A loader whose labels are looked at as they come."""

    def __init__(self, loader: DataLoader[tuple[Tensor, Tensor]], data: Data) -> None:
        self.inner, self.data = loader, data

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Any:
        for images, labels in self.inner:
            self.data.check_labels(labels)
            yield images, labels


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
        names = tuple(str(digit) for digit in range(NUM_CLASSES))
        data = Data("digits", *scenes, classes=names, num_classes=dense.num_classes)
    else:
        data = _from_timm(spec, architecture, seed)
    if data.classes is not None and len(data.classes) != dense.num_classes:
        raise InputError(
            f"{spec} has {len(data.classes)} classes, but the model has {dense.num_classes}; "
            "give the data the model was trained on, or weights trained on this data"
        )
    return data


def data_in_memory(train: Any, test: Any, architecture: Architecture) -> Data:
    """Data sets that a program holds, as they are: images are expected ready for the model.

    Args:
        train: of (image [C, H, W] FP32, normalised; label): a torch data set with a length, or a loader of one.
        test: the same, to measure the final top-1 on.
        architecture: of the model that will see the images.

    Raises:
        InputError: one is no such data set, is empty, or holds images of another shape.
    """
    dense = architecture.dense
    shape = (dense.in_chans, *dense.img_size)
    parts = []
    for name, given in (("train", train), ("test", test)):
        part = given.dataset if isinstance(given, DataLoader) else given
        if not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
            raise InputError(f"the {name} images are a {type(given).__name__}; give a data set with a length")
        if not len(part):
            raise InputError(f"the {name} images are empty")
        image = part[0][0]
        if not isinstance(image, Tensor) or tuple(image.shape) != shape:
            seen = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise InputError(f"the first {name} image is {seen}; {dense.name} takes tensors of {shape}")
        parts.append(cast(Images, part))
    names = getattr(parts[0], "classes", None)
    classes = tuple(map(str, names)) if names is not None and len(names) == dense.num_classes else None
    return Data("data in memory", parts[0], parts[0], parts[1], classes, dense.num_classes)


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
    plain = create_transform(**settings, crop_pct=prep.crop_pct, crop_mode=prep.crop_mode)
    # DeiT's augmentation (Touvron et al., 2021), without mixing. Beyond magnitude 9 timm may posterize to 0 bits, which
    # Pillow 13 refuses.
    augment = create_transform(**settings, is_training=True, auto_augment="rand-m9-mstd0.5-mmax9-inc1", re_prob=0.25)

    if spec.split("/")[0] in READERS:
        make = {
            split: lambda t, s=split: create_dataset(spec, None, split=s, transform=t, input_img_mode=mode)
            for split in ("train", "val")
        }
        try:
            parts = make["train"](augment), make["train"](plain), make["val"](plain)
        except Exception as error:  # whatever the third-party reader raises: the spec is the user's
            raise InputError(f"timm cannot read {spec}: {error}") from None
        return Data(spec, *parts, None, dense.num_classes, _workers())
    split: Split = read_folders(spec, augment, plain, mode, seed)
    return Data(spec, split.train, split.calibration, split.test, split.classes, dense.num_classes, _workers())


def _workers() -> int:
    return min(8, torch.multiprocessing.cpu_count())


def made_batches(architecture: Architecture, count: int, batch_size: int, seed: int) -> Batches:
    """Noise with random labels, for speed studies of a model without a checkpoint: it has nothing to be accurate on."""
    dense = architecture.dense
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, dense.in_chans, *dense.img_size, generator=generator)
    labels = torch.randint(dense.num_classes, (count,), generator=generator)
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
