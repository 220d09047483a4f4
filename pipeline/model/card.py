"""The model card of a slim model: what it is, what was measured of it and how, and how it is used."""

from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import ModelCardData

from lowpass.pipeline.base.version import __version__
from lowpass.pipeline.model.architecture import Architecture

CARD_FILE = "README.md"  # which hubs show
LISTED_CLASSES = 20  # in the text, at most


@dataclass(frozen=True)
class Figure:
    """One row of the card's figures: dense and slim as they are printed, and how they were come by."""

    what: str
    dense: str
    slim: str
    provenance: str


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the architecture; what is empty or None is not known, and the card says so.

    `name`: what `from_pretrained` finds the model by. `source`: the dense model and its weights; `base_model`: its name
    on the hub. `licence`: of the source model, as the hub abbreviates it; `licence_from`: who says so. `figures` were
    measured. `making`: lines on how the model was made.
    """

    name: str = ""
    source: str = ""
    base_model: str | None = None
    licence: str | None = None
    licence_from: str = ""
    figures: tuple[Figure, ...] = ()
    making: tuple[str, ...] = ()


def model_card(architecture: Architecture, classes: Sequence[str] | None, facts: CardFacts) -> str:
    """The whole card, with the metadata that a hub reads; the same arguments give the same text."""
    data = ModelCardData(
        license=facts.licence,
        library_name="lowpass",
        pipeline_tag="image-classification",
        base_model=facts.base_model,
        tags=["vision-transformer", "pruning", "vtc-lfc"],
    )
    dense = architecture.dense
    share = architecture.macs() / _dense_macs(architecture)
    sections = (
        f"---\n{data.to_yaml()}\n---\n",
        f"# {dense.name}, slim\n",
        f"A vision transformer that classifies images, cut to {100 * share:.1f}% of its multiply-accumulates (MACs) by "
        f"lowpass {__version__}, after VTC-LFC (Wang et al., NeurIPS 2022).\n",
        _figures(architecture, facts.figures),
        _use(architecture, classes, facts.name),
        _making(facts),
        _limits(architecture),
        _licence(facts),
        _table(architecture),
    )
    return "\n".join(sections)


def _dense_macs(architecture: Architecture) -> int:
    return architecture.model_copy(update={"blocks": architecture.dense.blocks()}).macs()


def _figures(architecture: Architecture, measured: Sequence[Figure]) -> str:
    macs = Figure(
        "MACs an image",
        f"{_dense_macs(architecture):,}",
        f"{architecture.macs():,}",
        "counted: every matrix product and the patch convolution",
    )
    rows = [f"| {row.what} | {row.dense} | {row.slim} | {row.provenance} |" for row in (*measured, macs)]
    missing = "" if measured else "\nNothing of this model was measured where it was saved: no top-1, no latency.\n"
    return "\n".join(["## Figures\n", "| | dense | slim | how |", "|---|--:|--:|---|", *rows, missing])


def _use(architecture: Architecture, classes: Sequence[str] | None, name: str) -> str:
    dense, prep = architecture.dense, architecture.preprocessing
    height, width = dense.img_size
    names = "their names are not known"
    if classes:
        names = "`slim.classes` names them" + (f": {', '.join(classes)}" if len(classes) <= LISTED_CLASSES else "")
    return f"""## How to use it

```python
import lowpass

slim = lowpass.SlimViT.from_pretrained({(name or "FOLDER-OR-NAME")!r})
logits = slim(images)  # [B, {dense.in_chans}, {height}, {width}] -> [B, {dense.num_classes}]
```

- Images: {prep.interpolation} resizing, crop {prep.crop_pct:g} ({prep.crop_mode}), values from 0 to 1, less the mean
  {_numbers(prep.mean)}, over the deviation {_numbers(prep.std)}.
- Logits: {dense.num_classes} classes; {names}.
- `slim.safetensors` holds the weights, `architecture.json` everything else. Nothing is unpickled.
- `lowpass pull NAME --out DIR` makes a run directory of it, to export, build, benchmark and serve.

## Intended use

What the dense model is for, at less cost: to tell which of its {dense.num_classes} classes an image is of.
"""


def _making(facts: CardFacts) -> str:
    lines = [f"- {line}" for line in facts.making] or ["- Not known: the model was saved without its run."]
    return "\n".join(["## How it was made\n", *lines, ""])


def _limits(architecture: Architecture) -> str:
    dense = architecture.dense
    dropped = architecture.blocks[-1].keep < dense.num_tokens
    last = "\n- It drops image tokens on the way: it is no backbone for detection or segmentation." if dropped else ""
    return f"""## Limits

- It knows {dense.num_classes} classes and names one for any image, also for one that shows none of them.
- What the dense model gets wrong, and the bias of the images it learned from, the slim one has as well.
- Top-1 is an average. Classes need not lose alike: measure those that matter to you.
- Figures hold for the images and the machine they name, and for no others.{last}
"""


def _licence(facts: CardFacts) -> str:
    source = facts.source or "not known"
    said = f"{facts.licence}, says {facts.licence_from}" if facts.licence else "not known"
    return f"""## Licence

- Source model: {source}.
- Its licence: {said}. A slim model is made from its source's weights: the same terms bind it.
"""


def _table(architecture: Architecture) -> str:
    rows = [
        f"| {index} | {shape.heads} | {shape.qk_dim} | {shape.v_dim} | {shape.hidden} | {shape.keep} |"
        for index, shape in enumerate(architecture.blocks)
    ]
    head = "| block | heads | query/key size | value size | hidden width | image tokens kept |"
    return "\n".join(["## Architecture\n", head, "|--:|--:|--:|--:|--:|--:|", *rows, ""])


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
