"""What the accuracy benchmark compares: studies, each a list of variants that differ in one thing."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowpass.pipeline.search.shaping import AS_PUBLISHED, SHAPINGS, Shaping

EVIT = AS_PUBLISHED.model_copy(update={"token_score": "cls"})  # CLS attention alone is EViT's score


@dataclass(frozen=True)
class Variant:
    """One line of a table. `recipe` is what it changes of the study's recipe; `amounts_of` names the variant whose
    table of shapes it takes over, so that which channels and tokens stay is all that differs."""

    name: str
    group: str
    recipe: Mapping[str, object] = field(default_factory=dict)
    amounts_of: str | None = None


@dataclass(frozen=True)
class Study:
    """`recipe` holds for every variant; `epochs` of fine-tuning, None for what suits the data."""

    title: str
    recipe: Mapping[str, object]
    targets: tuple[float, ...]
    epochs: int | None
    variants: tuple[Variant, ...]

    def variant(self, name: str) -> Variant:
        """By name."""
        return next(variant for variant in self.variants if variant.name == name)


def _deployed(name: str, shaping: Shaping, recovery: bool) -> Variant:
    return Variant(name, "searched to a target", {"shaping": shaping, "recovery": recovery})


def _channels(criterion: str) -> Variant:
    return Variant(criterion, "channels only", {"channel_criterion": criterion, "prune": "channels"})


def _tokens(criterion: str, shaping: Shaping = AS_PUBLISHED) -> Variant:
    return Variant(
        f"{criterion} tokens", "tokens only", {"token_criterion": criterion, "prune": "tokens", "shaping": shaping}
    )


def _both(channels: str, tokens: str, shaping: Shaping = AS_PUBLISHED) -> Variant:
    settings = {"channel_criterion": channels, "token_criterion": tokens, "shaping": shaping}
    return Variant(f"{channels} + {tokens}", "channels and tokens", settings)


METHOD = _both("lfs", "lfe-attention")


def _setting(group: str, name: str, **changes: object) -> Variant:
    return Variant(name, group, {**METHOD.recipe, **changes}, amounts_of=METHOD.name)


# The paper's own shapes, and nothing refitted: recovery would hide what a criterion lost.
PAPER = {"shaping": AS_PUBLISHED, "recovery": False, "score_images": 192, "measure_images": 64}
STUDIES = {
    "recovery": Study(
        "with and without recovery",
        {},
        targets=(0.8, 0.5, 0.4),
        epochs=None,
        variants=(
            _deployed("lowpass", SHAPINGS["tensorrt"], recovery=True),
            _deployed("no-recovery", SHAPINGS["tensorrt"], recovery=False),
            _deployed("full-score", SHAPINGS["tensorrt"].model_copy(update={"token_score": "full"}), recovery=True),
            _deployed("as-published", AS_PUBLISHED, recovery=True),
        ),
    ),
    "criteria": Study(
        "criteria for channels and tokens",
        PAPER,
        targets=(0.7, 0.55, 0.4),
        epochs=2,
        variants=(
            *(_channels(criterion) for criterion in ("lfs", "taylor", "magnitude", "random")),
            _tokens("lfe-attention"),
            _tokens("attention", EVIT),
            _tokens("lfe"),
            _tokens("random"),
            METHOD,
            _both("taylor", "attention", EVIT),
            _both("random", "random"),
        ),
    ),
    # What a criterion must foresee is what is lost behind recovery, in the shapes that deploy.
    "ranked": Study(
        "criteria for channels, behind recovery",
        {"shaping": SHAPINGS["tensorrt"].model_copy(update={"align": 16}), "score_images": 512},
        targets=(0.5, 0.35, 0.25),
        epochs=2,
        variants=tuple(_channels(criterion) for criterion in ("obs", "lfs", "taylor", "magnitude")),
    ),
    "parts": Study(
        "whole parts of blocks may go, or not",
        {"shaping": SHAPINGS["tensorrt"]},
        targets=(0.5, 0.35, 0.2),
        epochs=None,
        variants=(
            Variant("no-sub-blocks", "searched to a target", {"sub_blocks": False}),
            Variant("sub-blocks", "searched to a target", {"sub_blocks": True}),
        ),
    ),
    "settings": Study(
        "order and settings of the method",
        PAPER,
        targets=(0.55,),
        epochs=2,
        variants=(
            METHOD,
            _setting("order", "top-down", order="top-down"),
            _setting("order", "one-shot", order="one-shot"),
            *(_setting("image cutoff", f"image cutoff {cutoff}", image_cutoff=cutoff) for cutoff in (0.05, 0.25, 0.5)),
            *(_setting("token cutoff", f"token cutoff {cutoff}", token_cutoff=cutoff) for cutoff in (0.5, 0.95)),
            _setting("LFE norm", "LFE norm l1", energy_norm="l1"),
            *(_setting("w of LFS", f"w = {weight:g}", lfs_weight=weight) for weight in (0.0, 1.0)),
        ),
    ),
}
