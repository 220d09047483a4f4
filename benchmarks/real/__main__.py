"""A real model on real pictures: `python -m lowpass.benchmarks.real --help`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from torch.utils.data import Subset

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.real.convert import convert
from lowpass.benchmarks.real.dense import SETTINGS, make_dense
from lowpass.benchmarks.real.merging import measure_merging
from lowpass.benchmarks.real.methods import METHODS
from lowpass.benchmarks.real.packages import CLIPART, FASHION, fetch
from lowpass.benchmarks.real.pictures import DATA, image_folder
from lowpass.benchmarks.real.plot import plot_rows
from lowpass.benchmarks.real.precisions import PRECISIONS, measure_precisions
from lowpass.benchmarks.real.show import write_pictures
from lowpass.benchmarks.real.table import BATCH, Request, finished_rows, listed, measure_rows, open_bench
from lowpass.benchmarks.rows import RESULTS, Row, origin_of, write_rows
from lowpass.pipeline.base.allocator import keep_freed_memory
from lowpass.pipeline.base.exits import exit_codes
from lowpass.pipeline.base.progress import console

app = typer.Typer(
    help="A real model on real pictures. Each step does those before it, and none twice: after a kill it goes on.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
Cache = Annotated[Path, typer.Option(help="Where everything is kept.")]
CACHE = Path("runs/real")


@app.command("fetch")
def fetch_packages(cache: Cache = CACHE) -> None:
    """Download the pictures, as Debian packages, without root."""
    for name in (FASHION, CLIPART):
        package = fetch(name, cache)
        console.print(f"{package.name} {package.version}: {package.tree}")


@app.command("convert")
def convert_backbone(cache: Cache = CACHE) -> None:
    """DINOv2 ViT-S/14 as a timm checkpoint, checked against the package's own file."""
    console.print(str(convert(cache)))


@app.command()
def images(
    names: Annotated[str, typer.Option(help=f"Of {', '.join(DATA)}.")] = ",".join(DATA), cache: Cache = CACHE
) -> None:
    """Write the image folders."""
    for name in names.split(","):
        folder, _ = image_folder(cache, name.strip())
        console.print(str(folder))


@app.command()
def dense(
    settings: Annotated[str, typer.Option(help=f"Of {', '.join(SETTINGS)}.")] = ",".join(SETTINGS),
    seed: Annotated[int, typer.Option(help="Of the images that are drawn, and of training.")] = 0,
    cache: Cache = CACHE,
) -> None:
    """Fit the dense models: a linear head, then the last blocks."""
    for name in settings.split(","):
        console.print(str(make_dense(name.strip(), cache, seed)))


@app.command()
def rows(
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(SETTINGS)}.")] = Request.setting,
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(METHODS)}.")] = ",".join(METHODS),
    levels: Annotated[str, typer.Option(help="Shares of the MACs that stay.")] = "0.7,0.5,0.35",
    seeds: Annotated[str, typer.Option(help="Of the images to calibrate on.")] = "0,1,2",
    score_images: Annotated[int, typer.Option(help="To calibrate on.")] = Request.score_images,
    test_images: Annotated[int | None, typer.Option(help="Drawn from the test split. [default: all]")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A CSV of every finished row, and a plot beside it, written after each.")
    ] = None,
    cache: Cache = CACHE,
) -> None:
    """Prune the dense model by every method, and measure top-1 without training."""
    request = Request(
        setting,
        listed(methods, "--methods", str),
        listed(levels, "--levels", float),
        listed(seeds, "--seeds", int),
        score_images,
        test_images,
    )
    # What decides a figure: where files lie on this machine does not.
    words = ["--setting", setting, "--methods", methods, "--levels", levels, "--seeds", seeds]
    words += ["--score-images", str(score_images)] + (["--test-images", str(test_images)] if test_images else [])
    command = shlex.join(["python", "-m", "lowpass.benchmarks.real", "rows", *words])
    machine = describe()
    for _ in measure_rows(request, cache, origin_of(machine, command)):
        if out is not None:
            done = finished_rows(cache)
            write_rows(out, done, machine, command)
            plot_rows(done, out.with_suffix(".png"))


@app.command()
def precisions(
    run: Annotated[Path, typer.Argument(help="A run of `rows`, or any other with images.")],
    names: Annotated[str, typer.Option("--precisions", help="Which.")] = ",".join(PRECISIONS),
    out: Annotated[Path | None, typer.Option(help="A CSV, written after each file.")] = None,
    cache: Annotated[Path, typer.Option(help="Where finished figures are kept.")] = CACHE / "precisions",
) -> None:
    """Export a run's dense and slim model in every precision: agreement with PyTorch, and top-1."""
    command = shlex.join(["python", "-m", "lowpass.benchmarks.real", "precisions", run.name, "--precisions", names])
    machine = describe()
    for done in measure_precisions(run, cache, origin_of(machine, command), listed(names, "--precisions", str)):
        if out is not None:
            write_rows(out, done, machine, command)


@app.command()
def merging(
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(SETTINGS)}.")] = Request.setting,
    test_images: Annotated[int, typer.Option(min=1, help="Drawn from the test split.")] = 2000,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    cache: Cache = CACHE,
) -> None:
    """Merge tokens in place of dropping them, and compare top-1 without training."""
    bench = open_bench(Request(setting=setting, test_images=test_images), cache)
    batches = list(bench.data.loader(Subset(bench.data.test, bench.tested), BATCH))
    machine, found = describe(), list[Row]()
    words = ["merging", "--setting", setting, "--test-images", str(test_images)]
    for row in measure_merging(bench.model, batches):
        found.append(row)
        if row.figure == "better_than_dropped":
            console.print(f"{row.of['tokens']}: {row.of['way']}, {row.value:+.2f} points")
    command = shlex.join(["python", "-m", "lowpass.benchmarks.real", *words])
    write_rows(out / "real_merging.csv", found, machine, command)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run that was searched to a target.")],
    pictures: Annotated[Path, typer.Option(help="A folder of pictures by class; ten are drawn.")],
    out: Annotated[Path, typer.Option(help="Where blocks.png and tokens.png go.")] = Path(),
) -> None:
    """Draw the tokens that stay, the shapes of the blocks and what cuts would lose."""
    for path in write_pictures(run, pictures, out):
        console.print(str(path))


if __name__ == "__main__":
    keep_freed_memory()
    with exit_codes():
        app()
