"""The paper's Figure 1 on small data: how much a criterion suffers when the images that it sees are noisy.

    python -m lowpass.benchmarks.accuracy noise --out benchmarks/results/accuracy_noise

Gaussian noise is added to the images (normalised, so in units of their standard deviation) that score channels, or that
score tokens. What is pruned by those scores is then tested on clean images, before any training. Shapes are those of
the study of criteria (`study.py`) at one target and the same seed, for both criteria alike.
"""

import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from lowpass.benchmarks.accuracy.noise_table import Noise, NoisePoint, as_markdown, rows
from lowpass.benchmarks.accuracy.plots import plot_noise
from lowpass.benchmarks.accuracy.studies import STUDIES
from lowpass.benchmarks.accuracy.study import Source, directory_of, one_seed
from lowpass.benchmarks.accuracy.table import spread
from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.rows import write_rows
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.data.datasets import Batches, Data, load_data
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.token_scores import keep_tokens
from lowpass.pipeline.model.architecture import read_blocks
from lowpass.pipeline.model.slim_vit import ARCHITECTURE_FILE, SlimViT
from lowpass.pipeline.run.recipe import Recipe, make_recipe
from lowpass.pipeline.search.state import SearchState
from lowpass.pipeline.search.table import apply_table
from lowpass.pipeline.train.evaluate import top1

COMPARED = {"channels": ("lfs", "taylor"), "tokens": ("lfe-attention tokens", "attention tokens")}  # method, rival
STRENGTHS = (0.0, 0.1, 0.2, 0.4, 0.8)
Blocks = tuple[BlockShape, ...]


def noisy(batches: Batches, strength: float, seed: int) -> Batches:
    """The same images with Gaussian noise of that standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return [(images + strength * torch.randn(images.shape, generator=generator), labels) for images, labels in batches]


def channels_by_noisy_images(recipe: Recipe, blocks: Blocks, data: Data, scratch: Path, noise: float) -> float:
    """Top-1 of the dense model cut to `blocks`, its channels scored on noisy images."""
    slim = _dense(recipe)
    scoring = data.calibration_batches(recipe.score_images, recipe.batch_size, recipe.seed, "reading images")
    apply_table(SearchState(slim, noisy(scoring, noise, recipe.seed), [], recipe, scratch), blocks)
    return top1(slim, data.loader(data.test, recipe.batch_size))


class _Recorded:
    """Takes the place of a block's `keep_tokens`: writes scores down, or goes by what was written."""

    def __init__(self) -> None:
        self.scores = torch.empty(0)

    def record(self, tokens: Tensor, scores: Tensor, keep: int) -> Tensor:
        """As `keep_tokens`."""
        self.scores = scores
        return keep_tokens(tokens, scores, keep)

    def replay(self, tokens: Tensor, scores: Tensor, keep: int) -> Tensor:
        """As `keep_tokens`, by the scores that were written down."""
        return keep_tokens(tokens, self.scores, keep)


def tokens_by_noisy_images(recipe: Recipe, blocks: Blocks, data: Data, _scratch: Path, noise: float) -> float:
    """Top-1 of the dense model on clean images, when the tokens it keeps are chosen on noisy ones."""
    slim = _dense(recipe)
    for index, shape in enumerate(blocks):
        slim.set_keep(index, shape.keep)
    records = [_Recorded() for _ in slim.blocks]
    clean: Batches = list(data.loader(data.test, recipe.batch_size))
    correct = 0
    with torch.inference_mode():
        for (images, labels), (seen, _) in zip(clean, noisy(clean, noise, recipe.seed), strict=True):
            for step in ("record", "replay"):
                for block, record in zip(slim.blocks, records, strict=True):
                    block.keep_tokens = getattr(record, step)
                logits = slim(seen if step == "record" else images)
            correct += int((logits.argmax(-1) == labels).sum())
    return 100 * correct / sum(len(labels) for _, labels in clean)


def _dense(recipe: Recipe) -> SlimViT:
    return SlimViT.from_timm(
        load_model(recipe.model, recipe.weights),
        recipe.token_cutoff,
        recipe.energy_norm,
        recipe.shaping.token_score,
        recipe.token_criterion,
    )


MEASURES = {"channels": channels_by_noisy_images, "tokens": tokens_by_noisy_images}


def study_noise(root: Path, source: Source, target: float, seeds: int) -> tuple[NoisePoint, ...]:
    """All points; the shapes are searched first, where they are not there yet."""
    study, found = STUDIES["criteria"], dict[tuple[str, str, float], list[float]]()
    for scored, names in COMPARED.items():
        for seed in range(seeds):
            reference = study.variant(names[0])
            one_seed(root, study, reference, target, seed, source, finetune=False)
            table = directory_of(root, reference, target, seed) / ARCHITECTURE_FILE
            blocks = read_blocks(table)
            for name in names:
                settings = {**source, **study.recipe, **study.variant(name).recipe}
                recipe = make_recipe(**settings, seed=seed, architecture=table)
                data = load_data(str(recipe.data), _dense(recipe).architecture, seed)
                for strength in track(STRENGTHS, f"{name}, seed {seed}"):
                    with tempfile.TemporaryDirectory() as scratch:
                        measured = MEASURES[scored](recipe, blocks, data, Path(scratch), strength)
                    found.setdefault((scored, name, strength), []).append(measured)
    return tuple(
        NoisePoint(scored=scored, variant=name, noise=noise, top1=tuple(values), spread=spread(values))
        for (scored, name, noise), values in sorted(found.items())
    )


def main(
    out: Annotated[Path, typer.Option(help="Where OUT.csv and OUT.png go.")],
    target: Annotated[float, typer.Option(help="Share of the dense MACs that stays.")] = 0.55,
    seeds: Annotated[int, typer.Option(min=1, help="From 0 upwards.")] = 5,
    model: Annotated[str, typer.Option(help="timm name of the dense model.")] = "digits_deit",
    weights: Annotated[Path | None, typer.Option(help="Its checkpoint.")] = None,
    data: Annotated[str, typer.Option(help="As of `lowpass compress`.")] = "digits",
    runs: Annotated[Path, typer.Option(help="Where the runs of the accuracy benchmark are.")] = Path("runs/accuracy"),
) -> None:
    began = time.monotonic()
    points = study_noise(runs, {"model": model, "weights": weights, "data": data}, target, seeds)
    done = Noise(
        title=f"{model} on {data}: criteria that see noisy images, at {target:g} of the MACs",
        command=shlex.join(["python", "-m", "lowpass.benchmarks.accuracy", *sys.argv[1:]]),
        seconds=time.monotonic() - began,
        machine=describe(),
        points=points,
    )
    write_rows(out.with_suffix(".csv"), rows(done), done.machine, done.command)
    plot_noise(done, out.with_suffix(".png"))
    print(as_markdown(done))
