"""Every precision of a run of the real model: how its file agrees with PyTorch, what it costs in top-1, and what it
could not hold. DINOv2's activations are large, which the digits' are not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

from lowpass.benchmarks.real.steps import begin, finish
from lowpass.benchmarks.rows import Row
from lowpass.export.artefacts import export_run, open_session
from lowpass.export.onnx.file import onnx_path, read_metadata
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.registry import RuntimeName
from lowpass.export.runtimes.session import logits_of
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import sha256
from lowpass.pipeline.base.progress import logger, track
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.run.images import verification_batches

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def measure_precisions(run: Path, cache: Path, precisions: tuple[Precision, ...] = PRECISIONS) -> Iterator[list[Row]]:
    """Export a run's dense and slim model in every precision, and yield all rows so far after each file.

    Args:
        run: a run directory with images.
        cache: what was measured is kept here, and not measured again.
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
                done = finish(cache / name, _measured(run, precision, dense, batches))
            logger.info("%s: %s", name, ", ".join(f"{figure} {value}" for figure, value in done.items()))
            of = {"run": run.name, "model": "dense" if dense else "slim", "precision": precision}
            rows += [Row(of, figure, value) for figure, value in done.items()]
            yield rows


def _measured(run: Path, precision: Precision, dense: bool, batches: Batches) -> dict[str, float | str]:
    try:
        done = export_run(run, ExportOptions(precision=precision), dense=dense)
    except RunError as error:
        return {"not_exported": str(error)}
    session, right, total = open_session(cast(RuntimeName, done.runtime), run, precision, dense), 0, 0
    for images, labels in track(batches, f"testing {precision}"):
        right += int((logits_of(session, images.numpy()).argmax(-1) == labels.numpy()).sum())
        total += len(labels)
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
