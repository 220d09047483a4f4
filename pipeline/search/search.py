"""How far a search is to go decides how: to an allowable drop (the paper's cascade), or to a target.

Read on: `cascade.py`, or `loss_curves.py`, `plan.py` and `target.py`.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import sha256
from lowpass.pipeline.base.processes import Share, agreed, by_the_first
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.base.version import __version__
from lowpass.pipeline.data.datasets import Batches, Data, image_bytes, len_of
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.search.activation_store import DEFAULT_BUDGET_GIB, activation_store
from lowpass.pipeline.search.cascade import search_to_drop
from lowpass.pipeline.search.costs import Macs
from lowpass.pipeline.search.log import SEARCH_FILE, SearchLog, digest, open_log
from lowpass.pipeline.search.loss_curves import measure_loss_curves
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.state import SearchState
from lowpass.pipeline.search.target import CostTarget, check_measured_targets, search_to_target

PROFILE_SCORED = 1024  # images that score the cuts whose loss is measured: an amount needs fewer than a choice does
IMAGE_SHARE = 0.5  # of the memory budget that images may take; past it they are files, like activations
CostTargetsOf = Callable[[Architecture], Sequence[CostTarget]]


def search(
    model: SlimViT,
    scoring: Batches,
    measuring: Batches,
    settings: SearchSettings,
    directory: Path,
    log: SearchLog,
    cost_targets_of: CostTargetsOf | None = None,
    budget_gib: float = DEFAULT_BUDGET_GIB,
) -> None:
    """Prune `model` in place.

    Args:
        model: the dense model as a SlimViT, in evaluation mode.
        scoring: batches for LFS, recovery and the loss of a cut.
        measuring: batches for top-1.
        settings: how far to go, and the criteria's settings.
        directory: where activations past the memory budget lie.
        log: decisions of an interrupted run, and where new ones go.
        cost_targets_of: makes the latency targets for the dense model, any of which is enough; only settings with a
            `runtime` need it.
        budget_gib: memory for activations.

    Raises:
        InputError: the target is out of reach, or a block of the model lacks its attention or its MLP.
    """
    refuse_missing_parts(model)
    if settings.allowable_drop is not None:
        state = SearchState(model, scoring, measuring, settings, directory, budget_gib)
        search_to_drop(state, settings.allowable_drop, log)
        return
    dense = model.architecture
    targets = list[CostTarget]()

    def find_targets() -> None:
        if settings.target_macs is not None:
            targets.append(CostTarget(settings.target_macs * dense.macs(), Macs(dense), "MACs"))
        elif cost_targets_of is not None:
            targets.extend(cost_targets_of(dense))
        else:
            raise ValueError("a latency target needs a way to measure")
        if log.fresh:
            check_measured_targets(targets, dense, settings)

    by_the_first(find_targets)  # which plans by them, too
    few = scoring[: Share(tuple(len(labels) for _, labels in scoring)).among_first(PROFILE_SCORED)]
    profiled = SearchState(copy.deepcopy(model), few, [], settings, directory, budget_gib)
    curves, metrics = measure_loss_curves(profiled, log), profiled.metrics
    del profiled  # its activations
    state = SearchState(model, scoring, measuring, settings, directory, budget_gib, metrics)
    search_to_target(curves, state, targets, log)


def refuse_missing_parts(model: SlimViT) -> None:
    """Refuse a model that was cut before: costs, criteria and recovery of a search are those of whole blocks.

    Raises:
        InputError: naming the first block that lacks a part.
    """
    for index, block in enumerate(model.blocks):
        if not (block.has_attention and block.has_mlp):
            part = "MLP" if block.has_attention else "attention"
            raise InputError(f"block {index} has no {part}; only a model whose blocks are whole can be searched")


def logged_search(
    slim: SlimViT,
    data: Data,
    settings: SearchSettings,
    directory: Path,
    cost_targets_of: CostTargetsOf | None,
    budget_gib: float,
) -> None:
    """`search` in place, with every decision kept in `search.jsonl` before it is acted on, and taken up from there.

    Args:
        slim: the dense model as a SlimViT.
        data: where the images that score and measure are drawn from.
        settings: see `search`.
        directory: a run that holds its dense weights.
        cost_targets_of: see `search`.
        budget_gib: see `search`.

    Raises:
        InputError: the log is damaged or of other inputs, or the target is out of reach.
    """
    size, seed = settings.batch_size, settings.seed
    # The images take part in the budget, before the activations do.
    images = sum(min(count, len_of(data.calibration)) for count in (settings.score_images, settings.measured))
    needed = images * image_bytes(slim.architecture)
    in_memory = needed <= budget_gib * 2**30 * IMAGE_SHARE
    keep = None if in_memory else activation_store(needed, 0, directory)
    budget_gib = max(0.0, budget_gib - needed / 2**30) if in_memory else budget_gib

    def read(images: int, seed: int, what: str) -> Batches:
        # Each process reads all of them: which it needs hangs on what the others find.
        return agreed(lambda: data.calibration_batches(images, size, seed, what, keep))

    scoring = read(settings.score_images, seed, "reading images to score")
    measuring = read(settings.measured, seed + 1, "reading images to measure")
    header = {
        "lowpass": __version__,
        "dense_sha256": sha256(directory / DENSE_WEIGHTS_FILE),
        "scored_images": sum(len(labels) for _, labels in scoring),
        "scored_sha256": digest(scoring),
        "measured_images": sum(len(labels) for _, labels in measuring),
        "measured_sha256": digest(measuring),
    }
    log = open_log(directory / SEARCH_FILE, header, slim)
    if not log.fresh:
        logger.info("resuming after the decisions in %s", directory / SEARCH_FILE)
    search(slim, scoring, measuring, settings, directory, log, cost_targets_of, budget_gib)
