"""What a recipe would cost, before anything is run: images looked at, and MACs."""

import math

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from lowpass.pipeline.data.datasets import image_bytes
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.run.measure import Hours
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.search.channel_criteria import SEE_LOW_PASSED
from lowpass.pipeline.search.error_metric import METRIC_IMAGES
from lowpass.pipeline.search.loss_curves import POINTS, POINTS_BY_ERROR, PROFILED_IMAGES, THRESHOLDS
from lowpass.pipeline.search.obs_scores import OBSERVED_TOKENS
from lowpass.pipeline.search.recovery_targets import REFIT_ROWS
from lowpass.pipeline.search.search import PROFILE_SCORED
from lowpass.pipeline.train.settings import FinetuneSettings

# Of a block, tokens and channels each, in a search to an allowable drop; in passes over all measuring images. There are
# more, but those that fail stop early. As counted on the digits.
TRIALS = 2
REFIT_BLOCKS = 4  # forwards of one image through a block that its refits take: their rows, and the products of those
OBS_BLOCKS = 3  # likewise, to score it
BACKWARD = 2  # of training, in forwards


class Estimate(BaseModel):
    """What is going to be done, and what it takes.

    `weights`: None where a run would still need `--weights`. `dense_macs` and `slim_macs` are of one image (None: the
    search finds out, and what hangs on it is counted as if slim were dense), other MACs of a whole step.
    `search_image_forwards`, in forwards of one image through the dense model, is an estimate within a factor of two.
    `search_bytes` are of the images and activations that a search holds; past the memory budget they are files.
    `least_bytes` is what the process takes at its peak, at the least: what a search computes with comes on top.
    `hours` are what it would take at rates that were measured, where that was asked for.
    `checked_top1` is the dense model's, in percent, on `checked_images` of the test split; None: without weights or
    images there is nothing to check.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    goal: str
    weights: str | None
    data: str | None
    train_images: int
    test_images: int
    scored_images: int
    measured_images: int
    dense_macs: int
    slim_macs: int | None
    search_image_forwards: int
    search_macs: int
    search_bytes: int
    least_bytes: int | None = None
    checked_images: int = 0
    checked_top1: float | None = None
    test_macs: int
    finetune_epochs: int
    finetune_images: int
    finetune_macs: int
    total_macs: int
    hours: Hours | None = None


def estimate(
    recipe: Recipe,
    dense: Architecture,
    table: tuple[BlockShape, ...] | None,
    train_images: int,
    test_images: int,
    settings: FinetuneSettings,
    weights: str | None,
) -> Estimate:
    """The estimate of a sound recipe.

    Args:
        recipe: what to do.
        dense: the architecture of its dense model.
        table: what the recipe cuts to without a search, or None.
        train_images: images there are to score, measure and train on; 0: no data.
        test_images: images that both models are tested on.
        settings: of fine-tuning.
        weights: where the dense model's come from, or None.
    """
    macs = dense.macs()
    if table is not None:
        slim_macs, goal = dense.model_copy(update={"blocks": table}).macs(), f"the table {recipe.architecture}"
    elif recipe.target_macs is not None:
        slim_macs, goal = round(recipe.target_macs * macs), f"{recipe.target_macs:g} of the dense MACs"
    elif recipe.target_latency is not None:
        slim_macs, goal = None, f"{recipe.target_latency:g} ms of {recipe.latency_batch} images on {recipe.runtime}"
    elif recipe.target_throughput is not None:
        slim_macs, goal = (
            None,
            (
                f"{recipe.target_throughput:g} images a second on {recipe.runtime}, a batch in at most "
                f"{recipe.latency_limit:g} ms"
            ),
        )
    else:
        slim_macs, goal = None, f"an allowable drop of {recipe.allowable_drop:g} points of top-1"
    scored = min(recipe.score_images, train_images)
    measured = 0 if table is not None else min(recipe.measured, train_images)
    forwards = _search(recipe, dense, scored, measured)
    after = macs if slim_macs is None else slim_macs
    test = test_images * (macs + after)
    seen = train_images // settings.batch_size * settings.batch_size * settings.epochs
    tuning = seen * ((1 + BACKWARD) * after + (macs if settings.distils else 0))
    return Estimate(
        model=recipe.model,
        goal=goal,
        weights=weights,
        data=recipe.data,
        train_images=train_images,
        test_images=test_images,
        scored_images=scored,
        measured_images=measured,
        dense_macs=macs,
        slim_macs=slim_macs,
        search_image_forwards=forwards,
        search_macs=forwards * macs,
        search_bytes=_held(recipe, dense, scored, measured) if train_images else 0,
        test_macs=test,
        finetune_epochs=settings.epochs,
        finetune_images=seen,
        finetune_macs=tuning,
        total_macs=forwards * macs + test + tuning,
    )


def as_table(done: Estimate) -> Table:
    """The estimate for people: what, on which images, and its MACs."""
    table = Table(
        "",
        "images",
        "MACs",
        min_width=90,
        title=f"{done.model} to {done.goal}",
        caption="nothing was searched or written",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("dense", "1", f"{done.dense_macs / 1e9:.3g} G")
    table.add_row("slim", "1", "found by the search" if done.slim_macs is None else f"{done.slim_macs / 1e9:.3g} G")
    table.add_row(
        f"search ({done.scored_images:,} images score, {done.measured_images:,} measure)",
        f"~{done.search_image_forwards:,}",
        _macs(done.search_macs),
    )
    table.add_row("", "holds", f"{done.search_bytes / 2**30:.2f} GiB")
    if done.least_bytes is not None:
        table.add_row("memory at the peak", "at least", f"{done.least_bytes / 2**30:.2f} GiB")
    table.add_row("test, of dense and slim", f"{done.test_images:,}", _macs(done.test_macs))
    epochs = f"fine-tuning ({done.finetune_epochs} epochs of {done.train_images:,} images)"
    table.add_row(epochs, f"{done.finetune_images:,}", _macs(done.finetune_macs))
    table.add_row("in all", "", _macs(done.total_macs))
    if done.hours is not None:
        _add_hours(table, done.hours)
    table.add_row(f"weights: {done.weights or 'none yet, give --weights'}", "", "")
    if done.checked_top1 is not None:
        table.add_row(f"dense top-1: {done.checked_top1:.1f} %", f"{done.checked_images:,}", "")
    return table


def _add_hours(table: Table, hours: Hours) -> None:
    rates = hours.rates
    read = "" if rates.read is None else f", {rates.read:,.1f} read"
    table.add_row(
        f"images a second on {rates.device}: {rates.forward:,.1f} forward, {rates.trained:,.1f} trained{read}", "", ""
    )
    for what in ("search", "test", "finetune", "total"):
        table.add_row(f"hours of {what}" if what != "total" else "hours in all", "", f"{getattr(hours, what):,.2f}")


def _held(recipe: Recipe, dense: Architecture, scored: int, measured: int) -> int:
    """Bytes of the images, and of what enters the block at hand: of the images that measure, of those that score
    (LFS: and of their low-pass), and for recovery three times what it looks at."""
    tokens = dense.dense.num_tokens + dense.dense.num_prefix_tokens
    refitted = math.ceil(REFIT_ROWS / tokens) if recipe.recovery else 0
    streams = 2 if recipe.channel_criterion in SEE_LOW_PASSED else 1
    kept = measured + streams * scored + 3 * min(refitted, scored)
    return (scored + measured) * image_bytes(dense) + kept * tokens * dense.dense.embed_dim * 4


def _macs(macs: int) -> str:
    return f"{macs / 1e15:,.2f} P" if macs >= 1e15 else f"{macs / 1e12:,.2f} T"


def _search(recipe: Recipe, dense: Architecture, scored: int, measured: int) -> int:
    """Image-forwards of the search, with every block as large as the dense model's: rather too many than too few."""
    depth = dense.dense.depth
    above = (depth + 1) / 2  # forwards of everything from a block to the top, summed over the blocks
    if recipe.architecture is not None:
        return round(_cutting(recipe, dense, scored))
    shaping = recipe.shaping
    stages = len(shaping.stages(depth)) / depth if recipe.prune != "channels" else 0.0
    channels = recipe.prune != "tokens"
    whole_parts = 2 * recipe.sub_blocks * channels
    ready = measured  # in order of certainty
    if recipe.allowable_drop is not None:
        trials = (TRIALS * (stages + channels) + whole_parts) * (measured * above + _refits(recipe, dense, scored))
        return round(ready + _cutting(recipe, dense, scored) + measured + trials)
    few = min(scored, PROFILE_SCORED)
    points = POINTS_BY_ERROR if recipe.channel_criterion == "obs" else POINTS
    heads = min(points, dense.dense.num_heads) - 1 if shaping.whole_heads else THRESHOLDS
    cuts = (
        channels * (heads + points - 1) + whole_parts + stages * (POINTS - 1) / 2
    )  # with fewer tokens the rest costs less
    refits = (whole_parts + (0 if shaping.whole_heads else THRESHOLDS)) * _refits(recipe, dense, few)
    profiling = _cutting(recipe, dense, few) + refits + min(few, PROFILED_IMAGES) * (1 + above * cuts)
    return round(ready + profiling + _cutting(recipe, dense, scored) + measured * (1 + above * (stages + 1)))


def _cutting(recipe: Recipe, dense: Architecture, scored: int) -> float:
    """Scoring, refitting and passing every block once."""
    above = (dense.dense.depth + 1) / 2
    tokens = dense.dense.num_tokens + dense.dense.num_prefix_tokens
    # LFS: low-passed images through all that lies above and back, and the block itself once more for either kind.
    # OBS: its metric, a pass and back, then the block and its products.
    lfs = scored * (2 * above + 3)
    obs = min(scored, METRIC_IMAGES) * (1 + BACKWARD) + min(scored, OBSERVED_TOKENS // tokens) * OBS_BLOCKS
    scoring = 0 if recipe.prune == "tokens" else obs if recipe.channel_criterion == "obs" else lfs
    streams = 2 if recipe.channel_criterion in SEE_LOW_PASSED else 1
    refitted = min(scored, math.ceil(REFIT_ROWS / tokens)) if recipe.recovery else 0
    return scoring + streams * scored + 2 * refitted + _refits(recipe, dense, scored)


def _refits(recipe: Recipe, dense: Architecture, scored: int) -> float:
    """Refitting every block once."""
    tokens = dense.dense.num_tokens + dense.dense.num_prefix_tokens
    return REFIT_BLOCKS * min(scored, math.ceil(REFIT_ROWS / tokens)) if recipe.recovery else 0
