"""Targets in milliseconds where whole parts of blocks may go: what is reached on this machine.

    python -m lowpass.benchmarks.targets.sub_blocks

DeiT-Small with random weights at batch 1: how near a plan comes to its target does not hang on what it loses. The loss
of each cut is measured as a search does, on few images of noise and without recovery; then each target is planned for
and the plan timed as a whole, in turns with the dense model. At the MACs of each such plan there is another in which no
part is gone, timed likewise.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.latency.target import latency_target
from lowpass.benchmarks.lookups import different, number, one, study
from lowpass.benchmarks.rows import RESULTS, Row, markdown, write_rows
from lowpass.benchmarks.search_cost.benchmark import random_model
from lowpass.export.runtimes.registry import RuntimeName, parse_runtimes
from lowpass.pipeline.base.exits import exit_codes
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.search.costs import Macs
from lowpass.pipeline.search.curves import BlockCurve
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.loss_curves import measure_loss_curves
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.shaping import SHAPINGS, Shaping
from lowpass.pipeline.search.state import SearchState
from lowpass.pipeline.search.target import CostTarget, make_plan

MODEL, IMAGES, BATCH = "deit_small_patch16_224", 8, 4
TIMES = 2  # that a plan is timed anew; their mean counts


def curves_of(shaping: Shaping) -> tuple[Architecture, list[BlockCurve]]:
    """The dense model, and what its parts lose, gone or smaller."""
    model, batches = random_model(MODEL, IMAGES, BATCH)
    settings = SearchSettings(sub_blocks=True, recovery=False, shaping=shaping, channel_criterion="magnitude")
    state = SearchState(model, batches, [], settings, Path())
    dense = model.architecture.model_copy(update={"token_score": shaping.token_score})
    return dense, measure_loss_curves(state, SearchLog())


def whole_parts_kept(curves: Sequence[BlockCurve]) -> list[BlockCurve]:
    """Without the options that take a part away."""
    return [
        BlockCurve(
            attention=tuple(option for option in curve.attention if option.heads),
            hidden=tuple(option for option in curve.hidden if option.size),
            tokens=curve.tokens,
        )
        for curve in curves
    ]


def rows(
    runtime: RuntimeName, shares: Sequence[float], dense: Architecture, curves: Sequence[BlockCurve]
) -> Iterator[Row]:
    """What was asked and what was reached on a runtime."""
    target = latency_target(dense, 1.0, runtime, "fp32", 1)
    measure = target.measure
    assert measure is not None
    dense_ms = median(measure(dense) for _ in range(TIMES))
    yield Row({"runtime": runtime, "share": "", "parts": "dense"}, "p10_ms", dense_ms)
    for share in shares:
        of = {"runtime": runtime, "share": share, "parts": "may go"}
        asked = CostTarget(share * dense_ms, target.costs, "ms", measure)
        yield Row(of, "asked_ms", asked.value)
        began = time.monotonic()
        slim = dense.model_copy(update={"blocks": make_plan(curves, dense, asked).blocks})
        yield Row(of, "planning_s", time.monotonic() - began)
        yield from _timed(of, slim, dense, dense_ms, measure)
        same = make_plan(whole_parts_kept(curves), dense, CostTarget(slim.macs(), Macs(dense), "MACs"))
        other = dense.model_copy(update={"blocks": same.blocks})
        yield from _timed({**of, "parts": "stay, at these MACs"}, other, dense, dense_ms, measure)


def _timed(
    of: Mapping[str, object],
    slim: Architecture,
    dense: Architecture,
    dense_ms: float,
    measure: Callable[[Architecture], float],
) -> Iterator[Row]:
    times = sorted(measure(slim) for _ in range(TIMES))
    saved = dense.macs() / slim.macs()
    console.print(f"{of}: {median(times):.2f} ms, {1 / saved:.3f} of the MACs", soft_wrap=True)
    yield Row(of, "p10_ms", median(times), times[0], times[-1])
    yield Row(of, "macs_share", 1 / saved)
    yield Row(of, "efficiency", dense_ms / median(times) / saved)
    yield Row(of, "attentions", sum(1 for block in slim.blocks if block.heads))
    yield Row(of, "mlps", sum(1 for block in slim.blocks if block.hidden))
    yield Row(of, "token_stages", sum(b.keep < slim.tokens_in(i) for i, b in enumerate(slim.blocks)))


def targets_sub_blocks(results: Path) -> str:
    """The table of the documents."""
    found, lines = study(results, "targets_sub_blocks"), []
    for runtime, share, parts in different(found, "runtime", "share", "parts"):
        of = {"runtime": runtime, "share": share, "parts": parts}
        asked, took = one(found, "asked_ms", **of), one(found, "p10_ms", **of)
        off = "-"
        if asked is not None and took is not None:
            off = f"{100 * (float(took['value']) / float(asked['value']) - 1):+.1f}%"
        counts = [number(one(found, what, **of), "{:.0f}") for what in ("attentions", "mlps", "token_stages")]
        share_of_macs = number(one(found, "macs_share", **of), "{:.3f}")
        times = [number(asked, "{:.2f}"), number(took, "{:.2f}"), off]
        lines.append([runtime, share or "1", parts, *times, share_of_macs, *counts])
    header = ["runtime", "share of dense", "whole parts", "asked, ms", "reached, ms", "off by", "share of MACs"]
    return markdown([*header, "attentions", "MLPs", "token drops"], lines, 3)


def main(
    runtimes: Annotated[str, typer.Option(help="Of this machine.")] = "onnxruntime,openvino",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Targets in milliseconds with whole parts gone."""
    with exit_codes():
        command, found = "python -m lowpass.benchmarks.targets.sub_blocks", list[Row]()
        # What suits ONNX Runtime and OpenVINO is the same.
        dense, curves = curves_of(SHAPINGS["onnxruntime"].model_copy(update={"token_stages": "auto"}))
        for runtime in parse_runtimes(runtimes):
            for row in rows(runtime, (0.5, 0.35), dense, curves):
                found.append(row)
                write_rows(out / "targets_sub_blocks.csv", found, describe(), command)


if __name__ == "__main__":
    typer.run(main)
