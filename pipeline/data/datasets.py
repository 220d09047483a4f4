"""Images to score, measure, train and test on: the embedded digits, an image folder, tables and streams of Hugging
Face's, shards, or what is in memory already."""

import shutil
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger, track
from lowpass.pipeline.data.classes import arrange, ordered
from lowpass.pipeline.data.digits import NUM_CLASSES, DigitScenes
from lowpass.pipeline.data.draws import DrawnByPlace
from lowpass.pipeline.data.folders import FolderImages, read_splits
from lowpass.pipeline.data.hugging_face import read_tables
from lowpass.pipeline.data.hugging_face_streams import read_streams
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.data.samples import IndexedImages, Reading
from lowpass.pipeline.data.shards import read_shards
from lowpass.pipeline.data.streams import ShuffledImages, StreamImages
from lowpass.pipeline.model.architecture import Architecture

Images = Dataset[tuple[Tensor, int]]
Batches = list[tuple[Tensor, Tensor]]
Keep = Callable[[Tensor], Tensor]

READERS = ("hfds/", "wds/", "hfids/")
MODES = {1: "L", 3: "RGB"}  # input channels -> how Pillow opens an image
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where processes that read hand over their batches
BATCHES_EACH = 10  # of a process that streams, in training
PREFETCHED = 2  # batches that each of them has ready


@dataclass(frozen=True)
class Data:
    """One data set, normalised for one model. `train` is augmented; `calibration` is the same images, plain. `classes`
    are named in the order of the labels; None: nobody names them. `rows`: the model's logits that they are, where it
    has others besides."""

    name: str
    train: Images
    calibration: Images
    test: Images
    classes: tuple[str, ...] | None
    num_classes: int
    workers: int = 0
    image_bytes: int = 0  # of one image as the model takes it
    rows: tuple[int, ...] | None = None

    def loader(self, images: Images, batch_size: int) -> "Checked":
        """Batches in fixed order.

        Raises:
            InputError: as they are read, a label is none of the model's classes.
        """
        if isinstance(images, StreamImages):
            images = images.in_batches(batch_size)
        workers = self.safe_workers(batch_size)
        return Checked(DataLoader(cast(Any, images), batch_size, num_workers=workers, collate_fn=skipping), self)

    def train_loader(self, batch_size: int, seed: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled batches of augmented images, of which those that cannot be read are left out; a batch without any is
        None. What augmentation draws is drawn by `seed`, and by the epoch that the data set's `set_epoch` is told."""
        workers = self.safe_workers(batch_size)
        if isinstance(self.train, ShuffledImages):
            # Each process shuffles its shards, and drops what does not fill a batch: little, if it has many.
            enough = len(self.train) // (BATCHES_EACH * batch_size)
            workers = min(workers, len(self.train.source.lengths), enough)
            drawn: Any = self.train.seeded(seed)
        else:
            drawn = DrawnByPlace(self.train, seed)
        return DataLoader(
            drawn,
            batch_size,
            shuffle=isinstance(drawn, DrawnByPlace),
            drop_last=True,
            num_workers=workers,
            collate_fn=skipping,
        )

    def safe_workers(self, batch_size: int) -> int:
        """Processes that read: none where shared memory is too small for what they would hand over."""
        if not self.workers or not SHARED_MEMORY.exists():
            return self.workers
        needed = (self.workers * PREFETCHED + 1) * batch_size * self.image_bytes
        free = shutil.disk_usage(SHARED_MEMORY).free
        if needed <= free:
            return self.workers
        logger.info(
            "%s has %d MiB free, %d are needed for %d reading processes: reading in this one (--workers 0)",
            SHARED_MEMORY,
            free >> 20,
            needed >> 20,
            self.workers,
        )
        return 0

    def calibration_batches(
        self, count: int, batch_size: int, seed: int, description: str, keep: Keep | None = None
    ) -> Batches:
        """At most `count` plain training images, drawn by `seed`, kept by `keep` (None: in memory)."""
        chosen = torch.randperm(len_of(self.calibration), generator=torch.Generator().manual_seed(seed))[:count]
        loader = self.loader(subset(self.calibration, chosen.tolist()), batch_size)
        # Copied: what reading processes hand over lies in shared memory, of which there is little.
        kept = keep or (lambda tensor: tensor.clone())
        return [(kept(images), labels.clone()) for images, labels in track(loader, description)]

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

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seen, every = 0, len_of(cast(Images, self.inner.dataset))
        for batch in self.inner:
            if batch is None:  # none of it can be read
                continue
            images, labels = batch
            self.data.check_labels(labels)
            seen += len(labels)
            yield images, labels
        if every and not seen:
            raise InputError(f"{self.data.name} holds no image that can be read")
        if seen < every:
            logger.info("%s: left out %d of %d images that cannot be read", self.data.name, every - seen, every)


def len_of(images: Images) -> int:
    """How many images there are."""
    return len(cast(Sized, images))


def subset(images: Images, places: Sequence[int]) -> Images:
    """Those at some places, in that order."""
    return images.drawn(places) if isinstance(images, StreamImages) else Subset(images, places)


def image_bytes(architecture: Architecture) -> int:
    """Of one image as the model takes it, in FP32."""
    dense = architecture.dense
    return 4 * dense.in_chans * dense.img_size[0] * dense.img_size[1]


def skipping(items: Sequence[tuple[Tensor, int] | None]) -> Any:
    """A batch of the items that are there, or None."""
    there = [item for item in items if item is not None]
    return default_collate(there) if there else None


def load_data(spec: str, architecture: Architecture, seed: int = 0, options: DataOptions | None = None) -> Data:
    """The data set that `spec` names, preprocessed as the model expects.

    Args:
        spec: `digits`; a folder in the ImageNet layout (`train/CLASS/...` and `val/CLASS/...`, or `CLASS/...` alone, of
            which a fifth is then held out for testing); `hfds/NAME` or `hfids/NAME`, see `hugging_face.py` and
            `hugging_face_streams.py`; or `wds/FOLDER`, see `shards.py`.
        architecture: of the model that will see the images.
        seed: of the held-out split and of the digit scenes.
        options: how images are read, and who names the classes.

    Raises:
        InputError: missing, empty or unreadable, or its classes are not the model's.
    """
    options = options or DataOptions()
    dense = architecture.dense
    if spec == "digits":
        if dense.img_size != (32, 32) or dense.in_chans != 3:
            raise InputError(f"digits are 3x32x32 images, but {dense.name} takes {dense.in_chans}x{dense.img_size}")
        scenes = (DigitScenes("train", seed=seed + 1), DigitScenes("train", renders=2), DigitScenes("test", renders=2))
        names = arrange([str(digit) for digit in range(NUM_CLASSES)], dense.num_classes, options, spec).names
        return Data("digits", *scenes, classes=names, num_classes=dense.num_classes)
    if dense.in_chans not in MODES:
        raise InputError(f"{dense.name} takes {dense.in_chans} channels; images can be read as 1 (grey) or 3 (RGB)")
    workers = min(8, torch.multiprocessing.cpu_count()) if options.workers is None else options.workers
    if spec.startswith(READERS):
        return _from_reader(spec, architecture, seed, options, workers)
    return _from_folders(spec, architecture, seed, options, workers)


def _from_folders(spec: str, architecture: Architecture, seed: int, options: DataOptions, workers: int) -> Data:
    dense, (augment, plain) = architecture.dense, transforms(architecture)
    mode = MODES[dense.in_chans]
    train, test = read_splits(spec, mode, seed, options)
    own = ordered(train.classes | test.classes, options.class_order)
    classes = arrange(own, dense.num_classes, options, spec)
    label = {name: index for index, name in enumerate(classes.names)}
    files, tested = ([(path, label[name]) for path, name in part.files] for part in (train, test))
    return Data(
        spec,
        FolderImages(files, augment, mode, options.exif, skips=True),
        FolderImages(files, plain, mode, options.exif),
        FolderImages(tested, plain, mode, options.exif),
        classes.names,
        len(classes.names),
        workers,
        image_bytes(architecture),
        classes.rows,
    )


def _from_reader(spec: str, architecture: Architecture, seed: int, options: DataOptions, workers: int) -> Data:
    dense, (augment, plain) = architecture.dense, transforms(architecture)
    train: Any
    test: Any
    if is_table := spec.startswith("hfds/"):
        train, test, own = read_tables(spec, options, seed)
    else:
        train, test, own = (read_shards if spec.startswith("wds/") else read_streams)(spec, options)
    in_any_order, in_order = (IndexedImages, IndexedImages) if is_table else (ShuffledImages, StreamImages)
    rows, labels = None, list(range(dense.num_classes))
    names = options.classes if options.exact else None
    if own is not None:
        classes = arrange(own, dense.num_classes, options, spec)
        names, rows = classes.names, classes.rows
        labels = [names.index(name) for name in own]

    def reading(transform: Any, skips: bool) -> Reading:
        return Reading(transform, MODES[dense.in_chans], options.exif, labels, skips)

    measured = reading(plain, options.skip_unreadable)
    return Data(
        spec,
        in_any_order(train, reading(augment, True)),
        in_order(train, measured),
        in_order(test, measured),
        names,
        dense.num_classes if names is None else len(names),
        workers,
        image_bytes(architecture),
        rows,
    )


def transforms(architecture: Architecture) -> tuple[Any, Any]:
    """From a picture to the model's input: for training, and plain."""
    dense, prep = architecture.dense, architecture.preprocessing
    settings: dict[str, Any] = {
        "input_size": (dense.in_chans, *dense.img_size),
        "mean": prep.mean,
        "std": prep.std,
        "interpolation": prep.interpolation,
    }
    # Augmentation turns and shears pictures by the same interpolation, which Pillow does by bicubic at best.
    trained = settings | {"interpolation": "bicubic"} if prep.interpolation == "lanczos" else settings
    # DeiT's augmentation (Touvron et al., 2021), without mixing. Beyond magnitude 9 timm may posterize to 0 bits, which
    # Pillow 13 refuses.
    augment = create_transform(**trained, is_training=True, auto_augment="rand-m9-mstd0.5-mmax9-inc1", re_prob=0.25)
    return augment, create_transform(**settings, crop_pct=prep.crop_pct, crop_mode=prep.crop_mode)


def data_in_memory(train: Any, test: Any, architecture: Architecture) -> Data:
    """Data sets that a program holds, as they are: images are expected ready for the model.

    Args:
        train: of (image [C, H, W] FP32, normalised; label): a torch data set with a length, or a loader of one.
        test: the same, to measure the final top-1 on.
        architecture: of the model that will see the images.

    Raises:
        InputError: one is no such data set, is empty, or holds other items, images of another shape or kind, or labels
            that are no numbers.
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
        item = part[0]
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise InputError(f"the first {name} item is a {type(item).__name__}; give pairs of an image and its label")
        image, label = item
        if not isinstance(image, Tensor) or tuple(image.shape) != shape:
            seen = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise InputError(f"the first {name} image is {seen}; {dense.name} takes tensors of {shape}")
        if image.dtype != torch.float32:
            raise InputError(f"the first {name} image is of {image.dtype}; {dense.name} takes it normalised, in FP32")
        number = label.item() if isinstance(label, Tensor | np.generic) and label.ndim == 0 else label
        if not isinstance(number, int) or isinstance(number, bool):
            raise InputError(f"the first {name} label is {label!r}; give the number of its class, 0 and up")
        parts.append(cast(Images, part))
    names = getattr(parts[0], "classes", None)
    classes = tuple(map(str, names)) if names is not None and len(names) == dense.num_classes else None
    return Data("data in memory", parts[0], parts[0], parts[1], classes, dense.num_classes)


def made_batches(architecture: Architecture, count: int, batch_size: int, seed: int) -> Batches:
    """Noise with random labels, for speed studies of a model without a checkpoint: it has nothing to be accurate on."""
    dense = architecture.dense
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, dense.in_chans, *dense.img_size, generator=generator)
    labels = torch.randint(dense.num_classes, (count,), generator=generator)
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
