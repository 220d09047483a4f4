"""The accuracy benchmark: intervals, tables and plots of seeds, and runs that share what they found out."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.accuracy import Accuracy, SeedResult, _share_curves, as_markdown, spread, summarise
from benchmarks.machine import describe
from benchmarks.plots import plot_accuracy
from pipeline.recipe import Recipe, make_recipe
from pipeline.run import SEARCH_FILE, compress


def seed(variant: str, target: float, number: int, pruned: float, finetuned: float | None) -> SeedResult:
    return SeedResult(
        variant=variant,
        target=target,
        seed=number,
        macs=target,
        dense_top1=98.7,
        pruned_top1=pruned,
        finetuned_top1=finetuned,
        blocks=6,
        blocks_dropping_tokens=2,
        blocks_losing_channels=6,
    )


def test_the_interval_is_students() -> None:
    """Five values: t(0.975, 4) is 2.776."""
    got = spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (got.mean, got.deviation) == (3, pytest.approx(1.5811, abs=1e-4))
    assert got.half_interval == pytest.approx(2.776 * 1.5811 / 5**0.5, abs=1e-3)


def test_seeds_are_summed_up_by_variant_and_target(tmp_path: Path) -> None:
    seeds = [
        *(seed("lowpass", 0.5, n, 98 + n, 99.0 - n) for n in range(2)),
        *(seed("no-recovery", 0.5, n, 90 + n, None if n else 97.0) for n in range(2)),
        *(seed("lowpass", 0.3, n, 80 + n, None) for n in range(2)),
    ]
    summaries = summarise(seeds)
    assert [(s.variant, s.target, s.seeds, s.pruned_top1.mean) for s in summaries] == [
        ("lowpass", 0.5, 2, 98.5),
        ("no-recovery", 0.5, 2, 90.5),
        ("lowpass", 0.3, 2, 80.5),
    ]
    assert summaries[0].finetuned_top1 is not None and summaries[0].finetuned_top1.mean == 98.5
    assert summaries[1].finetuned_top1 is None and summaries[1].finetuned_seeds == 1  # one has no spread
    done = Accuracy(command="c", seconds=1, machine=describe(), seeds=tuple(seeds), summaries=summaries)
    table = as_markdown(done)
    assert "| lowpass | 0.5 | 2 | 98.50 ± 0.71 (± 6.35) | 98.50 ± 0.71 (± 6.35) | 2 |" in table
    assert "| lowpass | 0.3 | 2 | 80.50 ± 0.71 (± 6.35) | - | 0 |" in table
    plot_accuracy(done, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 800


def test_what_is_known_of_the_dense_model_is_shared_between_targets(tmp_path: Path) -> None:
    """And changes nothing: the run that begins with it ends as it would have."""

    def recipe(target: float, **changes: object) -> Recipe:
        images = {"score_images": 32, "measure_images": 64}
        return make_recipe(model="digits_deit", data="digits", target_macs=target, **(images | changes))

    compress(recipe(0.7), tmp_path / "runs" / "first")
    compress(recipe(0.6), tmp_path / "alone")
    for name, other in (("second", recipe(0.6)), ("third", recipe(0.6, seed=1))):
        _share_curves(tmp_path / "runs" / name, other)
    assert not (tmp_path / "runs" / "third").exists()  # of another seed
    begun = (tmp_path / "runs" / "second" / SEARCH_FILE).read_text().splitlines()
    assert len(begun) == 1 + 6
    compress(recipe(0.6), tmp_path / "runs" / "second", resume=True)
    for name in (SEARCH_FILE, "slim.safetensors"):
        assert (tmp_path / "runs" / "second" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
