"""The tables of README.md and docs/, made from the results: `python -m lowpass.benchmarks.tables`, or with `--check` to
see whether they still agree. A table stands between `<!-- table: NAME -->` and `<!-- /table -->`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lowpass.benchmarks.forecast.efficiency import forecast_efficiency
from lowpass.benchmarks.forecast.targets import forecast_targets
from lowpass.benchmarks.lookups import different, number, one, over_seeds, study
from lowpass.benchmarks.rows import RESULTS, markdown
from lowpass.benchmarks.serving.tables import serving, serving_floods, serving_pictures, serving_soak
from lowpass.benchmarks.targets.sub_blocks import targets_sub_blocks
from lowpass.benchmarks.training.arithmetic import training_arithmetic
from lowpass.benchmarks.training.throughput import training_throughput
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.exits import exit_codes
from lowpass.pipeline.base.files import write_text

BLOCK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
RIVALS = ("dense-exported", "lowpass", "as-published", "uniform-width", "evit", "tome")
LEAST_TOP1 = 95.0  # percent, of a file that a runtime computes as PyTorch does, but for ties
STAGES = {"top1_no_training": "no training", "top1_finetuned": "fine-tuned"}


def accuracy(*names: str) -> Callable[[Path], str]:
    """Variants by target, over seeds."""

    def table(results: Path) -> str:
        lines = []
        for name in names:
            rows = study(results, name)
            for group, variant, target in different(rows, "group", "variant", "target"):
                of = {"variant": variant, "target": target}
                seeds = len({row["seed"] for row in rows if row["variant"] == variant and row["target"] == target})
                figures = [over_seeds(rows, stage, **of) for stage in STAGES]
                lines.append([name.removeprefix("accuracy_"), group, variant, target, str(seeds), *figures])
        return markdown(["study", "pruned", "variant", "share of MACs", "seeds", *STAGES.values()], lines, 3)

    return table


def noise(results: Path) -> str:
    """Top-1 by the noise that a criterion sees."""
    rows = study(results, "accuracy_noise")
    strengths = [strength for (strength,) in different(rows, "noise")]
    lines = [
        [scored, variant, *(over_seeds(rows, "top1_no_training", variant=variant, noise=s) for s in strengths)]
        for scored, variant in different(rows, "scored", "variant")
    ]
    return markdown(["scored", "by", *(f"noise {strength}" for strength in strengths)], lines, 2)


def speed(model: str) -> Callable[[Path], str]:
    """Milliseconds and efficiency of every candidate."""

    def table(results: Path) -> str:
        rows = study(results, "speed_paper", model=model)
        lines = []
        for runtime, precision, batch in different(
            [row for row in rows if row["figure"] == "efficiency"], "runtime", "precision", "batch"
        ):
            of = {"runtime": runtime, "precision": precision, "batch": batch}
            cells = [number(one(rows, "p50_ms", candidate="dense", **of), "{:.1f} ms")]
            for rival in RIVALS:
                ms = one(rows, "p50_ms", candidate=rival, **of)
                efficiency = number(one(rows, "efficiency", candidate=rival, **of), "{:.2f}")
                cells.append("-" if ms is None else f"{number(ms, '{:.1f} ms')} ({efficiency})")
            lines.append([f"{runtime} {precision}", batch, *cells])
        return markdown(["runtime", "batch", "dense", *RIVALS], lines)

    return table


def gains(results: Path) -> str:
    """What a precision gains over FP32."""
    rows = study(results, "precision_gains", figure="gain_over_fp32")
    lines = [
        [
            *(row[key] for key in ("runtime", "batch", "candidate", "precision")),
            f"{float(row['value']):.2f}x ({float(row['low']):.2f} to {float(row['high']):.2f})",
        ]
        for row in rows
        if row["precision"] != "fp32"
    ]
    return markdown(["runtime", "batch", "model", "precision", "over its own FP32 (quartiles)"], lines)


def agreement(results: Path) -> str:
    """How files agree with PyTorch."""
    rows = study(results, "precision_agreement")
    lines = []
    for head, precision, selection in different(
        [row for row in rows if row["precision"]], "classifier", "precision", "selection"
    ):
        of = {"classifier": head, "precision": precision, "selection": selection}
        figures = [("images", "{:.0f}"), ("same_top1_percent", "{:.1f}%"), ("largest_difference", "{:.1e}")]
        cells = [number(one(rows, figure, **of), form) for figure, form in figures]
        lines.append([head, f"{precision}, {selection}", *cells, number(one(rows, "layers_left_out", **of), "{:.0f}")])
    return markdown(
        ["classifier", "file", "images", "same top-1", "largest logit difference", "layers left in FP32"], lines, 2
    )


def search_cost(results: Path) -> str:
    """What a search costs, in forwards of one image through the dense model."""
    rows = study(results, "search_cost")
    lines = []
    for model, schedule in different([row for row in rows if row["schedule"]], "model", "schedule"):
        of = {"model": model, "schedule": schedule}
        row, authors = (one(rows, "image_forwards", **{**of, "schedule": who}) for who in (schedule, "authors"))
        assert row is not None and authors is not None
        fewer = f"{float(authors['value']) / float(row['value']):.1f}x"
        images = f"{row['scored']} / {row['measured']}"
        share = number(one(rows, "macs_share", **of), "{:.3f}")
        lines.append([model, schedule, images, number(row, "{:,.0f}"), fewer, share])
    header = ["model", "schedule", "images scored / measured", "image-forwards", "fewer", "MACs that stayed"]
    return markdown(header, lines, 2)


def targets(results: Path) -> str:
    """How near searches come to what was asked."""
    rows = study(results, "targets")
    lines = []
    for row in rows:
        asked = row["asked"]
        if row["figure"] == "reached":
            off = 100 * (float(row["value"]) / float(asked) - 1)
            lines.append(["MACs", f"{float(asked):.2f} of dense", f"{float(row['value']):.4f}", f"{off:+.1f}%"])
        elif row["figure"] == "measured_ms":
            off = 100 * (float(row["value"]) / float(asked) - 1)
            what = f"latency, {row['runtime']}, batch {row['batch']}"
            lines.append([what, f"{float(asked):.2f} ms", f"{float(row['value']):.2f} ms", f"{off:+.1f}%"])
    return markdown(["target", "asked", "reached", "off by"], lines)


def headline(results: Path) -> str:
    """What it buys, for the README."""
    lines = []
    recovered = study(results, "accuracy_recovery")
    of = {"variant": "lowpass", "target": "0.5"}
    dense = number(one(recovered, "top1_dense", **of), "{:.2f}%")
    for stage, name in STAGES.items():
        lines.append(
            [f"digits, half of the MACs, {name}: top-1 (dense {dense})", f"{over_seeds(recovered, stage, **of)}%"]
        )
    real_rows = study(results, "real", setting="fashion-112", method="lowpass")
    seeds = len({row["seed"] for row in real_rows})
    for level in ("0.5", "0.35"):
        of = {"level": level}
        dense = number(one(real_rows, "top1_dense", **of), "{:.2f}%")
        what = f"DINOv2-S on Fashion-MNIST, {level} of the MACs, no training: top-1 (dense {dense}; seeds: {seeds})"
        lines.append([what, f"{over_seeds(real_rows, 'top1_no_training', **of)}%"])
    rows = study(results, "speed_paper", model="deit_small")
    macs = {who: one(rows, "macs", candidate=who) for who in ("dense", "lowpass")}
    saved = float((macs["dense"] or {})["value"]) / float((macs["lowpass"] or {})["value"])
    for runtime, precision in (("onnxruntime", "fp32"), ("openvino", "bf16")):
        for batch in ("1", "8", "32"):
            at = {"candidate": "lowpass", "runtime": runtime, "precision": precision, "batch": batch}
            gained = number(one(rows, "speedup", **at), "{:.2f}x")
            what = f"DeiT-Small, {saved:.2f}x fewer MACs, {runtime} {precision} on two CPU cores, batch {batch}"
            lines.append([f"{what}: speed-up", gained])
    gain = number(one(study(results, "serving", model="deit_small"), "throughput_gain"), "{:.2f}x")
    lines.append(["DeiT-Small behind a Triton server on two CPU cores: images a second", gain])
    return markdown(["what", "measured"], lines)


def compatibility(results: Path) -> str:
    """Which opsets each runtime reads, how far from PyTorch it is at most, and which it reads and computes wrongly."""
    rows = study(results, "compatibility")
    precisions = [precision for (precision,) in different(rows, "precision")]
    lines = []
    for runtime, version in different(rows, "runtime", "version"):
        cells = []
        for precision in precisions:
            mine = [
                row
                for row in rows
                if (row["runtime"], row["version"], row["precision"]) == (runtime, version, precision)
            ]
            agree = {row["opset"]: float(row["value"]) >= LEAST_TOP1 for row in mine if row["figure"] == "same_top1"}
            apart = [
                float(row["value"]) for row in mine if row["figure"] == "largest_difference" and agree[row["opset"]]
            ]
            right = ", ".join(opset for opset in agree if agree[opset])
            wrong = ", ".join(opset for opset in agree if not agree[opset])
            cells.append((f"{right} ({max(apart):.1g})" if right else "none") + (f"; {wrong} wrong" if wrong else ""))
        lines.append([f"{runtime} {version}", *cells])
    return markdown(["on CPU", *precisions], lines)


def kernels(results: Path) -> str:
    """Kernels of every candidate's engine, and what they move at batch 32."""
    rows = study(results, "kernels")
    lines = []
    for model, who in different(rows, "model", "candidate"):
        of = {"model": model, "candidate": who}
        counts = [
            number(one(rows, "kernels", precision=precision, batch="1", **of), "{:.0f}")
            for (precision,) in different(rows, "precision")
        ]
        moved, dense = (
            one(rows, "bytes_moved", precision="fp16", batch="32", model=model, candidate=name)
            for name in (who, "dense")
        )
        share = "-" if moved is None or dense is None else f"{float(moved['value']) / float(dense['value']):.2f}"
        lines.append([model, who, *counts, share])
    header = [f"kernels, {precision}" for (precision,) in different(rows, "precision")]
    return markdown(["model", "candidate", *header, "bytes moved, FP16, batch 32, of dense"], lines, 2)


def real(results: Path) -> str:
    """Points of top-1 between every method and the dense real model, by the MACs that stay."""
    rows = study(results, "real")
    levels = sorted((level for (level,) in different(rows, "level")), key=float, reverse=True)
    lines = []
    for setting, method, tested in different(rows, "setting", "method", "test_images"):
        of = {"setting": setting, "method": method, "test_images": tested}
        own = [row for row in rows if all(row[key] == value for key, value in of.items())]
        dense = one(own, "top1_dense")
        cells = []
        for level in levels:
            lost = [
                row | {"figure": "lost", "value": str(float(row["value"]) - float(dense["value"]))}
                for row in own
                if dense is not None and row["figure"] == "top1_no_training" and row["level"] == level
            ]
            cells.append(over_seeds(lost, "lost"))
        seeds = str(len({row["seed"] for row in own}))
        lines.append([setting, method, tested, seeds, number(dense, "{:.2f}"), *cells])
    header = ["setting", "method", "test images", "seeds", "dense", *(f"{level} of the MACs" for level in levels)]
    return markdown(header, lines, 2)


def real_merging(results: Path) -> str:
    """Merging tokens against dropping them."""
    rows, lines = study(results, "real_merging"), []
    for tokens, share, way, images in different(rows, "tokens", "macs_share", "way", "images"):
        of = {"tokens": tokens, "way": way}
        top1s = [number(one(rows, figure, **of), "{:.2f}") for figure in ("top1_dense", "top1")]
        gained = one(rows, "better_than_dropped", **of)
        assert gained is not None
        value, low, high = (float(gained[name]) for name in ("value", "low", "high"))
        apart = "-" if low == high else f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append([tokens, share, way, images, *top1s, apart])
    header = ["image tokens", "share of MACs", "the others are", "images", "dense", "top-1", "better than dropped"]
    return markdown(header, lines, 3)


def real_precisions(results: Path) -> str:
    """What every precision of the real model costs, dense and slim."""
    rows = study(results, "real_precisions")
    figures = [
        ("top1", "{:.1f}"),
        ("same_top1", "{:.1f}%"),
        ("usual_difference", "{:.1e}"),
        ("largest_logit", "{:.1f}"),
        ("largest_magnitude", "{:,.0f}"),
        ("layers_kept_fp32", "{:.0f}"),
        ("layers_left_out", "{:.0f}"),
    ]
    lines = []
    for model, precision in different(rows, "model", "precision"):
        found = {figure: one(rows, figure, model=model, precision=precision) for figure, _ in figures}
        refused = one(rows, "not_exported", model=model, precision=precision)
        cells = [number(found[figure], form) for figure, form in figures]
        lines.append([model, precision, *(cells if refused is None else ["refused", *cells[1:]])])
    header = ["top-1", "same top-1", "usual logit difference", "largest logit", "largest FP16 value"]
    return markdown(["model", "precision", *header, "layers kept in FP32", "left out of 8 bits"], lines, 2)


def forecasts(results: Path) -> str:
    """How wrong forecasts are on rows left out: the median error, and what nine in ten stay below."""
    rows = study(results, "forecast")
    lines = []
    for gpu, engine, precision, batches in different(rows, "gpu", "engine", "precision", "batches"):
        of = {"gpu": gpu, "engine": engine, "precision": precision, "batches": batches}
        cells = [number(one(rows, "rows", left_out="model", **of), "{:.0f}")]
        for left_out in ("model", "gpu"):
            for figure in ("median_error", "nine_in_ten_below"):
                found = one(rows, figure, left_out=left_out, **of)
                cells.append("-" if found is None else f"{100 * float(found['value']):.0f}%")
        lines.append([gpu, engine, precision, batches, *cells])
    header = ["rows", "model left out: median", "nine in ten below", "GPU left out: median", "nine in ten below"]
    return markdown(["GPU", "engine", "precision", "batch", *header], lines, 4)


TABLES: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "accuracy": accuracy("accuracy_recovery", "accuracy_recovery_curve", "accuracy_as_published"),
    "before-planning": accuracy("accuracy_before_planning"),
    "criteria": accuracy("accuracy_criteria"),
    "settings": accuracy("accuracy_settings"),
    "noise": noise,
    "real": real,
    "real-merging": real_merging,
    "real-precisions": real_precisions,
    "speed-small": speed("deit_small"),
    "speed-tiny": speed("deit_tiny"),
    "speed-base": speed("deit_base"),
    "kernels": kernels,
    "forecast": forecasts,
    "forecast-efficiency": forecast_efficiency,
    "forecast-targets": forecast_targets,
    "parts": accuracy("accuracy_parts"),
    "gains": gains,
    "agreement": agreement,
    "serving": serving,
    "serving-floods": serving_floods,
    "serving-soak": serving_soak,
    "serving-pictures": serving_pictures,
    "search-cost": search_cost,
    "targets": targets,
    "targets-sub-blocks": targets_sub_blocks,
    "compatibility": compatibility,
    "training": training_arithmetic,
    "training-throughput": training_throughput,
}


def filled(text: str, results: Path) -> str:
    """A document with every table made anew.

    Raises:
        InputError: it asks for a table that there is not.
    """

    def fill(block: re.Match[str]) -> str:
        name = block[2]
        if name not in TABLES:
            raise InputError(f"there is no table {name!r}; choose from {', '.join(TABLES)}")
        return f"{block[1]}{TABLES[name](results)}\n{block[4]}"

    return BLOCK.sub(fill, text)


def differing(text: str, results: Path) -> list[str]:
    """The names of the tables that the results no longer give."""
    return [block[2] for block in BLOCK.finditer(text) if filled(block[0], results) != block[0]]


def documents(root: Path) -> list[Path]:
    """What may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail where a table differs.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of the CSVs.")] = RESULTS,
) -> None:
    """Make the tables of README.md and docs/ from the results, in the current directory."""
    differ = []
    for document in documents(Path()):
        before = document.read_text()
        after = filled(before, results)
        if after != before:
            differ.append(f"{document} ({', '.join(differing(before, results))})")
            if not check:
                write_text(document, after)
    if check and differ:
        raise RunError(f"tables differ from the results in {', '.join(differ)}; `python -m lowpass.benchmarks.tables`")
    print("\n".join(differ) if differ else "all tables agree with the results")


if __name__ == "__main__":
    with exit_codes():
        typer.run(main)
