"""The embedded data: handwritten digits on photographic texture, nothing downloaded.

Digits: scikit-learn's copy of the UCI optical digits (1,797 scans of 8x8). Texture: its two sample photographs. A
scene is one digit, enlarged to 16x16, at a random place on a dimmed 32x32 crop of a photograph. Test digits and test
photo regions are disjoint from those of training, so neither a scan nor a background patch is seen twice.
scikit-learn takes a second to import, which those who have images of their own are spared.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

CANVAS = 32
DIGIT = 16
NUM_CLASSES = 10
MEAN = STD = 0.5
TEST_DIGITS = 500
TEST_WIDTH = 0.3  # the right-hand part of each photograph is kept for test scenes

Split = Literal["train", "test"]


@lru_cache
def _scans(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Ink in [0, 1] as [n, DIGIT, DIGIT] and labels [n] of one split, stratified by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train, test = train_test_split(
        np.arange(len(data.target)), test_size=TEST_DIGITS, stratify=data.target, random_state=0
    )
    rows = train if split == "train" else test
    ink = [
        np.asarray(Image.fromarray(scan.astype(np.float32) / 16).resize((DIGIT, DIGIT), Image.Resampling.BILINEAR))
        for scan in data.images[rows]
    ]
    return np.stack(ink), data.target[rows]


@lru_cache
def _photographs(split: Split) -> tuple[np.ndarray, ...]:
    """The split's region of each photograph, [h, w, 3] in [0, 1], halved in size so that crops hold texture."""
    from sklearn.datasets import load_sample_images

    regions = []
    for photo in load_sample_images().images:
        small = Image.fromarray(photo).resize((photo.shape[1] // 2, photo.shape[0] // 2), Image.Resampling.BOX)
        pixels = np.asarray(small, dtype=np.float32) / 255
        edge = round(pixels.shape[1] * (1 - TEST_WIDTH))
        regions.append(pixels[:, :edge] if split == "train" else pixels[:, edge:])
    return tuple(regions)


class DigitScenes(Dataset[tuple[Tensor, int]]):
    """`renders` scenes of every digit of a split; item i of epoch e is the same scene whenever it is drawn.

    Items are normalised images [3, 32, 32] and labels. Set `epoch` before each pass to draw new scenes of the same
    digits (augmentation); leave it for fixed scenes (calibration, test).
    """

    def __init__(self, split: Split, renders: int = 1, seed: int = 0) -> None:
        self.split: Split = split
        self.seed = seed
        self.epoch = 0
        self._length = renders * len(_scans(split)[1])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        ink, labels = _scans(self.split)
        rng = np.random.default_rng([self.seed, self.epoch, index, self.split == "test"])
        digit = index % len(labels)
        photo = _photographs(self.split)[rng.integers(len(_photographs(self.split)))]
        top, left = rng.integers(photo.shape[0] - CANVAS + 1), rng.integers(photo.shape[1] - CANVAS + 1)
        scene = photo[top : top + CANVAS, left : left + CANVAS] * rng.uniform(0.3, 0.6)
        y, x = rng.integers(CANVAS - DIGIT + 1, size=2)
        window = scene[y : y + DIGIT, x : x + DIGIT]
        alpha = (ink[digit] * rng.uniform(0.7, 1.0))[..., None]
        window[...] = window * (1 - alpha) + alpha
        image = torch.from_numpy((scene - MEAN) / STD).permute(2, 0, 1).float()
        return image.contiguous(), int(labels[digit])
