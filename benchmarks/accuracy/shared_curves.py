"""What one search found out about the dense model, for another that would find the same: loss curves hang on neither
the target nor what else is pruned."""

import json
from pathlib import Path
from typing import Any

from lowpass.pipeline.base.files import write_text
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.search.log import SEARCH_FILE
from lowpass.pipeline.search.log_entries import Curve

# What the curves of one kind of part do not hang on.
UNRELATED = {
    "channels": {"target_macs", "prune", "token_criterion", "token_cutoff", "energy_norm"},
    "tokens": {"target_macs", "prune", "channel_criterion", "lfs_weight", "image_cutoff", "recovery"},
}


def share_curves(directory: Path, recipe: Recipe) -> None:
    """Begin a run with the loss curves of the dense model from runs of the same seed beside it, where they hold them
    all: channels and tokens may come from two of them."""
    if directory.exists():
        return
    wanted = ("channels", "tokens") if recipe.prune == "both" else (recipe.prune,)
    found: dict[str, tuple[str, list[Curve]]] = {}
    for log in sorted(directory.parent.glob(f"*-seed{recipe.seed}/{SEARCH_FILE}")):
        missing = [kind for kind in wanted if kind not in found]
        if not missing:
            break
        other = Recipe.load(log.parent)
        for kind in missing:
            if other.prune in (kind, recipe.prune) and _relevant(other, kind) == _relevant(recipe, kind):
                known = _curves(log)
                if known is not None:
                    found[kind] = known
    if len(found) < len(wanted) or len({header for header, _ in found.values()}) > 1:
        return
    header, channels = found[wanted[0]]
    _, tokens = found[wanted[-1]]
    merged = [
        one.model_copy(update={"losses": one.losses.model_copy(update={"tokens": two.losses.tokens})})
        for one, two in zip(channels, tokens, strict=True)
    ]
    recipe.save(directory)
    write_text(directory / SEARCH_FILE, "\n".join([header, *(curve.model_dump_json() for curve in merged)]) + "\n")


def _relevant(recipe: Recipe, kind: str) -> dict[str, Any]:
    fields = recipe.model_dump(mode="json", exclude=UNRELATED[kind])
    for name in ("token_score", "token_stages") if kind == "channels" else ("whole_heads",):
        del fields["shaping"][name]
    return fields


def _curves(log: Path) -> tuple[str, list[Curve]] | None:
    """The log's header and curves; None unless it has them all: then a plan was made."""
    header, *lines = log.read_text().splitlines()
    curves = [Curve.model_validate_json(line) for line in lines if json.loads(line)["kind"] == "curve"]
    return (header, curves) if any(json.loads(line)["kind"] == "plan" for line in lines) else None
