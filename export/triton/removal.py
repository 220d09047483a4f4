"""Models taken out of a repository: at once for a server that watches, then file by file."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from lowpass.export.triton.decode import around, stands_around
from lowpass.export.triton.repository import existing, writing
from lowpass.export.triton.writers import explained, hidden
from lowpass.pipeline.base.errors import InputError


def remove_decode(repository: Path, names: Sequence[str]) -> list[Path]:
    """Take away what `--decode` put around models. The models serve on, and nothing of somebody's own is touched.

    Returns:
        The folders that were removed.

    Raises:
        InputError: nothing stands around a model, or there is no such model; then nothing is removed.
    """
    with explained(repository):
        models = [existing(repository, name) for name in names]
        with writing(repository, names):
            found = {model: around(model) for model in models}
            for model, those in found.items():
                if not those:
                    inner = stands_around(model)
                    raise InputError(
                        f"nothing that --decode makes stands around {model.name} in {repository}"
                        + (f"; it stands around {inner} itself: give --name {inner}" if inner else "")
                    )
            for model, those in found.items():
                for one in those:
                    remove_model(one, model)
            return [one for those in found.values() for one in those]


def remove_model(model: Path, beside: Path) -> None:
    """Into a hidden folder of another model first, where a server looks for none."""
    aside = hidden(beside, model.name)
    model.rename(aside / model.name)
    shutil.rmtree(aside)
