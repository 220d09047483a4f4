"""From a run to a page that people read: `report`."""

from pathlib import Path
from typing import Annotated

import typer

from lowpass.commands.common import AsJson, DataOption, RunDirectory, say


def report(
    directory: RunDirectory,
    compare: Annotated[
        list[Path] | None, typer.Option(metavar="DIR2", help="A run to put beside it; repeatable.")
    ] = None,
    data: DataOption = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Test images to measure on. Default: as many as a minute allows.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write DIR/report.html, one page that shows everything of a run.

    It opens from disk and fetches nothing. What was not measured says so."""
    from lowpass.api import Run

    path = Run(directory).report(compare or (), data, images)
    size = path.stat().st_size
    found = {"run": str(directory), "report": str(path), "bytes": size, "compared": [str(one) for one in compare or ()]}
    say(found, f"{path}: {size / 1e6:.2f} MB, opens in any browser", as_json)
