"""The accuracy benchmark: intervals, tables and plots of seeds, and runs that share what they found out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import TINY
from torch.utils.data import Subset

from lowpass.benchmarks.accuracy.noise import channels_by_noisy_images, noisy, tokens_by_noisy_images
from lowpass.benchmarks.accuracy.noise_table import Noise, NoisePoint
from lowpass.benchmarks.accuracy.noise_table import as_markdown as noise_markdown
from lowpass.benchmarks.accuracy.plots import plot_accuracy, plot_noise
from lowpass.benchmarks.accuracy.shared_curves import share_curves
from lowpass.benchmarks.accuracy.studies import STUDIES, Study, Variant
from lowpass.benchmarks.accuracy.study import directory_of, one_seed, run_study, waves
from lowpass.benchmarks.accuracy.table import Accuracy, SeedResult, as_markdown, spread, summarise
from lowpass.benchmarks.latency.machine import describe
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.data.datasets import load_data
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.recipe import Recipe, make_recipe
from lowpass.pipeline.search.log import SEARCH_FILE
from lowpass.pipeline.search.shaping import AS_PUBLISHED
from lowpass.pipeline.train.evaluate import top1

DIGITS = {"model": "digits_deit", "weights": None, "data": "digits"}
FEW = {"score_images": 32, "measure_images": 64, "recovery": False}


def seed(variant: str, target: float, number: int, pruned: float, finetuned: float | None) -> SeedResult:
    return SeedResult(
        group="some",
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
    assert spread([7.0]).mean == 7 and spread([7.0]).half_interval is None


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
    assert [(s.finetuned_seeds, s.finetuned_top1 and s.finetuned_top1.mean) for s in summaries] == [
        (2, 98.5),
        (1, 97.0),
        (0, None),
    ]
    for name, shown in (("curve", seeds), ("bars", seeds[:4])):  # several targets, and a single one
        done = Accuracy(
            title="t",
            command="c",
            seconds=1,
            machine=describe(),
            epochs=2,
            seeds=tuple(shown),
            summaries=summarise(shown),
        )
        plot_accuracy(done, tmp_path / f"{name}.png")
        assert Image.open(tmp_path / f"{name}.png").size[0] > 800
        table = as_markdown(done)
        assert "| some | lowpass | 0.5 | 0.500 to 0.500 | 2 | 98.50 ± 6.35 (0.71) | 98.50 ± 6.35 (0.71) | 2 |" in table
        assert "| some | no-recovery | 0.5 | 0.500 to 0.500 | 2 | 90.50 ± 6.35 (0.71) | 97.00 | 1 |" in table


def test_what_is_known_of_the_dense_model_is_shared(tiny_source: dict[str, object], tmp_path: Path) -> None:
    """Between targets, and from runs that pruned channels and tokens alone; it changes nothing: the run that begins
    with it ends as it would have."""

    def recipe(target: float, **changes: object) -> Recipe:
        goal = {"data": "digits", "target_macs": target, "shaping": AS_PUBLISHED, "batch_size": 16}
        return make_recipe(**(goal | tiny_source | FEW | changes))

    runs = tmp_path / "runs"
    compress(recipe(0.7, prune="channels"), runs / "channels-seed0")
    compress(recipe(0.8, prune="tokens"), runs / "tokens-seed0")
    compress(recipe(0.6), tmp_path / "alone")
    begun = {
        "both": recipe(0.6),
        "other-target": recipe(0.9, prune="tokens"),
        "other-rival": recipe(0.65, prune="channels", channel_criterion="magnitude"),
        "other-seed": recipe(0.6, seed=1),
        "other-criterion": recipe(0.6, token_criterion="lfe"),
    }
    for name, other in begun.items():
        share_curves(runs / f"{name}-seed0", other)
    assert sorted(run.name for run in runs.iterdir()) == [
        "both-seed0",
        "channels-seed0",
        "other-target-seed0",
        "tokens-seed0",
    ]
    assert len((runs / "both-seed0" / SEARCH_FILE).read_text().splitlines()) == 1 + TINY["depth"]
    compress(recipe(0.6), runs / "both-seed0", resume=True)
    for name in (SEARCH_FILE, "slim.safetensors"):
        assert (runs / "both-seed0" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.slow
def test_a_study_runs_resumes_and_takes_amounts_over(tmp_path: Path) -> None:
    reference = Variant("lfe", "tokens", {"prune": "tokens", "token_criterion": "lfe"})
    rival = Variant("by chance", "tokens", {"prune": "tokens", "token_criterion": "random"}, amounts_of="lfe")
    study = Study("s", FEW | {"shaping": AS_PUBLISHED}, (0.7,), 1, (reference, rival))
    assert waves(study, [rival, reference]) == [[reference], [rival]]
    first = one_seed(tmp_path, study, rival, 0.7, 0, DIGITS, finetune=False)
    run = directory_of(tmp_path, rival, 0.7, 0)
    written = (run / "slim.safetensors").read_bytes()
    results = run_study(tmp_path, study, [reference, rival], (0.7,), 1, 0, DIGITS, jobs=2)
    assert [one.variant for one in results] == ["lfe", "by chance"] and results[1] == first
    assert 0.69 < results[0].macs <= 0.7 and first.macs < results[0].macs  # chance needs no filter
    assert (run / "slim.safetensors").read_bytes() == written


def test_studies_can_be_made(tmp_path: Path) -> None:
    for study in STUDIES.values():
        for variant in study.variants:
            goal = {"architecture": tmp_path / "a"} if variant.amounts_of else {"target_macs": 0.5}
            make_recipe(**(DIGITS | goal | dict(study.recipe) | dict(variant.recipe)))
            assert variant.amounts_of is None or study.variant(variant.amounts_of).amounts_of is None
        assert len({variant.name for variant in study.variants}) == len(study.variants)


@pytest.mark.slow
def test_noise_reaches_the_criteria_alone(tmp_path: Path) -> None:
    """Without noise both measures are the pruned model's top-1; tokens chosen on pure noise cost some."""
    dense = SlimViT.from_timm(load_model("digits_deit"))
    data = load_data("digits", dense.architecture, 0)
    data = replace(data, test=Subset(data.test, range(200)))
    (batch, *_) = noisy([(torch.zeros(64, 3, 32, 32), torch.zeros(64))], 0.5, seed=0)
    assert float(batch[0].std()) == pytest.approx(0.5, rel=0.02)
    run = tmp_path / "run"
    compress(make_recipe(**DIGITS, target_macs=0.6, shaping=AS_PUBLISHED, prune="tokens", **FEW), run)
    slim = SlimViT.load(run)
    recipe = make_recipe(**DIGITS, shaping=AS_PUBLISHED, architecture=run / "architecture.json", **FEW)
    exact, lost = (
        tokens_by_noisy_images(recipe, slim.architecture.blocks, data, tmp_path, noise) for noise in (0.0, 100.0)
    )
    assert exact == top1(slim, data.loader(data.test, 64)) > lost > 20
    blocks = tuple(block.model_copy(update={"hidden": 60}) for block in dense.architecture.blocks)
    scored = [channels_by_noisy_images(recipe, blocks, data, tmp_path, noise) for noise in (0.0, 0.0, 100.0)]
    assert scored[0] == scored[1] != scored[2]


def test_noise_is_told(tmp_path: Path) -> None:
    points = tuple(
        NoisePoint(scored="tokens", variant=name, noise=noise, top1=(90.0, 91.0), spread=spread([90.0, 91.0]))
        for name in ("a", "b")
        for noise in (0.0, 1.0)
    )
    done = Noise(title="t", command="c", seconds=1, machine=describe(), points=points)
    assert "| tokens | b | 1 | 2 | 90.50 ± 6.35 (0.71) | 90.0, 91.0 |" in noise_markdown(done)
    plot_noise(done, tmp_path / "noise.png")
    assert Image.open(tmp_path / "noise.png").size[0] > 400
