"""A recipe, run or estimated, as `compress` and `demo` ask for it."""

from pathlib import Path
from typing import TYPE_CHECKING

from lowpass.commands.common import answer, say
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.launched import is_first

if TYPE_CHECKING:
    from lowpass.pipeline.run.recipe import Recipe


def start(
    recipe: "Recipe",
    out: Path | None,
    resume: bool,
    ship: bool,
    epochs: int | None = None,
    as_json: bool = False,
    memory_budget: float = 8.0,
    dry_run: bool = False,
    yes: bool = False,
    timed: bool = False,
) -> None:
    """Compress, or say what that would take; with `ship` take the result all the way to timed engines."""
    from lowpass.api import Run, run_recipe
    from lowpass.goals import cost_targets_of
    from lowpass.pipeline.run.dry_run import dry_run as estimated
    from lowpass.pipeline.run.estimate import as_table

    out = out or Path("runs") / Path(recipe.model.rpartition(":")[2]).name
    if dry_run and not is_first():
        return
    if dry_run:
        cost_targets_of(recipe)  # refuses a runtime that is not here
        estimate = estimated(recipe, out, resume, epochs, memory_budget, check=not yes, timed=timed)
        say(estimate.model_dump(mode="json"), as_table(estimate), as_json)
        return
    wanted = recipe.finetune.teacher_weights if ship and recipe.finetune is not None else None
    if wanted is not None and not wanted.is_file():  # not after a search of hours
        raise InputError(f"{wanted}, the teacher's weights of the recipe, is no file")
    metrics, measured = run_recipe(recipe, out, resume, memory_budget, yes=yes), None
    if ship:
        run = Run(out)
        if recipe.data is not None and not metrics.finetuned_epochs:
            metrics = run.finetune(resume=resume) if epochs is None else run.finetune(resume=resume, epochs=epochs)
        run.export_all()
        measured = run.benchmark()
    if is_first():
        answer(out, metrics, measured, as_json)
