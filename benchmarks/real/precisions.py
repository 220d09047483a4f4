"""Every precision of a run of the real model: how its file agrees with PyTorch, what it costs in top-1, and what it
could not hold. DINOv2's activations are large, which the digits' are not."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast, get_args

from lowpass.benchmarks.real.steps import begin, finish
from lowpass.benchmarks.rows import Origin, Row
from lowpass.export.artefacts import export_run, open_session
from lowpass.export.evaluate import count_right
from lowpass.export.onnx.file import onnx_path, read_metadata
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.registry import RuntimeName
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import sha256
from lowpass.pipeline.base.progress import logger, track
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.run.images import verification_batches

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def measure_precisions(
    run: Path, cache: Path, origin: Origin, precisions: tuple[Precision, ...] = PRECISIONS
) -> Iterator[list[Row]]:
    """Export a run's dense and slim model in every precision, and yield all rows so far after each file.

    Args:
        run: a run directory with images.
        cache: what was measured is kept here, and not measured again.
        origin: of what is measured now.
        precisions: which.

    Raises:
        InputError: a precision is unknown, or the run has no images.
    """
    if unknown := [each for each in precisions if each not in PRECISIONS]:
        raise InputError(f"there is no precision {unknown[0]!r}; known are {', '.join(PRECISIONS)}")
    batches, made = verification_batches(run, None)
    if made:
        raise InputError(f"{run} has no images: agreement on noise would say little")
    rows = list[Row]()
    for dense in (True, False):
        weights = sha256(run / ("dense.safetensors" if dense else "slim.safetensors"))
        for precision in precisions:
            name = f"{'dense' if dense else 'slim'}-{precision}"
            done = begin(cache / name, {"weights": weights})
            if done is None:
                figures = _measured(run, precision, dense, batches)
                done = finish(cache / name, {"figures": figures, "origin": asdict(origin)})
            figures = done["figures"]
            logger.info("%s: %s", name, ", ".join(f"{figure} {value}" for figure, value in figures.items()))
            of = {"run": run.name, "model": "dense" if dense else "slim", "precision": precision}
            rows += [Row(of, figure, value, origin=Origin(**done["origin"])) for figure, value in figures.items()]
            yield rows


def _measured(run: Path, precision: Precision, dense: bool, batches: Batches) -> dict[str, float | str]:
    try:
        done = export_run(run, ExportOptions(precision=precision), dense=dense)
    except RunError as error:
        return {"not_exported": str(error)}
    session = open_session(cast(RuntimeName, done.runtime), run, precision, dense)
    right, total = count_right(session, track(batches, f"testing {precision}"))
    figures: dict[str, float | str] = {
        "images": total,
        "top1": 100 * right / total,
        "same_top1": done.same_top1,
        "usual_difference": done.usual_difference,
        "largest_difference": done.largest_difference,
        "largest_logit": done.largest_logit,
    }
    if done.largest_magnitude is not None:
        figures["largest_magnitude"] = done.largest_magnitude
        figures["layers_kept_fp32"] = len(done.kept_fp32)
    left_out = read_metadata(onnx_path(run, precision, dense)).get("left_out")
    if left_out is not None:
        figures["layers_left_out"] = len(json.loads(left_out))
    return figures
