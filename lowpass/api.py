"""The Python API: what the commands do, as functions. `lowpass/__init__.py` lists everything there is."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lowpass.goals import cost_targets_of
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.processes import agreed
from lowpass.pipeline.base.progress import Listener, report_to
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.classes import load_classes
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.compress import compress as run_compress
from lowpass.pipeline.run.dense import has_dense
from lowpass.pipeline.run.evaluate import evaluate_run
from lowpass.pipeline.run.finetune import finetune_run
from lowpass.pipeline.run.images import DataSource
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.run.recipe import IN_MEMORY, Recipe, make_recipe
from lowpass.pipeline.search.activation_store import DEFAULT_BUDGET_GIB
from lowpass.pipeline.search.shaping import Shaping, TunedFor, make_shaping
from lowpass.pipeline.train.finetune import SAVE_MINUTES
from lowpass.pipeline.train.settings import Tracker

if TYPE_CHECKING:  # runtimes are imported once they are used
    from lowpass.benchmarks.latency.compare import Benchmark
    from lowpass.export.options import Precision
    from lowpass.export.runtimes.engine import Flavour
    from lowpass.export.runtimes.registry import RuntimeName
    from lowpass.export.triton.prepared import DeployOptions
    from lowpass.export.triton.repository import Deployed

BESIDE_SEARCH = ("model", "data", "released", "pulled")  # fields of a recipe that are arguments of their own, or none
RENAMED = {"batch": "latency_batch", "precision": "latency_precision"}  # of the command's options -> a recipe's
SETTINGS = {name for name in (*Recipe.model_fields, *Shaping.model_fields) if name not in (*BESIDE_SEARCH, "shaping")}


def compress(
    model: str | nn.Module,
    data: DataSource,
    out: Path | str,
    *,
    resume: bool = False,
    memory_budget: float = DEFAULT_BUDGET_GIB,
    tune_for: TunedFor = "tensorrt",
    as_published: bool = False,
    yes: bool = False,
    progress: Listener | None = None,
    **settings: Any,
) -> "Run":
    """Search a slim model to a target and save it in a run directory: the command `lowpass compress`. In a script that
    `torchrun` or `accelerate launch` runs, all processes call it: they share the images, and the first writes.

    Args:
        model: what `load_model` takes (with `weights=FILE`; `digits_deit` brings its own), or a plain ViT of timm,
            Transformers or torchvision in memory.
        data: `digits`, an image folder, `hfds/NAME`, `hfids/NAME` or `wds/FOLDER`; or two torch data sets or loaders
            (train, test) of (image [C, H, W] as the model takes it, label).
        out: the run directory, new or empty.
        resume: go on with an interrupted run; the outcome is the same.
        memory_budget: GiB for the search's activations, in each process; past it they are files in the run directory.
        tune_for: the runtime whose liking the shapes default to.
        as_published: the paper's own shapes and channel criterion (LFS) instead.
        yes: go on although the dense model does no better than a guess, or far better under another reading.
        progress: called with a `Step` now and then.
        settings: one of `target_macs` (a share, such as 0.46), `target_latency` (ms, with `runtime`, which may be
            `forecast:GPU`), `target_throughput` (images a second, with `latency_limit` in ms and `runtime`),
            `allowable_drop` (points of top-1) and `architecture` (a table); and any option of the command by its name,
            such as `weights`, `seed`, `score_images`, `recovery`, `align` or `sub_blocks`.

    Raises:
        InputError: some input cannot be used; nothing has been written.
        RunError: a step failed although its input was sound.

    Example:
        >>> run = compress("digits_deit", "digits", "runs/digits", target_macs=0.5)  # doctest: +SKIP
        >>> run.metrics.slim.macs / run.metrics.dense.macs  # doctest: +SKIP
        0.4996...
    """
    recipe = recipe_of(model, data, tune_for, as_published, **settings)
    with report_to(progress):
        run_recipe(recipe, _given(out, "out"), resume, memory_budget, model, data, yes)
    return Run(out, data if isinstance(data, tuple) else None, progress)


def recipe_of(
    model: str | nn.Module,
    data: DataSource,
    tune_for: TunedFor = "tensorrt",
    as_published: bool = False,
    **settings: Any,
) -> Recipe:
    """The recipe that arguments of `compress` amount to; settings that are None are left at their defaults.

    Raises:
        InputError: a setting is unknown or out of range.
    """
    settings = {RENAMED.get(name, name): value for name, value in settings.items()}
    for name in settings.keys() - SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        raise InputError(f"there is no setting {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    shapes = {name: settings.pop(name) for name in Shaping.model_fields if name in settings}
    given = {name: value for name, value in settings.items() if value is not None}
    if as_published:
        given.setdefault("channel_criterion", "lfs")
    elif "runtime" in given:
        # Where time is what is saved, a part costs more than its arithmetic, and a stage of tokens costs something.
        given.setdefault("sub_blocks", given.get("prune") != "tokens")
        shapes["token_stages"] = "auto" if shapes.get("token_stages") is None else shapes["token_stages"]
    return make_recipe(
        model=model if isinstance(model, str) else name_of(model),
        data=IN_MEMORY if isinstance(data, tuple) else data,
        shaping=make_shaping(tune_for, as_published, **shapes),
        **given,
    )


def name_of(model: nn.Module) -> str:
    """timm's name of a model in memory, or its class's."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def run_recipe(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    memory_budget: float = DEFAULT_BUDGET_GIB,
    model: str | nn.Module | None = None,
    data: DataSource = None,
    yes: bool = False,
) -> Metrics:
    """A recipe from start to end; `model` and `data` where they are in memory. `yes`: go on with a dense model that is
    suspiciously bad.

    Raises:
        InputError, RunError: see `compress`.
    """
    return run_compress(
        recipe,
        out,
        resume,
        agreed(lambda: cost_targets_of(recipe)),
        memory_budget,
        model=model if isinstance(model, nn.Module) else None,
        data=data if isinstance(data, tuple) else None,
        check=not yes,
    )


def _given(path: Path | str, what: str) -> Path:
    """A path that names something: an empty one would be the present folder.

    Raises:
        InputError: it is empty.
    """
    if path == "":
        raise InputError(f"{what} is empty; give a folder")
    return Path(path)


class Run:
    """A run directory: what `compress` or a command made, and what can be done with it.

    Example:
        >>> run = Run("runs/digits")  # doctest: +SKIP
        >>> logits = run.slim(images)  # doctest: +SKIP
    """

    def __init__(self, path: Path | str, data: DataSource = None, progress: Listener | None = None) -> None:
        """Open a run; `data` is used in place of the run's own images, `progress` is told of long work.

        Raises:
            InputError: there is no run at `path`.
        """
        self.path, self.data, self.progress = _given(path, "path"), data, progress
        Recipe.load(self.path)

    @property
    def recipe(self) -> Recipe:
        """What was asked for."""
        return Recipe.load(self.path)

    @property
    def slim(self) -> SlimViT:
        """The slim model, images [B, C, H, W] -> logits [B, classes], on the CPU in evaluation mode."""
        return SlimViT.load(self.path)

    @property
    def dense(self) -> SlimViT | None:
        """The model it came from; None of a run that was imported without it."""
        return SlimViT.load(self.path, DENSE_WEIGHTS_FILE) if has_dense(self.path) else None

    @property
    def architecture(self) -> Architecture:
        """The table of five numbers a block, and what the dense model was."""
        return self.slim.architecture

    @property
    def metrics(self) -> Metrics:
        """Top-1 (percent), MACs, parameters and bytes of `dense` and `slim`."""
        return Metrics.load(self.path)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the logits."""
        return load_classes(self.path, self.architecture.dense.num_classes)

    def finetune(
        self,
        data: DataSource = None,
        *,
        seed: int | None = None,
        resume: bool = False,
        restart: bool = False,
        save_minutes: float = SAVE_MINUTES,
        track: Tracker | None = None,
        yes: bool = False,
        **settings: Any,
    ) -> Metrics:
        """Distil the dense model (or `teacher`) into the slim one, which takes its place: `epochs`, `lr`, `batch_size`,
        `distill_weight`, `token_distillation`, `mixed_precision` and so on as `settings`.

        `resume` goes on with a training that was interrupted, begins one where none was, and leaves one alone that has
        ended; `restart` begins from the searched weights. Within an epoch the state is saved every `save_minutes`.
        `track`: `tensorboard`, `wandb` or `mlflow` are told of each epoch, too. `yes`: go on although the dense model
        is suspiciously bad on `data`, where those are other images than the run's.

        Raises:
            InputError: a setting is out of range, the data does not fit, or an interrupted training is in the way.
            RunError: training diverged, or its state cannot be saved; the run is as it was.
        """
        with report_to(self.progress):
            source = data or self.data
            return finetune_run(self.path, source, settings, seed, resume, restart, save_minutes, track, not yes)

    def evaluate(self, data: DataSource = None) -> Metrics:
        """Top-1 of dense and slim on the test images of `data`; nothing is written.

        Raises:
            InputError: the data does not fit.
        """
        with report_to(self.progress):
            return evaluate_run(self.path, data or self.data)

    def export(
        self,
        precision: "Precision" = "fp32",
        *,
        dense: bool = False,
        batch: str = "1:8:32",
        selection: Literal["gather", "onehot"] = "gather",
        input: Literal["float32", "uint8"] = "float32",
        opset: int = 23,
        keep_fp32: Sequence[str] = (),
        format: Literal["onnx", "optimum", "torch-export"] = "onnx",
        data: DataSource = None,
    ) -> Path:
        """Write `model.<precision>.onnx` (or `dense.<precision>.onnx`), once it agrees with PyTorch on real images.

        Args:
            precision: `fp32`, `fp16`, `bf16` or `int8`.
            dense: the dense model, for comparison.
            batch: MIN:OPT:MAX, the batch sizes that an engine will be built for.
            selection: how token selection is lowered.
            input: normalised images [B, C, H, W], or pixels [B, H, W, C] that are normalised in the graph.
            opset: of ONNX, 17 to 23; below 23 attention is written out, for runtimes that do not read the newest.
            keep_fp32: layers of an FP16 file that stay FP32, such as `blocks.3.mlp.fc1`; where few overflow, they do so
                unasked.
            format: `optimum` writes the folder `model.<precision>.optimum` as well, which Hugging Face's Optimum opens;
                `torch-export` writes `model.fp32.pt2` instead, which plain PyTorch loads; it has no other options.
            data: images to verify on, and to quantise by; None: the run's own.

        Returns:
            The file, or the folder for Optimum.

        Raises:
            InputError: the run holds no such model, or an option is out of range.
            RunError: the file disagrees with PyTorch, or would overflow in FP16; it is not written.
        """
        from lowpass.export.artefacts import export_run, exported_path
        from lowpass.export.options import export_options

        options = export_options(precision, batch, selection, input, opset, keep_fp32, format)
        with report_to(self.progress):
            export_run(self.path, options, data or self.data, dense)
        return exported_path(self.path, options, dense)

    def export_all(self) -> None:
        """Both models in every precision, verified, and the slim model's engine where TensorRT is installed: what
        `compress --ship` makes.

        Raises:
            RunError: a file disagrees with PyTorch, or the engine does not build.
        """
        from lowpass.export.artefacts import export_all

        with report_to(self.progress):
            export_all(self.path, self.data)

    def build(self, precision: "Precision" = "fp16", runtime: "Flavour | None" = None, dense: bool = False) -> Path:
        """Compile what `export` wrote; the TensorRT engine's path. TensorRT-RTX needs no GPU for it.

        Raises:
            InputError: no TensorRT is installed, or nothing was exported.
            RunError: the builder refused the graph.
        """
        from lowpass.export.tensorrt.plan import build

        return build(self.path, precision, runtime, dense)

    def benchmark(
        self,
        runtimes: "Sequence[RuntimeName] | None" = None,
        batches: Sequence[int] = (1, 8, 32),
        precision: "Precision | None" = None,
        seconds: float = 2.0,
    ) -> "Benchmark":
        """Time slim against dense in interleaved rounds; writes `benchmark.json` and `benchmark.md`.

        Args:
            runtimes: None for all that are here.
            batches: images at once.
            precision: None for each runtime's own.
            seconds: about how long each model is timed for at each batch size.

        Raises:
            InputError: the run is not finished.
        """
        from lowpass.benchmarks.latency.compare import benchmark

        with report_to(self.progress):
            return benchmark(self.path, runtimes, batches, precision, seconds)

    def deploy(
        self,
        repository: Path | str,
        name: str | None = None,
        options: "DeployOptions | None" = None,
        dense: bool = False,
    ) -> "Deployed":
        """Add what `export` wrote to a Triton model repository as a new version.

        Args:
            repository: a folder; made if missing.
            name: what clients call the model; None: the run's name.
            options: how to serve it.
            dense: the dense model, for comparison.

        Raises:
            InputError: nothing current is exported, or the version exists.
            RunError: ONNX Runtime cannot load the file.
        """
        from lowpass.export.triton.prepared import DeployOptions
        from lowpass.export.triton.repository import deploy

        name = self.path.absolute().name if name is None else name
        return deploy(self.path, _given(repository, "repository"), name, options or DeployOptions(), dense)

    def publishable(self, name: str = "", license: str | None = None) -> SlimViT:
        """The slim model with its classes' names and a model card made of the run, for `save_pretrained(folder)` and
        `push_to_hub(name)`.

        Args:
            name: what the card says to load the model by, such as `someone/some-model`.
            license: of the source model, as the hub abbreviates it; None: what its source says, if it says any.

        Raises:
            InputError: the run is not finished.
        """
        from lowpass.report.card import publishable

        return publishable(self.path, name, license)

    def report(self, compare: Sequence[Path | str] = (), data: DataSource = None, images: int | None = None) -> Path:
        """Write `report.html`, one page that shows everything of the run, and give its path.

        Args:
            compare: other runs to put beside it.
            data: test images to show and to measure on; None: the run's own. Where those are gone, the page says so.
            images: how many of them to measure on, at most; None: as many as a minute allows.

        Raises:
            InputError: there is no finished run, here or in `compare`, or `data` cannot be used.
        """
        from lowpass.report.page import write_report

        with report_to(self.progress):
            return write_report(self.path, data or self.data, [Path(other) for other in compare], images)
