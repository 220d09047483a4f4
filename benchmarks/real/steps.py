"""A step that is done once: a folder with what it was made from, and what it said when it was finished."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import PART, write_json
from lowpass.pipeline.base.progress import logger

INPUTS, DONE = "inputs.json", "done.json"


def begin(folder: Path, inputs: Mapping[str, object]) -> dict[str, Any] | None:
    """Open a step's folder: what the step said if it is finished; None: it is to be done, or gone on with.

    Args:
        folder: of the step alone. Work from other inputs is cleared away.
        inputs: plain values of JSON that decide what comes out.

    Raises:
        InputError: the folder holds something that no step made.
    """
    wanted = json.loads(json.dumps(inputs))
    if folder.exists() and any(folder.iterdir()):
        known = _read(folder / INPUTS)
        if known is None:
            raise InputError(f"{folder} holds files that this step did not make; move them, or give another --cache")
        if known != wanted:
            changed = ", ".join(sorted(key for key in {*known, *wanted} if known.get(key) != wanted.get(key)))
            logger.info("%s: made from other inputs (%s); done anew", folder, changed)
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(f".*{PART}"):  # what a kill left
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()
    if not (folder / INPUTS).exists():
        write_json(folder / INPUTS, wanted)
    return _read(folder / DONE)


def finish(folder: Path, said: Mapping[str, object]) -> dict[str, Any]:
    """Mark a step as finished; `said` is what `begin` gives from now on."""
    write_json(folder / DONE, said)
    return dict(said)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` once all of it is there: a kill leaves none or all."""
    part = target.with_name(f".{target.name}{PART}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
