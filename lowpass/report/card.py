"""What a run says of itself on a model card: figures, each with how it was come by, and what the model was made from.

Paths of this machine stay here: a folder or a file is called by its name alone.
"""

import re
from pathlib import Path

from huggingface_hub import ModelCard
from timm.models import get_pretrained_cfg, is_model_pretrained

from lowpass.benchmarks.latency.compare import Benchmark
from lowpass.benchmarks.latency.machine import in_a_line
from lowpass.pipeline.checkpoints.digits_deit import DIGITS_MODEL
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.card import CARD_FILE, CardFacts, Figure
from lowpass.pipeline.model.classes import has_classes, load_classes
from lowpass.pipeline.model.hub import HUB_PREFIX
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.metrics import Metrics, count_parameters
from lowpass.pipeline.run.recipe import Recipe
from lowpass.report.current import current_benchmark, stale_metrics

EMBEDDED_LICENCE = "apache-2.0"  # of the digits' model, which comes with lowpass
FOLDERS = r"(?<![^\s(])[.~]*/(?:[^/;]+/)*"  # of a path from the root, from home or from above, all but the last name
DATA_SETS = ("hfds/", "hfids/")  # what follows is a public name, not a folder


def publishable(directory: Path, name: str = "", licence: str | None = None) -> SlimViT:
    """The slim model of a finished run, with the names of its classes and what its card says.

    Args:
        directory: the run.
        name: what `SlimViT.from_pretrained` will find the model by, where that is known.
        licence: of the source model; None: what its source says.

    Raises:
        InputError: there is no finished run.
    """
    recipe, metrics, slim = Recipe.load(directory), Metrics.load(directory), _without_paths(SlimViT.load(directory))
    architecture = slim.architecture
    if has_classes(directory):
        slim.classes = load_classes(directory, architecture.dense.num_classes)
    stale = stale_metrics(metrics, architecture, count_parameters(slim))
    known, known_from = _licence(recipe)
    slim.card_facts = CardFacts(
        name=name,
        source=_source(recipe),
        base_model=recipe.model.removeprefix(HUB_PREFIX) if recipe.model.startswith(HUB_PREFIX) else None,
        licence=licence or known,
        licence_from="whoever published this" if licence else known_from,
        figures=(
            *(_counted(metrics) if stale is None else ()),
            *_latencies(current_benchmark(directory, architecture)),
        ),
        making=_making(recipe, metrics, architecture),
    )
    return slim


def _without_paths(slim: SlimViT) -> SlimViT:
    """The same model, whose preprocessing does not say in which folder it was found."""
    prep = slim.architecture.preprocessing
    changed = prep.model_copy(update={"source": re.sub(FOLDERS, "", prep.source)})
    if changed == prep:
        return slim
    again = SlimViT(slim.architecture.model_copy(update={"preprocessing": changed}))
    again.vit.load_state_dict(slim.vit.state_dict())
    return again.eval()


def _source(recipe: Recipe) -> str:
    if recipe.imported:
        return f"{recipe.model}, from {_public(str(recipe.released or recipe.pulled))}"
    if recipe.random_weights:
        return f"{recipe.model} with random weights: it has learned nothing"
    return _public(recipe.model) + (f", weights {recipe.weights.name}" if recipe.weights is not None else "")


def _public(named: str) -> str:
    """A model or images as they were named, a folder by its own name alone."""
    if named.startswith((HUB_PREFIX, *DATA_SETS)) and ":/" not in named and "//" not in named:
        return named
    return Path(named).name


def _licence(recipe: Recipe) -> tuple[str | None, str]:
    """The licence of the source's own weights, and who says so. Of a file of weights nothing is known."""
    if recipe.weights is not None or recipe.random_weights or recipe.imported:
        return None, ""
    if recipe.model == DIGITS_MODEL:
        return EMBEDDED_LICENCE, "lowpass, which it comes with"
    timms = recipe.model.removeprefix(f"{HUB_PREFIX}timm/")
    if timms != recipe.model and is_model_pretrained(timms):
        return get_pretrained_cfg(timms).license, "timm"
    card = Path(recipe.model.removeprefix("local-dir:")) / CARD_FILE
    if card.is_file():
        return ModelCard.load(card, ignore_metadata_errors=True).data.license, f"the source's {CARD_FILE}"
    return None, ""


def _counted(metrics: Metrics) -> list[Figure]:
    """What `metrics.json` says beside MACs, which the architecture says."""
    dense, slim = metrics.dense, metrics.slim
    rows = [
        Figure("parameters", f"{dense.parameters:,}", f"{slim.parameters:,}", "counted"),
        Figure("bytes of weights", f"{dense.bytes:,}", f"{slim.bytes:,}", "the files, in FP32"),
    ]
    if slim.top1 is None:
        return rows
    count = "the" if metrics.test_images is None else f"{metrics.test_images:,}"
    how = f"measured on {count} test images of {_public(metrics.data or 'images that are not named')}, PyTorch in FP32"
    before = "not known" if dense.top1 is None else f"{dense.top1:.2f}%"
    return [Figure("top-1", before, f"{slim.top1:.2f}%", how), *rows]


def _latencies(measured: Benchmark | str) -> list[Figure]:
    """The median milliseconds of a batch, by runtime."""
    if isinstance(measured, str):
        return []
    where = in_a_line(measured.machine)
    return [
        Figure(
            f"{runtime} {result.precision}, batch {batch}: ms",
            f"{at.dense.p50_ms:.3g}",
            f"{at.slim.p50_ms:.3g}",
            f"median of {at.slim.runs} runs in rounds that interleave both, {where}",
        )
        for runtime, result in measured.runtimes.items()
        for batch, at in result.batches.items()
    ]


def _making(recipe: Recipe, metrics: Metrics, architecture: Architecture) -> tuple[str, ...]:
    """How the model was searched and trained."""
    if recipe.imported:
        lines = ["Imported; its search is not known."]
    else:
        lines = [
            f"Channels by {recipe.channel_criterion}, tokens by {architecture.token_criterion}, blocks {recipe.order}; "
            f"seed {recipe.seed}.",
            f"Least-squares recovery: {'on' if recipe.recovery else 'off'}.",
        ]
    images = _public(recipe.data) if recipe.data else "none"
    epochs = metrics.finetuned_epochs
    lines.append(f"Fine-tuned for {epochs} epochs, distilled from the dense model." if epochs else "Not fine-tuned.")
    return (*lines, f"Images: {images}.")
