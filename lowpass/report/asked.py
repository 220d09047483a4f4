"""What a run was asked for, where each thing comes from, and the commands that make it again and put it to use."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowpass.export.batch import DEFAULT_PROFILE, BatchProfile
from lowpass.export.forecast.target import is_forecast, parse_target
from lowpass.export.runtimes.engine import FLAVOURS
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.classes import CLASSES_FILE
from lowpass.pipeline.run.dense_check import Provenance
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.run.recipe import IN_MEMORY, RECIPE_FILE, Recipe
from lowpass.report.current import Engine, ExportedFile

EMBEDDED = "digits_deit"  # the model that brings its own weights
PREPROCESSING = "preprocessing"
CHANNELS = {
    "obs": "how well a refit of the next layer makes up for them",
    "lfs": "how much low-passed images need them",
    "taylor": "gradient times weight",
    "magnitude": "the size of their weights",
    "random": "chance",
}
TOKENS = {
    "lfe-attention": "low-frequency energy times attention",
    "lfe": "low-frequency energy",
    "attention": "attention",
    "random": "chance",
}
ATTENTION = {"full": "all of it, as the paper does", "cls": "the class token's alone"}
PRUNED = {"both": "channels and tokens", "channels": "channels alone", "tokens": "tokens alone"}
ORDERS = {
    "bottom-up": "blocks from the bottom up",
    "top-down": "blocks from the top down",
    "one-shot": "all blocks at once",
}


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
        Asked("target", _goal(recipe), RECIPE_FILE),
        Asked("model", recipe.model, RECIPE_FILE),
        Asked("weights", *_weights(recipe, provenance)),
        Asked("images", recipe.data or "none", RECIPE_FILE),
        Asked("classes", f"{dense.num_classes}", provenance.classes if provenance else CLASSES_FILE),
        Asked(PREPROCESSING, pixels, prep.source or "timm's defaults"),
    ]
    if provenance is not None and provenance.checked_top1 is not None:
        checked = f"{provenance.checked_top1:.2f} % on {provenance.checked_images:,} test images"
        rows.append(Asked("dense model, before anything else", checked, "measured as the run began"))
        rows += [
            Asked("the same, read otherwise", f"{top1:.2f} % with {options}", "measured as the run began")
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
    values = dict[str, str]()
    if recipe.architecture is None:
        values["what is cut"] = f"{PRUNED[recipe.prune]}, {ORDERS[recipe.order]}"
    if recipe.prune != "tokens":
        values["channels by"] = f"{recipe.channel_criterion}: {CHANNELS[recipe.channel_criterion]}"
    if recipe.prune != "channels":
        values["tokens by"] = f"{recipe.token_criterion}: {_token_score(recipe)}"
    if recipe.architecture is None:
        values["shapes"] = _shapes(recipe)
    if recipe.data is None:
        values |= {"recovery": "off: there are no images", "images that score": f"made up: noise, seed {recipe.seed}"}
    else:
        values["recovery"] = "on" if recipe.recovery else "off"
        values["images that score"] = f"{recipe.score_images:,} at most, seed {recipe.seed}"
    return [Asked(what, value, RECIPE_FILE) for what, value in values.items()]


def _token_score(recipe: Recipe) -> str:
    """In words."""
    words = TOKENS[recipe.token_criterion]
    if "attention" in recipe.token_criterion:
        words += f" ({ATTENTION[recipe.shaping.token_score]})"
    return words + (f", cutoff {recipe.token_cutoff:g}" if "lfe" in recipe.token_criterion else "")


def _shapes(recipe: Recipe) -> str:
    """Those that the search may choose from."""
    shaping = recipe.shaping
    heads = "whole heads" if shaping.whole_heads else "heads may be thinned"
    stages = "as many blocks drop tokens as pays"
    if shaping.token_stages != "auto":
        stages = (
            f"at most {shaping.token_stages} blocks drop tokens" if shaping.token_stages else "any block drops tokens"
        )
    parts = "; attention and MLP of a block may go whole" if recipe.sub_blocks else ""
    return f"widths in steps of {shaping.align}, {heads}, {stages}{parts}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def commands(
    directory: Path,
    recipe: Recipe,
    metrics: Metrics,
    architecture: Architecture,
    files: Sequence[ExportedFile],
    engines: Sequence[Engine],
    batch: int | None,
) -> list[Command]:
    """How to load, export, serve and reproduce a run. `batch`: what a target of time was planned for."""
    run = str(directory)
    shape = ", ".join(map(str, ("B", architecture.dense.in_chans, *architecture.dense.img_size)))
    load = f"import lowpass\n\nrun = lowpass.Run({run!r})\nlogits = run.slim(images)  # [{shape}], "
    load += f"see {PREPROCESSING} above\n"
    found = [Command("Load it in PyTorch", load + "names = run.classes  # in the order of the logits", "python")]
    current = [file for file in files if not file.dense and file.stale is None]
    for_cpus = [file for file in current if file.format == "onnx" and file.precision != "bf16"]  # of ONNX Runtime
    programs = [file for file in current if file.format == "torch-export"]
    if for_cpus:
        session = f"session = onnxruntime.InferenceSession({str(for_cpus[0].path)!r})"
        taken = "[B, H, W, C] uint8 pixels" if for_cpus[0].pixels else "NumPy, prepared alike"
        asking = f'(logits,) = session.run(["logits"], {{"images": images}})  # {taken}'
        found.append(Command("Load it without lowpass", f"import onnxruntime\n\n{session}\n{asking}", "python"))
    if programs:
        program = f"program = torch.export.load({str(programs[0].path)!r}).module()"
        found.append(
            Command("Load it in PyTorch alone", f"import torch\n\n{program}\nlogits = program(images)", "python")
        )
    if not current:
        found.append(Command("Export it: nothing current is exported", _line("export", run)))
    if not any(engine.stale is None and not engine.dense for engine in engines):
        found.append(Command("Build an engine for TensorRT: there is no current one", _build(run, recipe, batch)))
    name = directory.absolute().name
    serve = [
        _line("deploy", run, "--repository", "models", "--name", name),
        _line("serve", "models"),
        _line("predict", "picture.jpg", "--model", name),
    ]
    found.append(Command("Serve it with Triton", "\n".join(serve)))
    # What a run's images were is not known where there were none, or where a program had them in memory.
    images = ["--data", "FOLDER"] if recipe.data in (None, IN_MEMORY) else []
    found.append(Command("Measure it here", "\n".join([_line("evaluate", run, *images), _line("benchmark", run)])))
    return [*found, Command("Make it again", _reproduce(directory, recipe, metrics, architecture))]


def _build(run: str, recipe: Recipe, batch: int | None) -> str:
    """An engine as it was planned, where it was for TensorRT; otherwise a usual one."""
    precision, profile = "fp16", list[str]()
    if recipe.runtime is not None and is_forecast(recipe.runtime):
        precision = parse_target(recipe.runtime, recipe.latency_precision, 1).precision
    elif recipe.runtime in FLAVOURS:
        precision = recipe.latency_precision or precision
    else:
        batch = None
    usual = BatchProfile.parse(DEFAULT_PROFILE)
    if batch is not None and batch not in (usual.least, usual.best, usual.most):
        profile = ["--batch", f"1:{batch}:{batch}"]
    return "\n".join(
        [_line("export", run, "--precision", precision, *profile), _line("build", run, "--precision", precision)]
    )


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
    elif recipe.weights is None and not recipe.random_weights and not _brings_weights(recipe.model):
        lines = ["# its model was in memory: the program that called lowpass.compress makes it again"]
    if metrics.finetuned_epochs:
        lines.append("# in all; which other options fine-tuning was given was not written down")
        lines.append(_line("finetune", again, "--epochs", str(metrics.finetuned_epochs)))
    return "\n".join(lines)


def _brings_weights(model: str) -> bool:
    """Whether a model is one of a folder or a hub, or lowpass's own: others are names, which the weights go beside."""
    return model == EMBEDDED or ":" in model or "/" in model or Path(model).is_dir()


def _line(*words: str) -> str:
    return shlex.join(["lowpass", *words])
