"""What a run was asked for, where each thing comes from, and the commands that make it again and put it to use."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.run.dense_check import Provenance
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.run.recipe import IN_MEMORY, RECIPE_FILE, Recipe
from lowpass.report.current import Engine, ExportedFile

EMBEDDED = "digits_deit"  # the model that brings its own weights


@dataclass(frozen=True)
class Asked:
    """One thing that was asked for or found, and who says so."""

    what: str
    value: str
    source: str


@dataclass(frozen=True)
class Command:
    """Lines to type, and what they do. `language`: `shell` or `python`."""

    what: str
    lines: str
    language: str = "shell"


def asked(recipe: Recipe, provenance: Provenance | None, metrics: Metrics, architecture: Architecture) -> list[Asked]:
    """What was asked of a run, in the order in which it is settled."""
    prep, dense = architecture.preprocessing, architecture.dense
    pixels = (
        f"{dense.in_chans} × {dense.img_size[0]} × {dense.img_size[1]}; mean {_numbers(prep.mean)}, "
        f"std {_numbers(prep.std)}; crop {prep.crop_pct:g} ({prep.crop_mode}), {prep.interpolation}"
    )
    rows = [
        Asked("how far", _goal(recipe), RECIPE_FILE),
        Asked("model", recipe.model, RECIPE_FILE),
        Asked("weights", *_weights(recipe, provenance)),
        Asked("images", recipe.data or "none", RECIPE_FILE),
        Asked("classes", f"{dense.num_classes}", provenance.classes if provenance else "the images, if they name any"),
        Asked("preprocessing", pixels, prep.source or "timm's defaults"),
    ]
    if provenance is not None and provenance.checked_top1 is not None:
        checked = f"{provenance.checked_top1:.2f} % on {provenance.checked_images:,} test images"
        rows.append(Asked("dense model, before anything else", checked, "measured as the run began"))
        rows += [
            Asked(f"the same, read with {options}", f"{top1:.2f} %", "measured as the run began")
            for options, top1 in provenance.alternatives.items()
        ]
    if not recipe.imported:
        rows += _settings(recipe)
    if metrics.finetuned_epochs:
        rows.append(Asked("fine-tuning", f"{metrics.finetuned_epochs} epochs in all", "metrics.json"))
    return rows


def _goal(recipe: Recipe) -> str:
    if recipe.imported:
        return f"none: imported from {recipe.released or recipe.pulled}"
    if recipe.target_macs is not None:
        return f"{recipe.target_macs:g} of the dense model's MACs"
    if recipe.target_latency is not None:
        return f"{recipe.target_latency:g} ms for a batch of {recipe.latency_batch} on {recipe.runtime}"
    if recipe.target_throughput is not None:
        return (
            f"{recipe.target_throughput:g} images a second on {recipe.runtime}, a batch in {recipe.latency_limit:g} ms"
        )
    if recipe.allowable_drop is not None:
        return f"an allowable drop of {recipe.allowable_drop:g} points of top-1"
    return f"the table in {recipe.architecture}"


def _weights(recipe: Recipe, provenance: Provenance | None) -> tuple[str, str]:
    """Which, and who says so."""
    key = provenance.weights_key if provenance else ""
    which = f", of these the tensors {key}" if key else ""
    if provenance and provenance.other_weights:
        which += f" (there are also {', '.join(provenance.other_weights)})"
    if recipe.random_weights:
        return f"random, seed {recipe.seed}", RECIPE_FILE
    if recipe.released is not None:
        dense = "not given" if recipe.weights is None else str(recipe.weights)
        return f"slim: {recipe.released}; dense: {dense}", RECIPE_FILE
    if recipe.pulled is not None:
        return f"slim: {recipe.pulled}; dense: not given", RECIPE_FILE
    if recipe.weights is not None:
        return f"{recipe.weights}{which}", RECIPE_FILE
    if recipe.model == EMBEDDED:
        return "those that come with lowpass", "the model's name"
    return f"those of the model as it was given{which}", "the model"


def _settings(recipe: Recipe) -> list[Asked]:
    shaping = recipe.shaping
    heads = "whole heads" if shaping.whole_heads else "heads may be thinned"
    stages = "as many blocks drop tokens as pays"
    if shaping.token_stages != "auto":
        stages = (
            f"at most {shaping.token_stages} blocks drop tokens" if shaping.token_stages else "any block drops tokens"
        )
    parts = "; attention and MLP of a block may go whole" if recipe.sub_blocks else ""
    shapes = f"widths in steps of {shaping.align}, {heads}, {stages}{parts}"
    values = {
        "channels by": recipe.channel_criterion,
        "tokens by": f"{recipe.token_criterion}, score {shaping.token_score}, cutoff {recipe.token_cutoff:g}",
        "order": f"{recipe.order}, prune {recipe.prune}",
        "shapes": shapes,
        "recovery": "on" if recipe.recovery else "off",
        "images that score": f"{recipe.score_images:,} at most, seed {recipe.seed}",
    }
    return [Asked(what, value, RECIPE_FILE) for what, value in values.items()]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def commands(
    directory: Path,
    recipe: Recipe,
    metrics: Metrics,
    architecture: Architecture,
    files: Sequence[ExportedFile],
    engines: Sequence[Engine],
) -> list[Command]:
    """How to load, export, serve and reproduce a run."""
    run = str(directory)
    shape = ", ".join(map(str, ("B", architecture.dense.in_chans, *architecture.dense.img_size)))
    load = (
        f"import lowpass\n\nrun = lowpass.Run({run!r})\nlogits = run.slim(images)  # [{shape}], normalised as above\n"
    )
    found = [Command("Load it in PyTorch", load + "names = run.classes  # in the order of the logits", "python")]
    current = [file for file in files if not file.dense and file.stale is None]
    if current:
        session = f"session = onnxruntime.InferenceSession({str(current[0].path)!r})"
        asking = '(logits,) = session.run(["logits"], {"images": images})  # NumPy'
        found.append(Command("Load it without lowpass", f"import onnxruntime\n\n{session}\n{asking}", "python"))
    else:
        found.append(Command("Export it: nothing current is exported", _line("export", run)))
    if not any(engine.stale is None and not engine.dense for engine in engines):
        lines = [_line("export", run, "--precision", "fp16"), _line("build", run)]
        found.append(Command("Build an engine for TensorRT: there is no current one", "\n".join(lines)))
    name = directory.absolute().name
    serve = [
        _line("deploy", run, "--repository", "models", "--name", name),
        _line("serve", "models"),
        _line("predict", "picture.jpg", "--model", name),
    ]
    found.append(Command("Serve it with Triton", "\n".join(serve)))
    found.append(Command("Measure it here", "\n".join([_line("evaluate", run), _line("benchmark", run)])))
    return [*found, Command("Make it again", _reproduce(directory, recipe, metrics, architecture))]


def _reproduce(directory: Path, recipe: Recipe, metrics: Metrics, architecture: Architecture) -> str:
    again = f"{directory}-again"
    lines = [_line("compress", "--recipe", str(directory / RECIPE_FILE), "--out", again)]
    if recipe.data == IN_MEMORY:
        lines = ["# its images were in memory: the program that called lowpass.compress makes it again"]
    elif recipe.released is not None:
        options = {"--dense": recipe.weights, "--data": recipe.data}
        given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
        pixels = {"--mean": recipe.mean, "--std": recipe.std}
        given += [part for name, v in pixels.items() if v is not None for part in (name, ",".join(map(repr, v)))]
        plain = {"--crop-pct": recipe.crop_pct, "--interpolation": recipe.interpolation}
        given += [part for name, value in plain.items() if value is not None for part in (name, str(value))]
        sizes = ["--qk-scale", repr(architecture.qk_scale), "--cutoff", repr(architecture.token_cutoff)]
        lines = [_line("import-vtc", str(recipe.released), "--out", again, *sizes, *given)]
    elif recipe.pulled is not None:
        images = ["--data", recipe.data] if recipe.data is not None else []
        lines = [_line("pull", recipe.pulled, "--out", again, *images)]
    elif recipe.weights is None and not recipe.random_weights and recipe.model != EMBEDDED:
        lines.append("# a model that was in memory is made again by the program that called lowpass.compress")
    if metrics.finetuned_epochs:
        lines.append(_line("finetune", again, "--epochs", str(metrics.finetuned_epochs)))
    return "\n".join(lines)


def _line(*words: str) -> str:
    return shlex.join(["lowpass", *words])
