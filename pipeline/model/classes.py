"""The names of a model's classes, in the order of its logits: `classes.json`, fixed when a run is made.

Which order that is, `pipeline/data/classes.py` says.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_json

CLASSES_FILE = "classes.json"


def save_classes(directory: Path, classes: Sequence[str]) -> None:
    """Write `classes.json`."""
    write_json(directory / CLASSES_FILE, list(classes))


def has_classes(directory: Path) -> bool:
    """Whether the run's classes have names."""
    return (directory / CLASSES_FILE).exists()


def load_classes(directory: Path, num_classes: int) -> tuple[str, ...]:
    """The class names of a run; numbered ones where its images did not name any.

    Raises:
        InputError: the file is damaged, or not of a model with `num_classes` classes.
    """
    path = directory / CLASSES_FILE
    if not path.exists():
        return tuple(f"class {index}" for index in range(num_classes))
    try:
        names = json.loads(path.read_bytes())
    except ValueError:
        names = None
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is not a list of {num_classes} class names, as the model has; mend or remove it")
    return tuple(names)
