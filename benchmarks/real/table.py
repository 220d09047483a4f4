"""The table that decides: top-1 without training of every method, at equal shares of the MACs of the real model.

A row is one setting, method, level and seed. Finished rows are files below `CACHE/SETTING/table/CHECKPOINT`, by the
SHA-256 of the dense checkpoint; searches are run directories beside them, which share what they find out about the
dense model. To measure a row again, remove its file, and its run directory.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from timm.models import VisionTransformer
from torch import nn
from torch.utils.data import Subset

from lowpass.benchmarks.real.dense import META, SETTINGS, make_dense
from lowpass.benchmarks.real.methods import METHODS, Pruned, searched, tested_indices
from lowpass.benchmarks.rows import Origin, Row
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import sha256, write_json
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.data.datasets import Data, load_data
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.evaluate import best_device
from lowpass.pipeline.run.inputs import MACHINE
from lowpass.pipeline.run.recipe import Recipe, make_recipe
from lowpass.pipeline.search.target import check_target
from lowpass.pipeline.train.evaluate import top1

BATCH = 64  # images, of a test; searches have their own
FIGURES = ("macs_share", "top1_no_training", "top1_dense", "seconds", "not_measured")


@dataclass(frozen=True)
class Request:
    """What is asked for. `levels` are shares of the MACs that stay; `test_images` are drawn from the test split, None:
    all."""

    setting: str = "fashion-112"
    methods: tuple[str, ...] = tuple(METHODS)
    levels: tuple[float, ...] = (0.7, 0.5, 0.35)
    seeds: tuple[int, ...] = (0, 1, 2)
    score_images: int = 2000
    test_images: int | None = None

    def check(self) -> None:
        """Refuse what there is not.

        Raises:
            InputError: an unknown setting or method, or a level, a seed or a count out of range.
        """
        if self.setting not in SETTINGS:
            raise InputError(f"there is no setting {self.setting!r}; known are {', '.join(SETTINGS)}")
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise InputError(f"there is no method {unknown[0]!r}; known are {', '.join(METHODS)}")
        if wrong := [level for level in self.levels if not 0 < level < 1]:
            raise InputError(f"a level is a share of the MACs between 0 and 1, not {wrong[0]:g}")
        if min(self.seeds, default=0) < 0 or self.score_images < 1 or (self.test_images or 1) < 1:
            raise InputError("seeds are 0 and up, and there must be images to score and to test on")

    def rows(self) -> Iterator[tuple[str, float, int]]:
        """Method, level and seed of every row; what no seed changes has one row a level, of the first seed."""
        for method in self.methods:
            for seed in self.seeds if METHODS[method].drawn else self.seeds[:1]:
                for level in self.levels:
                    yield method, level, seed


@dataclass(frozen=True)
class Bench:
    """A dense model, its data, and where its rows are kept."""

    request: Request
    folder: Path
    checkpoint: Path
    meta: dict[str, Any]
    model: VisionTransformer
    data: Data

    @property
    def rows_folder(self) -> Path:
        """Of rows measured on as many images."""
        tested = self.request.test_images or "all"
        return self.folder / f"score{self.request.score_images}-test{tested}"

    @property
    def tested(self) -> list[int]:
        """The test images that count."""
        return tested_indices(self.data, self.request.test_images)

    def top1(self, model: nn.Module) -> float:
        """In percent, on the test images that count."""
        loader = self.data.loader(Subset(self.data.test, self.tested), BATCH)
        return top1(model.eval().to(best_device()), loader, "testing")


def measure_rows(request: Request, cache: Path, origin: Origin) -> Iterator[None]:
    """Measure the rows that are not there yet, and yield after each that is.

    Raises:
        InputError: something is unknown, or the setting's packages cannot be had.
    """
    request.check()
    bench = open_bench(request, cache)
    wanted = list(request.rows())
    for number, (method, level, seed) in enumerate(wanted, 1):
        recipe = _recipe(bench, method, level, seed)
        inputs = {"recipe": None if recipe is None else recipe.model_dump(mode="json", exclude=set(MACHINE))}
        file = bench.rows_folder / f"{_name(method, level, seed)}.json"
        known = _read(file)
        if known is None or known["inputs"] != inputs:
            figures = _measured(bench, method, level, seed, recipe)
            of = {"setting": request.setting, "method": method, "level": level, "seed": seed}
            of |= {"score_images": request.score_images, "test_images": len(bench.tested)}
            known = {"of": of, "figures": figures, "origin": asdict(origin), "inputs": inputs}
            write_json(file, known)
        logger.info("%d of %d: %s", number, len(wanted), _in_words(method, level, seed, known["figures"]))
        yield


def finished_rows(cache: Path) -> list[Row]:
    """Of every setting's present dense model, in the order of settings, methods, levels and seeds."""
    found = [known for name in SETTINGS for file in _row_files(cache, name) if (known := _read(file)) is not None]
    order = {method: place for place, method in enumerate(METHODS)}
    places = {name: place for place, name in enumerate(SETTINGS)}

    def place(known: dict[str, Any]) -> tuple[int, ...]:
        of = known["of"]
        counts = -of["score_images"], -of["test_images"]
        return places[of["setting"]], *counts, order[of["method"]], -round(1e6 * of["level"]), of["seed"]

    rows = []
    for known in sorted((each for each in found if each["of"]["method"] in METHODS), key=place):
        origin = Origin(**known["origin"])
        figures = known["figures"]
        rows += [Row(known["of"], name, figures[name], origin=origin) for name in FIGURES if name in figures]
    return rows


def _row_files(cache: Path, setting: str) -> Sequence[Path]:
    meta = _read(cache / setting / META)
    return [] if meta is None else sorted(_folder(cache, setting, meta["sha256"]).glob("score*-test*/*-seed*.json"))


def _folder(cache: Path, setting: str, digest: str) -> Path:
    return cache / setting / "table" / digest[:12]


def _name(method: str, level: float, seed: int) -> str:
    return f"{method}-macs{level:g}-seed{seed}"


def open_bench(request: Request, cache: Path) -> Bench:
    """The setting's dense model, made if it is not there yet, and its data.

    Raises:
        InputError: something is unknown, or the setting's packages cannot be had.
    """
    checkpoint = make_dense(request.setting, cache)
    meta = json.loads((cache / request.setting / META).read_text())
    model = cast(VisionTransformer, load_model(meta["model"], checkpoint))
    data = load_data(meta["data"], SlimViT.from_timm(model).architecture, 0, DataOptions(workers=0))
    return Bench(request, _folder(cache, request.setting, sha256(checkpoint)), checkpoint, meta, model, data)


def _recipe(bench: Bench, method: str, level: float, seed: int) -> Recipe | None:
    if METHODS[method].rival is not None:
        return None
    source = {"model": bench.meta["model"], "weights": bench.checkpoint, "data": bench.meta["data"], "workers": 0}
    settings = {"score_images": bench.request.score_images, "seed": seed, "target_macs": level}
    return make_recipe(**source, **settings, **METHODS[method].recipe)


def _measured(bench: Bench, method: str, level: float, seed: int, recipe: Recipe | None) -> dict[str, Any]:
    """The row's figures; or why a method cannot have it. `seconds` are of pruning, in this process."""
    dense_macs, dense_top1 = SlimViT.from_timm(bench.model).architecture.macs(), _dense_top1(bench)
    began = time.perf_counter()
    try:
        pruned = _pruned(bench, method, level, seed, recipe, dense_top1)
    except _Unsuited as reason:
        return {"not_measured": str(reason)}
    seconds = time.perf_counter() - began
    return {
        "macs_share": pruned.macs / dense_macs,
        "top1_no_training": bench.top1(pruned.model),
        "top1_dense": dense_top1,
        "seconds": seconds,
    }


class _Unsuited(Exception):  # noqa: N818 - a reason, not an error
    """Why a method cannot prune this model so far."""


def _pruned(bench: Bench, method: str, level: float, seed: int, recipe: Recipe | None, dense_top1: float) -> Pruned:
    if recipe is not None:
        try:
            check_target(SlimViT.from_timm(bench.model).architecture, level, recipe)
        except InputError as error:
            raise _Unsuited(str(error)) from None
        runs = bench.folder / f"runs-score{bench.request.score_images}"
        return searched(recipe, runs / _name(method, level, seed), bench.data, dense_top1)
    rival = METHODS[method].rival
    assert rival is not None
    batches = bench.data.calibration_batches(bench.request.score_images, BATCH, seed, "reading images to calibrate on")
    try:
        return rival(bench.model, batches, level)
    except InputError as error:
        raise _Unsuited(str(error)) from None


def _dense_top1(bench: Bench) -> float:
    """On the test images that count; measured once."""
    file = bench.rows_folder / "dense.json"
    known = _read(file)
    if known is None:
        known = {"top1": bench.top1(bench.model)}
        write_json(file, known)
    return float(known["top1"])


def _in_words(method: str, level: float, seed: int, figures: dict[str, Any]) -> str:
    row = f"{method} at {level:g}, seed {seed}"
    if "not_measured" in figures:
        return f"{row}: {figures['not_measured']}"
    lost = figures["top1_no_training"] - figures["top1_dense"]
    return (
        f"{row}: {figures['top1_no_training']:.2f} % ({lost:+.2f}) at {figures['macs_share']:.3f} of the MACs, "
        f"{figures['seconds']:.0f} s"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def listed(text: str, what: str, kind: type) -> tuple[Any, ...]:
    """What an option lists, separated by commas.

    Raises:
        InputError: a part is none of that kind.
    """
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        raise InputError(f"{what} takes numbers separated by commas, not {text!r}") from None
