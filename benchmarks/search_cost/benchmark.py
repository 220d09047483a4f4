"""What a search costs: the authors' schedule against ours, on the same images with the same allowance.

    python -m lowpass.benchmarks.search_cost --out benchmarks/results/search_cost

The authors' schedule (VTC-LFC's released code): in each block seven token trials and seven channel trials by halving,
every one a pass of the whole model over all measuring images, and every channel trial with scores of its own: the whole
model forwards on clean and on low-passed images, and backwards. Ours: `search/cascade.py`, without recovery, so that
both do the same; recovery is counted apart. Work is counted by torch's FLOP counter, in forwards of one image through
the dense model. A search that was counted already is not counted again.
"""

import copy
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lowpass.benchmarks.latency.machine import Machine, describe, in_a_line
from lowpass.benchmarks.rows import Row, write_rows
from lowpass.pipeline.base.files import write_json
from lowpass.pipeline.base.progress import console, track
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.data.datasets import Batches, load_data, made_batches
from lowpass.pipeline.method.channels import choose_channels
from lowpass.pipeline.method.frequency import lowpass_images
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.search import search
from lowpass.pipeline.search.shaping import AS_PUBLISHED, first_keep
from lowpass.pipeline.search.state import keeping
from lowpass.pipeline.train.evaluate import top1

TRIALS = 7  # of the authors' schedule, for each of tokens and channels
DEPTHS = (2, 4, 8, 16)
COUNTS = (32, 64, 128, 256)
DEIT_BATCH = 3


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cost(_Frozen):
    """Of one search: forwards of one image through the dense model that do as much work, seconds, MACs that stayed."""

    image_forwards: float
    seconds: float
    macs: float


class Comparison(_Frozen):
    """One model. `saved` is how many times fewer image-forwards ours takes than the authors' schedule."""

    model: str
    scored: int
    measured: int
    allowance: float
    authors: Cost
    ours: Cost
    ours_with_recovery: Cost
    to_a_target: Cost | None  # of half the MACs, with recovery; None: not counted
    saved: float
    saved_with_recovery: float


class Point(_Frozen):
    """Ours, at one depth and count of images: all work, in forwards of one image through one block of that model."""

    depth: int
    images: int
    block_forwards: float


class SearchCost(_Frozen):
    """Everything that was counted."""

    command: str
    machine: Machine
    models: tuple[Comparison, ...]
    by_images: tuple[Point, ...]
    by_depth: tuple[Point, ...]


def counted(model: SlimViT, search: Callable[[SlimViT], Architecture]) -> Cost:
    """What `search` does to a copy of `model`."""
    # Attention written out is counted on every device; fused CPU kernels are unknown to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        began = time.monotonic()
        left = search(copy.deepcopy(model))
        seconds = time.monotonic() - began
    macs = model.architecture.macs()
    return Cost(image_forwards=counter.get_total_flops() / (2 * macs), seconds=seconds, macs=left.macs() / macs)


def authors_schedule(model: SlimViT, scoring: Batches, measuring: Batches, recipe: Recipe) -> Architecture:
    """The same acceptance rule and the same channel choice as ours, with nothing kept between passes."""
    assert recipe.allowable_drop is not None
    depth = len(model.blocks)
    top1_now = top1(model, measuring)
    for index in track(range(depth), "the authors' schedule"):
        entered = top1_now
        floor = entered - recipe.allowable_drop / depth * recipe.token_share
        have = model.blocks[index].tokens_in
        fewest = first_keep(model.architecture) if index == 0 else 1

        def after_tokens(dropped: int, index: int = index, have: int = have) -> float:
            with keeping(model, index, have - dropped):
                return top1(model, measuring)

        dropped, top1_now = _halving(have - fewest, floor, top1_now, after_tokens)
        model.set_keep(index, have - dropped)
        floor = entered - recipe.allowable_drop / depth
        block = model.blocks[index]
        rows = 3 * block.attn.query.out_features + block.shape.hidden

        def cut(n: int, index: int = index) -> SlimViT:
            candidate = copy.deepcopy(model)
            scores = _scores(candidate, scoring, index, recipe)
            remove_channels(candidate.blocks[index], choose_channels(scores, n))
            return candidate

        def after_channels(n: int, cut: Callable[[int], SlimViT] = cut) -> float:
            return top1(cut(n), measuring)

        n, top1_now = _halving(rows - 1, floor, top1_now, after_channels)
        if n:
            remove_channels(model.blocks[index], choose_channels(_scores(model, scoring, index, recipe), n))
    return model.architecture


def _halving(limit: int, floor: float, before: float, left: Callable[[int], float]) -> tuple[int, float]:
    """The largest amount accepted in `TRIALS` halvings, and the top-1 that it left."""
    accepted, refused, best = 0, limit + 1, before
    for _ in range(TRIALS):
        middle = (accepted + refused) // 2
        if middle == accepted:
            break
        measured = left(middle)
        if measured >= floor:
            accepted, best = middle, measured
        else:
            refused = middle
    return accepted, best


def _scores(model: SlimViT, scoring: Batches, index: int, recipe: Recipe) -> ChannelScores:
    """LFS by plain backward passes through everything."""
    block = model.blocks[index]
    seen: list[torch.Tensor] = []
    hook = block.register_forward_hook(lambda _module, _inputs, output: seen.append(output[:, 0]))
    model.zero_grad(set_to_none=True)
    for images, labels in scoring:
        seen.clear()
        with torch.no_grad():
            model(images)
        logits = model(lowpass_images(images, recipe.image_cutoff))
        clean, low = seen
        divergence = F.kl_div(low.log_softmax(-1), clean.softmax(-1), reduction="sum") / clean.numel()
        loss = recipe.lfs_weight * F.cross_entropy(logits, labels) + (1 - recipe.lfs_weight) * divergence
        (loss / len(scoring)).backward()
    hook.remove()
    layers = (block.attn.query, block.attn.key, block.attn.value, block.mlp.fc1)
    query, key, value, hidden = (_squared(layer) for layer in layers)
    model.zero_grad(set_to_none=True)
    heads = block.attn.num_heads
    return ChannelScores((query + key).unflatten(0, (heads, -1)), value.unflatten(0, (heads, -1)), hidden)


def _squared(layer: nn.Module) -> torch.Tensor:
    assert isinstance(layer, nn.Linear) and layer.weight.grad is not None
    return (layer.weight.grad * layer.weight.detach()).square().sum(1)


def ours(model: SlimViT, scoring: Batches, measuring: Batches, recipe: Recipe) -> Architecture:
    """`--allowable-drop` or `--target-macs`, whichever the recipe says."""
    with tempfile.TemporaryDirectory() as folder:
        search(model, scoring, measuring, recipe, Path(folder), SearchLog([], lambda _decision: None))
    return model.architecture


def remembered(path: Path, count: Callable[[], Cost]) -> Cost:
    """A cost that was counted already, or `count()`, written down."""
    if not path.exists():
        write_json(path, count().model_dump(mode="json"))
    return Cost.model_validate_json(path.read_bytes())


def compare(
    name: str,
    model: SlimViT,
    scoring: Batches,
    measuring: Batches,
    allowance: float,
    folder: Path,
    to_a_target: bool = True,
) -> Comparison:
    """One model, all ways; what is counted is kept in `folder`."""

    def recipe(**settings: object) -> Recipe:
        asked = {} if "target_macs" in settings else {"allowable_drop": allowance}
        return Recipe.model_validate({"model": name, "data": "made", "shaping": AS_PUBLISHED} | asked | settings)

    scored, measured = (sum(len(labels) for _, labels in batches) for batches in (scoring, measuring))
    costs = {}
    for kind, schedule, settings in (
        ("authors", authors_schedule, recipe(recovery=False)),
        ("ours", ours, recipe(recovery=False)),
        ("ours with recovery", ours, recipe()),
        *([("to a target", ours, recipe(target_macs=0.5))] if to_a_target else []),
    ):
        search = partial(schedule, scoring=scoring, measuring=measuring, recipe=settings)
        path = folder / f"{name}-{scored}-{measured}-{allowance:g}-{kind}.json".replace(" ", "_")
        costs[kind] = remembered(path, partial(counted, model, search))
        console.print(f"{name}, {kind}: {costs[kind]}", soft_wrap=True)
    return Comparison(
        model=name,
        scored=scored,
        measured=measured,
        allowance=allowance,
        authors=costs["authors"],
        ours=costs["ours"],
        ours_with_recovery=costs["ours with recovery"],
        to_a_target=costs.get("to a target"),
        saved=costs["authors"].image_forwards / costs["ours"].image_forwards,
        saved_with_recovery=costs["authors"].image_forwards / costs["ours with recovery"].image_forwards,
    )


def random_model(name: str, images: int, batch_size: int, **changes: int) -> tuple[SlimViT, Batches]:
    """Random weights and noise; every image labelled with what the model takes it for, so that there is something to
    lose. Its classes are centred, or all images would be of one."""
    torch.manual_seed(0)
    model = SlimViT.from_timm(timm.create_model(name, **changes).eval())
    made = made_batches(model.architecture, images, batch_size, seed=0)
    head = model.vit.head
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch, _ in made])
        head.bias.sub_(logits.mean(0))
        labels = (logits - logits.mean(0)).argmax(1).split(batch_size)
    return model, [(batch, label) for (batch, _), label in zip(made, labels, strict=True)]


def sweep_point(depth: int, images: int) -> Point:
    """Ours on the digits architecture of some depth, with random weights."""
    model, batches = random_model("digits_deit", images, 32, depth=depth)
    recipe = Recipe(model="digits_deit", data="made", allowable_drop=9.5, shaping=AS_PUBLISHED)
    cost = counted(model, partial(ours, scoring=batches, measuring=batches, recipe=recipe))
    return Point(depth=depth, images=images, block_forwards=cost.image_forwards * depth)


def as_markdown(done: SearchCost) -> str:
    """The tables, with what they were measured by."""
    machine = done.machine
    lines = [
        "# What a search costs",
        "",
        f"`{done.command}` on {in_a_line(machine)}",
        "",
        "Work in forwards of one image through the dense model, counted by torch's FLOP counter; the same images, "
        "allowance and shapes (the paper's) for all.",
        "",
        "| model | images scored / measured | schedule | image-forwards | fewer | seconds | MACs that stayed |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for one in done.models:
        for name, cost in (
            ("the authors'", one.authors),
            ("ours", one.ours),
            ("ours, with recovery", one.ours_with_recovery),
            ("ours, to half the MACs, with recovery", one.to_a_target),
        ):
            if cost is not None:
                lines.append(
                    f"| {one.model} | {one.scored} / {one.measured} | {name} | {cost.image_forwards:,.0f} "
                    f"| {one.authors.image_forwards / cost.image_forwards:.1f}x | {cost.seconds:.0f} "
                    f"| {cost.macs:.3f} |"
                )
    for title, points in (("images", done.by_images), ("depth", done.by_depth)):
        lines += [
            "",
            f"By {title} (with recovery; work in forwards of one image through one block):",
            "",
            "| depth | images | block-forwards | against the row above |",
            "|--:|--:|--:|--:|",
        ]
        for before, point in zip((None, *points), points, strict=False):
            growth = "-" if before is None else f"{point.block_forwards / before.block_forwards:.2f}x"
            lines.append(f"| {point.depth} | {point.images} | {point.block_forwards:,.0f} | {growth} |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Where OUT.csv goes.")],
    scored: Annotated[int, typer.Option(help="Images scored of DeiT-Small; of the digits, 200.")] = 6,
    measured: Annotated[int, typer.Option(help="Images measured of DeiT-Small; of the digits, 500.")] = 15,
    runs: Annotated[Path, typer.Option(help="Where the costs counted so far are.")] = Path("runs/search_cost"),
) -> None:
    """Count and time."""
    digits = SlimViT.from_timm(load_model("digits_deit"))
    data = load_data("digits", digits.architecture)
    scoring, measuring = (data.calibration_batches(n, 64, seed, "reading images") for seed, n in ((0, 200), (1, 500)))
    deit, made = random_model("deit_small_patch16_224", scored + measured, DEIT_BATCH)
    split = scored // DEIT_BATCH
    done = SearchCost(
        command=shlex.join(["python", "-m", "lowpass.benchmarks.search_cost", *sys.argv[1:]]),
        machine=describe(),
        models=(
            compare("digits_deit", digits, scoring, measuring, 9.5, runs),
            # To a target it would take an hour: every part is cut to every size.
            compare("deit_small random", deit, made[:split], made[split:], 40.0, runs, to_a_target=False),
        ),
        by_images=tuple(sweep_point(4, images) for images in COUNTS),
        by_depth=tuple(sweep_point(depth, 32) for depth in DEPTHS),
    )
    write_rows(out.with_suffix(".csv"), rows(done), done.machine, done.command)
    print(as_markdown(done))


def rows(done: SearchCost) -> Iterator[Row]:
    """What every schedule costs, and how ours grows."""
    for one in done.models:
        for schedule, cost in (
            ("authors", one.authors),
            ("ours", one.ours),
            ("ours with recovery", one.ours_with_recovery),
            ("ours to half the MACs with recovery", one.to_a_target),
        ):
            if cost is not None:
                of = {"model": one.model, "scored": one.scored, "measured": one.measured, "schedule": schedule}
                of |= {"allowable_drop": one.allowance}
                yield Row(of, "image_forwards", cost.image_forwards)
                yield Row(of, "seconds", cost.seconds)
                yield Row(of, "macs_share", cost.macs)
    for sweep, points in (("images", done.by_images), ("depth", done.by_depth)):
        for point in points:
            of = {"model": "digits_deit random", "sweep": sweep, "depth": point.depth, "images": point.images}
            yield Row(of, "block_forwards", point.block_forwards)
