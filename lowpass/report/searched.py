"""What a search decided and what it cost, read from `search.jsonl`."""

from dataclasses import dataclass
from pathlib import Path

from lowpass.export.forecast.target import PREFIX, is_forecast
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import sha256
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE
from lowpass.pipeline.search.curves import BlockCurve, SizeOption
from lowpass.pipeline.search.log import SEARCH_FILE, read_log
from lowpass.pipeline.search.log_entries import (
    ChannelDecision,
    ClassifierDecision,
    Curve,
    Entry,
    Plan,
    TokenDecision,
    Trial,
)
from lowpass.report.words import scaled


@dataclass(frozen=True)
class Decision:
    """One step: what became of a block (None: the classifier), the top-1 (percent) that was left on the images that
    measure, the points it changed by (None: of the first nothing came before), and MACs left (None: unchanged)."""

    block: int | None
    what: str
    top1: float
    change: float | None
    macs: int | None
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class PlannedBlock:
    """One row of a plan, and what each of its parts would lose if it were cut alone (mean KL divergence from the dense
    model's classes; None: it was not cut to this size alone)."""

    shape: BlockShape
    attention_loss: float | None
    hidden_loss: float | None
    token_loss: float | None


@dataclass(frozen=True)
class Recovered:
    """One refitted layer: held-out squared error a row, before and after; `taken`: whether the refit was."""

    layer: str
    before: float
    after: float
    taken: bool


@dataclass(frozen=True)
class Losses:
    """What cutting one part of one block alone would lose: block -> size that stays -> loss. `unit`: of the sizes."""

    title: str
    unit: str
    blocks: tuple[tuple[int, dict[int, float]], ...]

    @property
    def sizes(self) -> list[int]:
        """Every size that was tried."""
        return sorted({size for _, losses in self.blocks for size in losses})


@dataclass(frozen=True)
class Searched:
    """A search; what it was not asked for, such as a plan, is empty."""

    scored_images: int | None
    measured_images: int | None
    decisions: tuple[Decision, ...]
    losses: tuple[Losses, ...]
    plan: tuple[PlannedBlock, ...]
    plan_cost: str  # in words, and of which batch
    plan_batch: int | None  # images; None: of none
    recovered: tuple[Recovered, ...]


def read_search(directory: Path, architecture: Architecture, runtime: str | None) -> Searched | str:
    """The search of a run, or why there is none to show: a log that does not lead to the model that is there is not.

    Args:
        directory: the run.
        architecture: of its slim model.
        runtime: which its target was in milliseconds of; None: it was not.
    """
    path = directory / SEARCH_FILE
    if not path.exists():
        return f"there is no {SEARCH_FILE}"
    try:
        header, entries = read_log(path)
    except (InputError, OSError):
        return f"{SEARCH_FILE} cannot be read"
    dense = directory / DENSE_WEIGHTS_FILE
    if not dense.exists() or header.get("dense_sha256") != sha256(dense):
        return f"{SEARCH_FILE} is of other dense weights than the run's present ones"
    decisions, after = _followed(entries, architecture.model_copy(update={"blocks": architecture.dense.blocks()}))
    if after.blocks != architecture.blocks:
        return f"{SEARCH_FILE} does not lead to the run's present architecture"
    curves = tuple(entry for entry in entries if isinstance(entry, Curve))
    plans = [entry for entry in entries if isinstance(entry, Plan)]
    return Searched(
        scored_images=header.get("scored_images"),
        measured_images=header.get("measured_images"),
        decisions=tuple(decisions),
        losses=_losses_by_part(curves),
        plan=tuple(_planned(plans[-1], curves, architecture)) if plans else (),
        plan_cost=_cost(plans[-1], runtime) if plans else "",
        plan_batch=plans[-1].batch if plans else None,
        recovered=tuple(_recovered(entries)),
    )


def _followed(entries: list[Entry], architecture: Architecture) -> tuple[list[Decision], Architecture]:
    """The decisions one after the other, and the architecture they lead to."""
    decisions, before = list[Decision](), None
    for entry in entries:
        if isinstance(entry, Curve | Plan):
            continue
        change = None if before is None else entry.top1 - before
        if isinstance(entry, ClassifierDecision):
            decisions.append(Decision(None, "classifier refitted", entry.top1, change, None, ()))
        else:
            what, architecture = _acted_on(entry, architecture)
            decisions.append(Decision(entry.block, what, entry.top1, change, entry.macs, entry.trials))
        before = entry.top1
    return decisions, architecture


def _acted_on(entry: TokenDecision | ChannelDecision, before: Architecture) -> tuple[str, Architecture]:
    """In words, and the architecture after it."""
    had = before.blocks[entry.block]
    if isinstance(entry, TokenDecision):
        tokens = before.tokens_in(entry.block)
        what = f"tokens {tokens} → {entry.keep}" if entry.keep < tokens else f"keeps its {tokens} tokens"
        return what, before.with_keep(entry.block, entry.keep)
    if entry.choice is None:
        return "keeps its channels", before
    now = entry.choice.shape(had.keep)
    names = {"heads": "heads", "qk_dim": "query/key", "v_dim": "value", "hidden": "hidden"}
    gone = {"heads": ("its attention goes", not now.heads), "hidden": ("its MLP goes", not now.hidden)}
    changed = [
        gone[field][0] if field in gone and gone[field][1] else f"{name} {getattr(had, field)} → {getattr(now, field)}"
        for field, name in names.items()
        if getattr(had, field) != getattr(now, field) and (now.heads or field not in ("qk_dim", "v_dim"))
    ]
    return ", ".join(changed) or "keeps its channels", before.with_block(entry.block, now)


def _cost(plan: Plan, runtime: str | None) -> str:
    """What a plan takes: milliseconds are always of some batch, and measured or not."""
    if plan.batch is None or runtime is None:
        return f"It takes {scaled(plan.cost)} MACs."
    took = f"{plan.cost:.4g} ms for a batch of {plan.batch}"
    if is_forecast(runtime):
        return f"By the forecast ({runtime.removeprefix(PREFIX)}) it takes {took}: that was not measured."
    return f"A model of these shapes took {took}, measured on {runtime} in the search."


def _losses_by_part(curves: tuple[Curve, ...]) -> tuple[Losses, ...]:
    """Those of an attention that has been thinned are of its best way to so many heads."""
    hidden, heads, tokens = ([(curve.block, dict[int, float]()) for curve in curves] for _ in range(3))
    for index, curve in enumerate(curves):
        hidden[index][1].update((option.size, option.loss) for option in curve.losses.hidden)
        tokens[index][1].update((option.size, option.loss) for option in curve.losses.tokens)
        for option in curve.losses.attention:
            least = heads[index][1].get(option.heads, option.loss)
            heads[index][1][option.heads] = min(option.loss, least)
    parts = (
        Losses("Loss of a narrower MLP", "hidden channels that stay", tuple(hidden)),
        Losses("Loss of fewer heads", "heads that stay", tuple(heads)),
        Losses("Loss of fewer tokens", "image tokens that stay", tuple(tokens)),
    )
    return tuple(part for part in parts if part.sizes)


def _planned(plan: Plan, curves: tuple[Curve, ...], architecture: Architecture) -> list[PlannedBlock]:
    by_block = {curve.block: curve.losses for curve in curves}
    rows, tokens = [], architecture.dense.num_tokens
    for index, shape in enumerate(plan.blocks):
        rows.append(_losses(shape, by_block.get(index), tokens))
        tokens = shape.keep
    return rows


def _losses(shape: BlockShape, curve: BlockCurve | None, tokens: int) -> PlannedBlock:
    if curve is None:
        return PlannedBlock(shape, None, None, None)
    sizes = (shape.heads, shape.qk_dim, shape.v_dim)
    attention = [o.loss for o in curve.attention if (o.heads, o.qk_dim, o.v_dim) == sizes]
    token_loss = _at(curve.tokens, shape.keep) if shape.keep < tokens else 0.0
    return PlannedBlock(shape, attention[0] if attention else None, _at(curve.hidden, shape.hidden), token_loss)


def _at(options: tuple[SizeOption, ...], size: int) -> float | None:
    return next((option.loss for option in options if option.size == size), None)


def _recovered(entries: list[Entry]) -> list[Recovered]:
    found = []
    for entry in entries:
        if isinstance(entry, ChannelDecision | ClassifierDecision):
            where = f"blocks.{entry.block}." if isinstance(entry, ChannelDecision) else ""
            for refit in entry.refits:
                name = refit.layer if refit.layer.startswith("blocks.") else where + refit.layer
                found.append(Recovered(name, refit.before, refit.after, refit.ridge is not None))
    return found
