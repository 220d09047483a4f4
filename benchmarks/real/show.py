"""What a search did, drawn: the tokens that stay, the shapes of the blocks and what cuts would lose."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from lowpass.benchmarks.figures import COLOURS, write_figure
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_bytes
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.show_tokens import show_tokens
from lowpass.pipeline.search.log import SEARCH_FILE, read_log
from lowpass.pipeline.search.log_entries import Curve

PICTURES = 10


def write_pictures(run: Path, pictures: Path, out: Path) -> list[Path]:
    """Draw a searched run into `out`: `blocks.png`, and `tokens.png` where it drops tokens.

    Args:
        run: a run directory, searched to a target.
        pictures: a folder of a folder a class; the first picture of each of the first ten is drawn.
        out: a folder, made where it is missing.

    Raises:
        InputError: there is no such run, it was not searched to a target, or there are no pictures.
    """
    slim = SlimViT.load(run)
    try:
        _, entries = read_log(run / SEARCH_FILE)
    except OSError as error:
        raise InputError(
            f"cannot read {run / SEARCH_FILE}: {error.strerror}; only a search has something to draw"
        ) from None
    curves = [entry for entry in entries if isinstance(entry, Curve)]
    if not curves:
        raise InputError(f"{run} was not searched to a target: it has no loss curves to draw")
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "blocks.png"]
    write_figure(_blocks(slim, curves), written[0])
    if any(block.scores_tokens for block in slim.blocks):
        written.append(out / "tokens.png")
        content = io.BytesIO()
        show_tokens(slim, _one_of_each(pictures)).save(content, "PNG")
        write_bytes(written[-1], content.getvalue())
    return written


def _one_of_each(pictures: Path) -> list[Path]:
    folders = sorted(path for path in pictures.iterdir() if path.is_dir()) if pictures.is_dir() else []
    first = [min(folder.iterdir()) for folder in folders[:PICTURES] if any(folder.iterdir())]
    if not first:
        raise InputError(f"{pictures} holds no folders of pictures; give the test split of an image folder")
    return first


def _blocks(slim: SlimViT, curves: list[Curve]) -> Figure:
    """Above, what stays of each block; below, what cutting its MLP alone, or its heads, would lose."""
    dense, blocks = slim.architecture.dense, slim.architecture.blocks
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    (shapes, tokens), (widths, heads) = figure.subplots(2, 2)
    numbers = list(range(len(blocks)))
    shapes.bar([n - 0.2 for n in numbers], [100 * b.heads / dense.num_heads for b in blocks], 0.4, label="heads")
    shapes.bar(
        [n + 0.2 for n in numbers], [100 * b.hidden / dense.hidden for b in blocks], 0.4, label="hidden channels"
    )
    shapes.set_title("what stays, percent", fontsize=10, loc="left")
    shapes.legend(fontsize=8, frameon=False)
    tokens.step(numbers, [100 * b.keep / dense.num_tokens for b in blocks], where="mid", color=COLOURS["lowpass"])
    tokens.set_ylim(0, 105)
    tokens.set_title("image tokens passed on, percent", fontsize=10, loc="left")
    for curve in curves:
        shade = {"color": (0.04, 0.43, 0.31, 0.25 + 0.75 * curve.block / len(curves)), "linewidth": 1}
        hidden = [option for option in curve.losses.hidden if option.loss > 0]
        widths.plot([option.size for option in hidden], [option.loss for option in hidden], **shade)
        cut = [option for option in curve.losses.attention if option.loss > 0]
        heads.plot([option.heads for option in cut], [option.loss for option in cut], marker=".", **shade)
    for panel, what in ((widths, "hidden channels"), (heads, "heads")):
        panel.set_yscale("log")
        panel.set_title(f"divergence of the classes, one block's {what} cut alone", fontsize=10, loc="left")
        panel.set_xlabel(f"{what} that stay; light: bottom, dark: top")
    for panel in (shapes, tokens):
        panel.set_xlabel("block")
    for panel in (shapes, tokens, widths, heads):
        panel.spines[["top", "right"]].set_visible(False)
    return figure
