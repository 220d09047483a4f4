"""What the accuracy benchmark found: one line a seed, summed up by variant and target."""

from collections.abc import Iterator, Sequence
from statistics import mean, stdev

from pydantic import BaseModel, ConfigDict
from scipy.stats import t

from lowpass.benchmarks.latency.machine import Machine, in_a_line
from lowpass.benchmarks.rows import Row


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SeedResult(_Frozen):
    """One seed of one variant at one target; top-1 in percent, MACs as a share of the dense model's. `finetuned_top1`
    is None where it was not asked for."""

    group: str
    variant: str
    target: float
    seed: int
    macs: float
    dense_top1: float
    pruned_top1: float
    finetuned_top1: float | None
    blocks: int
    blocks_dropping_tokens: int
    blocks_losing_channels: int


class Spread(_Frozen):
    """Over the seeds: mean, sample standard deviation and half of the 95% interval of the mean (Student's t); None of a
    single seed."""

    mean: float
    deviation: float | None
    half_interval: float | None


class Summary(_Frozen):
    """All seeds of one variant at one target."""

    group: str
    variant: str
    target: float
    seeds: int
    finetuned_seeds: int
    pruned_top1: Spread
    finetuned_top1: Spread | None  # None: none was


class Accuracy(_Frozen):
    """Everything there is. `epochs` of fine-tuning; None: what suits the data by default."""

    title: str
    command: str
    seconds: float
    machine: Machine
    epochs: int | None
    seeds: tuple[SeedResult, ...]
    summaries: tuple[Summary, ...]


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    if len(values) < 2:
        return Spread(mean=values[0], deviation=None, half_interval=None)
    deviation = stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
    return Spread(mean=mean(values), deviation=deviation, half_interval=half)


def summarise(seeds: Sequence[SeedResult]) -> tuple[Summary, ...]:
    """One summary a variant and target, in the order they came."""
    groups: dict[tuple[str, str, float], list[SeedResult]] = {}
    for one in seeds:
        groups.setdefault((one.group, one.variant, one.target), []).append(one)
    summaries = []
    for (group, variant, target), members in groups.items():
        finetuned = [one.finetuned_top1 for one in members if one.finetuned_top1 is not None]
        summaries.append(
            Summary(
                group=group,
                variant=variant,
                target=target,
                seeds=len(members),
                finetuned_seeds=len(finetuned),
                pruned_top1=spread([one.pruned_top1 for one in members]),
                finetuned_top1=spread(finetuned) if finetuned else None,
            )
        )
    return tuple(summaries)


def as_markdown(done: Accuracy) -> str:
    """The tables, with what they were measured by."""
    epochs = "the data's own number of epochs" if done.epochs is None else f"{done.epochs} epochs"
    lines = [
        f"# {done.title}",
        "",
        f"`{done.command}`, {done.seconds / 60:.1f} minutes on {in_a_line(done.machine)}",
        "",
        f"Top-1 in percent, mean ± half of the 95% interval of the mean over the seeds (Student's t; sample standard "
        f"deviation in brackets). Fine-tuned for {epochs}. MACs: share of the dense model's, least and most.",
        "",
        "| pruned | variant | MACs asked for | MACs | seeds | no training | fine-tuned | of these seeds |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for summary in done.summaries:
        members = [one for one in done.seeds if (one.variant, one.target) == (summary.variant, summary.target)]
        macs = [one.macs for one in members]
        lines.append(
            f"| {summary.group} | {summary.variant} | {summary.target:g} | {min(macs):.3f} to {max(macs):.3f} "
            f"| {summary.seeds} | {as_text(summary.pruned_top1)} | {as_text(summary.finetuned_top1)} "
            f"| {summary.finetuned_seeds} |"
        )
    lines += [
        "",
        "| variant | MACs asked for | seed | MACs | dense | no training | fine-tuned | drop tokens | lost channels |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in done.seeds:
        finetuned = "-" if one.finetuned_top1 is None else f"{one.finetuned_top1:.2f}"
        lines.append(
            f"| {one.variant} | {one.target:g} | {one.seed} | {one.macs:.4f} | {one.dense_top1:.2f} "
            f"| {one.pruned_top1:.2f} | {finetuned} | {one.blocks_dropping_tokens} of {one.blocks} "
            f"| {one.blocks_losing_channels} of {one.blocks} |"
        )
    return "\n".join(lines) + "\n"


def as_text(spread: Spread | None) -> str:
    """Mean, interval and deviation, as far as there are any."""
    if spread is None:
        return "-"
    mean = f"{spread.mean:.2f}"
    return mean if spread.deviation is None else f"{mean} ± {spread.half_interval:.2f} ({spread.deviation:.2f})"


def rows(done: Accuracy) -> Iterator[Row]:
    """Every seed's figures; means and intervals are computed when they are shown."""
    for one in done.seeds:
        of = {"group": one.group, "variant": one.variant, "target": one.target, "seed": one.seed}
        yield Row(of, "macs_share", one.macs)
        yield Row(of, "top1_dense", one.dense_top1)
        yield Row(of, "top1_no_training", one.pruned_top1)
        if one.finetuned_top1 is not None:
            yield Row(of, "top1_finetuned", one.finetuned_top1)
        yield Row(of, "blocks", one.blocks)
        yield Row(of, "blocks_dropping_tokens", one.blocks_dropping_tokens)
        yield Row(of, "blocks_losing_channels", one.blocks_losing_channels)
