"""A search that is written down as it goes: `search.jsonl`, a header of what went in, then one line a decision."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import sha256, write_text
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.base.version import __version__
from lowpass.pipeline.data.datasets import Batches, Data
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim import DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.search.cascade import Log
from lowpass.pipeline.search.decisions import ChannelDecision, Curve, Decision, Plan
from lowpass.pipeline.search.search import GoalOf, search

SEARCH_FILE = "search.jsonl"


def logged_search(
    slim: SlimViT, data: Data, recipe: Recipe, directory: Path, goal_of: GoalOf | None, budget_gib: float
) -> None:
    """`search` in place, with every decision kept in `search.jsonl` before it is acted on, and taken up from there.

    Args:
        slim: the dense model as a SlimViT.
        data: where the images that score and measure are drawn from.
        recipe: see `search`.
        directory: a run that holds its dense weights.
        goal_of: see `search`.
        budget_gib: see `search`.

    Raises:
        InputError: the log is damaged or of other inputs, or the target is out of reach.
    """
    scoring = data.calibration_batches(recipe.score_images, recipe.batch_size, recipe.seed, "reading images to score")
    measuring = data.calibration_batches(
        recipe.measure_images, recipe.batch_size, recipe.seed + 1, "reading images to measure"
    )
    header = {
        "lowpass": __version__,
        "dense_sha256": sha256(directory / DENSE_WEIGHTS_FILE),
        "scored_images": sum(len(labels) for _, labels in scoring),
        "scored_sha256": _digest(scoring),
        "measured_images": sum(len(labels) for _, labels in measuring),
        "measured_sha256": _digest(measuring),
    }
    decided = _read_decisions(directory / SEARCH_FILE, header)
    lines = [json.dumps(header), *(decision.model_dump_json() for decision in decided)]
    dense_macs = slim.architecture.macs()
    if decided:
        console.print(f"resuming after {len(decided)} decisions")

    def record(decision: Decision) -> None:
        lines.append(decision.model_dump_json())
        write_text(directory / SEARCH_FILE, "\n".join(lines) + "\n")
        console.print(tell(decision, slim.architecture, dense_macs), soft_wrap=True)

    search(slim, scoring, measuring, recipe, directory, Log(decided, record), goal_of, budget_gib)


def _digest(batches: Batches) -> str:
    """SHA-256 of images and labels."""
    digest = hashlib.sha256()
    for images, labels in batches:
        digest.update(images.numpy().tobytes())
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


def tell(decision: Decision, before: Architecture, dense_macs: int) -> str:
    """One line for people: what a decision does to the model as it stood before."""
    if isinstance(decision, Curve):
        least = decision.losses.attention[0]
        return f"profiled block {decision.block}: one head would lose {least.loss:.3g}"
    if isinstance(decision, Plan):
        return "plan: " + ", ".join(f"{b.heads}x{b.qk_dim}/{b.v_dim}+{b.hidden}@{b.keep}" for b in decision.blocks)
    index = decision.block
    had = before.blocks[index]
    if not isinstance(decision, ChannelDecision):
        tokens = before.tokens_in(index)
        what = f"tokens {tokens} -> {decision.keep}" if decision.keep < tokens else f"keeps its {tokens} tokens"
    elif decision.choice is None:
        what = "keeps its channels"
    else:
        now = decision.choice.shape(had.keep)
        what = (
            f"heads {had.heads} -> {now.heads}, query/key {had.qk_dim} -> {now.qk_dim}, "
            f"value {had.v_dim} -> {now.v_dim}, hidden {had.hidden} -> {now.hidden}"
        )
    trials = f" ({len(decision.trials)} trials)" if decision.trials else ""
    return f"block {index}: {what}; top-1 {decision.top1:.2f}, MACs {decision.macs / dense_macs:.3f}{trials}"


def _read_decisions(path: Path, header: dict[str, object]) -> list[Decision]:
    """The decisions of an interrupted search.

    Raises:
        InputError: the file is damaged, or was written for other inputs; the message names what differs.
    """
    if not path.exists():
        return []
    parse: Callable[[str], Decision] = TypeAdapter(Decision).validate_json
    try:
        first, *rest = path.read_text().splitlines()
        written = json.loads(first)
        decisions = [parse(line) for line in rest]
    except (ValueError, ValidationError):
        raise InputError(f"{path} is damaged; give another --out") from None
    for key, value in header.items():
        if written.get(key) != value:
            raise InputError(f"{path}: {key} was {written.get(key)}, now it is {value}; give another --out")
    return decisions
