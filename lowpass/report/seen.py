"""What the models of a run say of its test images: measured for the report, on as many images as a minute allows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset

from lowpass.export.onnx.verify import verifier
from lowpass.export.runtimes.session import Session, logits_of
from lowpass.export.torch_program import TorchProgram
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.data.datasets import Batches, Data, len_of
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.dense import has_dense
from lowpass.pipeline.run.evaluate import best_device
from lowpass.pipeline.run.images import DataSource, run_data
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.run.recipe import IN_MEMORY, Recipe
from lowpass.report.current import ExportedFile

IN_MEMORY_NAME = "data in memory"  # what metrics call images that a program gave
# Multiply-accumulates that the two models may take, and all exported files: some ten seconds each, on a busy core.
THREAD_MACS, FILES_THREAD_MACS, GPU_MACS = 2.5e11, 1.2e11, 1e14
IMAGES, FILES_IMAGES = 10_000, 250  # at most: reading takes its time, and small models run far below a core's peak
CONFUSIONS = 12  # pairs of classes that are told
BATCH = 32  # images at once, for exported files


@dataclass(frozen=True)
class Seen:
    """Some of a run's test images, and the classes that its models see in them.

    `chosen` are the images' numbers among the `total` of the split, `labels` [n] their classes, `slim` and `dense`
    [n] what the models say (`dense` None: the run holds none).
    """

    data: Data
    total: int
    chosen: tuple[int, ...]
    labels: Tensor
    slim: Tensor
    dense: Tensor | None


@dataclass(frozen=True)
class ClassTop1:
    """One class: how many images of it there were, and top-1 on them in percent (`dense` None: not measured)."""

    name: str
    images: int
    slim: float
    dense: float | None


@dataclass(frozen=True)
class Confusion:
    """How many of the `images` of one class were taken for another."""

    label: str
    taken_for: str
    images: int
    slim: int
    dense: int | None


@dataclass(frozen=True)
class FileTop1:
    """Top-1 in percent of an exported file, in the runtime it is verified in, and of the same model in PyTorch on the
    same images. `failed` says why there is none."""

    top1: float | None
    pytorch: float | None
    images: int
    failed: str | None = None


def look(directory: Path, source: DataSource, metrics: Metrics, wanted: int | None = None) -> Seen | str:
    """Show a run's models its test images.

    Args:
        directory: the run.
        source: the images; None: those its figures were measured on, else the recipe's.
        metrics: of the run.
        wanted: how many images, at most; None: as many as a minute allows.

    Returns:
        What they say; or, where the run's own images are not to be had, why.

    Raises:
        InputError: `source` cannot be used.
    """
    recipe = Recipe.load(directory)
    spec = source or (metrics.data if metrics.data not in (None, IN_MEMORY_NAME) else recipe.data)
    if spec is None or spec == IN_MEMORY:
        return "the run was made " + ("without images" if spec is None else "with images in memory")
    try:
        return _look(directory, recipe, run_data(directory, spec), wanted)
    except (InputError, OSError) as error:  # such as a folder on a disk that is not there now
        if source is not None:
            raise
        return str(error)


def _look(directory: Path, recipe: Recipe, data: Data, wanted: int | None) -> Seen:
    device, total = best_device(), len_of(data.test)
    models = {"slim": SlimViT.load(directory, WEIGHTS_FILE)}
    if has_dense(directory):
        models["dense"] = SlimViT.load(directory, DENSE_WEIGHTS_FILE)
    cost = sum(model.architecture.macs() for model in models.values())
    allowed = GPU_MACS if device.type == "cuda" else THREAD_MACS * torch.get_num_threads()
    count = wanted or max(1, min(IMAGES, int(allowed / cost)))
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(recipe.seed))[:count]
    chosen = tuple(sorted(drawn.tolist()))
    labels, predicted = list[Tensor](), dict[str, list[Tensor]]({name: [] for name in models})
    with torch.inference_mode():
        for images, own in track(data.loader(Subset(data.test, chosen), recipe.batch_size), "looking at test images"):
            labels.append(own.clone())
            for name, model in models.items():
                predicted[name].append(model.to(device)(images.to(device)).argmax(-1).cpu())
    said = {name: torch.cat(parts) for name, parts in predicted.items()}
    return Seen(data, total, chosen, torch.cat(labels), said["slim"], said.get("dense"))


def top1_of(predicted: Tensor, labels: Tensor) -> float:
    """Percent of predictions [n] that are the label [n]."""
    return 100 * float((predicted == labels).double().mean())


def only_one_right(seen: Seen) -> tuple[int, int] | None:
    """How many images only the dense model gets right, and only the slim one; None: there is no dense model."""
    if seen.dense is None:
        return None
    slim, dense = seen.slim == seen.labels, seen.dense == seen.labels
    return int((dense & ~slim).sum()), int((slim & ~dense).sum())


def by_class(seen: Seen, classes: Sequence[str]) -> list[ClassTop1]:
    """Top-1 of every class that has images, in the order of the logits."""
    found = []
    for label in sorted(set(seen.labels.tolist())):
        own = seen.labels == label
        slim, dense = (
            None if said is None else top1_of(said[own], seen.labels[own]) for said in (seen.slim, seen.dense)
        )
        assert slim is not None
        found.append(ClassTop1(classes[label], int(own.sum()), slim, dense))
    return found


def confusions(seen: Seen, classes: Sequence[str]) -> list[Confusion]:
    """The pairs that the slim or the dense model confuses most, the most confused first."""
    counts = [_mistakes(said, seen.labels) for said in (seen.slim, seen.dense) if said is not None]
    pairs = {pair for counted in counts for pair in counted}
    most = sorted(pairs, key=lambda pair: (-max(counted[pair] for counted in counts), pair))[:CONFUSIONS]
    images = Counter(seen.labels.tolist())
    return [
        Confusion(
            classes[label],
            classes[other],
            images[label],
            counts[0][label, other],
            counts[1][label, other] if len(counts) > 1 else None,
        )
        for label, other in most
    ]


def _mistakes(predicted: Tensor, labels: Tensor) -> Counter[tuple[int, int]]:
    pairs = zip(labels.tolist(), predicted.tolist(), strict=True)
    return Counter((label, said) for label, said in pairs if label != said)


def files_top1(seen: Seen, files: Sequence[ExportedFile], macs: Mapping[bool, int]) -> dict[str, FileTop1]:
    """Top-1 of the exported files that are current, by name, on the images of `seen`, or every so many of them.

    Args:
        seen: what PyTorch says.
        files: of the run.
        macs: of an image, by whether the model is dense.
    """
    usable = [file for file in files if file.verification is not None]
    if not usable:
        return {}
    cost = sum(macs[file.dense] for file in usable)
    step = -(-len(seen.chosen) // max(1, min(FILES_IMAGES, int(FILES_THREAD_MACS * torch.get_num_threads() / cost))))
    labels = seen.labels[::step]
    batches: Batches = list(seen.data.loader(Subset(seen.data.test, seen.chosen[::step]), BATCH))
    found = {}
    for file in usable:
        said = seen.dense if file.dense else seen.slim
        found[file.name] = _file_top1(file, batches, labels, None if said is None else top1_of(said[::step], labels))
    return found


def _file_top1(file: ExportedFile, batches: Batches, labels: Tensor, pytorch: float | None) -> FileTop1:
    try:
        content = file.path.read_bytes()
        session: Session = (
            TorchProgram(content) if file.format == "torch-export" else verifier(content, file.precision)[1]
        )
        logits = [logits_of(session, images.numpy()) for images, _ in track(batches, f"testing {file.name}")]
    except (InputError, RunError) as error:
        return FileTop1(None, pytorch, len(labels), str(error))
    predicted = torch.cat([torch.from_numpy(part).argmax(-1) for part in logits])
    return FileTop1(top1_of(predicted, labels), pytorch, len(labels))
