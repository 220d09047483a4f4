"""From a dense model to a slim one: `demo` and `compress`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowpass.commands.common import (
    DATA,
    MACHINE,
    RUN,
    AsJson,
    ClassesOption,
    ClassOrderOption,
    ExifOption,
    InputKey,
    PrecisionOption,
    Resume,
    Seed,
    SkipUnreadable,
    TargetKey,
    Workers,
    Yes,
    numbers,
)
from lowpass.commands.given import refuse, refuse_all_but
from lowpass.commands.start import start
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.launched import started_together

if TYPE_CHECKING:
    from lowpass.pipeline.run.recipe import Recipe

# What `compress --recipe` takes beside the file.
BESIDE_RECIPE = (
    "recipe_file", "weights", "data", "out", "resume", "ship", "dry_run", "epochs", "memory_budget", "as_json", "yes",
    "timed",
)  # fmt: skip
GOAL, MODEL, SHAPES = "How far to go (one of them)", "Model", "Shapes for the hardware"
METHOD = "Method, for experts"


def demo(
    out: Annotated[Path, typer.Option(help="Run directory, new or empty.")] = Path("runs/demo"),
    target_macs: Annotated[float, typer.Option(help="Share of the dense MACs that stays.")] = 0.5,
    seed: Seed = 0,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """All of it on the embedded digits model, in minutes.

    Compress, fine-tune, export, verify, build and time, on any machine."""
    from lowpass.api import recipe_of

    recipe = recipe_of("digits_deit", "digits", target_macs=target_macs, seed=seed)
    start(recipe, out, resume, ship=True, as_json=as_json)


def compress(
    context: typer.Context,
    target_macs: Annotated[
        float | None, typer.Option(help="Share of the dense MACs that stays, such as 0.46.", rich_help_panel=GOAL)
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="Milliseconds of one batch on --runtime (see `profile` and `forecast`).",
            rich_help_panel=GOAL,
        ),
    ] = None,
    target_throughput: Annotated[
        float | None,
        typer.Option(
            metavar="IMAGES_PER_S",
            help="Images a second on --runtime; the batch is picked along with the plan.",
            rich_help_panel=GOAL,
        ),
    ] = None,
    latency_limit: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="Of --target-throughput: milliseconds that a batch may take.",
            rich_help_panel=GOAL,
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Of these two: onnxruntime, openvino or tensorrt on this machine; or a GPU that is not here, "
            "such as forecast:a100 or forecast:l4:int8-fp16.",
            rich_help_panel=GOAL,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Images in the batch of --target-latency.", rich_help_panel=GOAL)
    ] = 1,
    precision: Annotated[
        PrecisionOption | None,
        typer.Option(help="Of --target-latency. Default: the runtime's own.", rich_help_panel=GOAL),
    ] = None,
    allowable_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of top-1 the search may cost before fine-tuning (the paper's way: 9.5).", rich_help_panel=GOAL
        ),
    ] = None,
    architecture: Annotated[
        Path | None,
        typer.Option(
            help="Skip the search: apply this architecture.json, its channels chosen by --channel-criterion.",
            rich_help_panel=GOAL,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="timm's or torchvision's name, a folder that Transformers or timm saved, hf-hub:NAME, or digits_deit.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Its checkpoint, .safetensors or .pth, whatever wraps the tensors.", rich_help_panel=MODEL),
    ] = None,
    weights_key: Annotated[
        str | None,
        typer.Option(
            help="Which of several models in it, such as state_dict_ema. Default: EMA.", rich_help_panel=MODEL
        ),
    ] = None,
    img_size: Annotated[
        str | None,
        typer.Option(
            metavar="H[xW]", help="Resample positions to this size. Default: the checkpoint's.", rich_help_panel=MODEL
        ),
    ] = None,
    in_chans: Annotated[
        int | None, typer.Option(min=1, help="Input channels. Default: the checkpoint's.", rich_help_panel=MODEL)
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Untrained, to study speed; needs --architecture.", rich_help_panel=MODEL
        ),
    ] = False,
    recipe_file: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="Everything here but --weights and --data from a file, see recipes/.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="'digits'; a folder with train/CLASS/... and val/CLASS/... (or CLASS/... alone); hfds/NAME, "
            "hfids/NAME or wds/FOLDER.",
            rich_help_panel=DATA,
        ),
    ] = None,
    classes: ClassesOption = None,
    class_order: ClassOrderOption = "natural",
    mean: Annotated[
        str | None,
        typer.Option(metavar="R,G,B", help="Of the pixels. Default: the model's own.", rich_help_panel=DATA),
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Of the pixels, likewise.", rich_help_panel=DATA)
    ] = None,
    crop_pct: Annotated[
        float | None, typer.Option(help="Share of the picture's shorter side that is seen.", rich_help_panel=DATA)
    ] = None,
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic", "lanczos"] | None,
        typer.Option(help="Of resizing.", rich_help_panel=DATA),
    ] = None,
    exif: ExifOption = False,
    skip_unreadable: SkipUnreadable = False,
    input_key: InputKey = None,
    target_key: TargetKey = None,
    score_images: Annotated[
        int, typer.Option(help="Training images for scoring and recovery.", rich_help_panel=DATA)
    ] = 2000,
    measure_images: Annotated[
        int, typer.Option(help="Training images on which a step's top-1 is measured.", rich_help_panel=DATA)
    ] = 5000,
    out: Annotated[
        Path | None, typer.Option(help="Run directory, new or empty. Default: runs/MODEL.", rich_help_panel=RUN)
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with an interrupted run; the outcome is the same.", rich_help_panel=RUN)
    ] = False,
    ship: Annotated[
        bool,
        typer.Option("--ship", help="Then fine-tune, export, verify, build and benchmark, too.", rich_help_panel=RUN),
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Of fine-tuning with --ship; 40 for the digits, 150 otherwise.", rich_help_panel=RUN),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check every input and say what it would cost; nothing is written.", rich_help_panel=RUN
        ),
    ] = False,
    timed: Annotated[
        bool,
        typer.Option(
            "--measure", help="With --dry-run: time the parts for a minute, and say hours.", rich_help_panel=RUN
        ),
    ] = False,
    yes: Yes = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn at random.", rich_help_panel=RUN)] = 0,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object, alone, on standard output.", rich_help_panel=RUN),
    ] = False,
    tune_for: Annotated[
        Literal["onnxruntime", "openvino", "tensorrt"],
        typer.Option(help="The runtime whose liking the next options default to.", rich_help_panel=SHAPES),
    ] = "tensorrt",
    align: Annotated[
        int | None,
        typer.Option(help="Hidden widths are multiples of it (tokens: of an eighth).", rich_help_panel=SHAPES),
    ] = None,
    whole_heads: Annotated[
        bool | None,
        typer.Option(
            "--whole-heads/--thin-heads",
            help="Drop heads whole, or thin them as the paper does.",
            rich_help_panel=SHAPES,
        ),
    ] = None,
    token_stages: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="How many blocks may drop tokens, evenly spread; 0: every block; auto, the default where "
            "the target is of time: as many as pay there.",
            rich_help_panel=SHAPES,
        ),
    ] = None,
    sub_blocks: Annotated[
        bool | None,
        typer.Option(
            "--sub-blocks/--no-sub-blocks",
            help="Whether a block may lose its attention or its MLP whole. Default: where the target is of time.",
            rich_help_panel=SHAPES,
        ),
    ] = None,
    token_score: Annotated[
        Literal["full", "cls"] | None,
        typer.Option(
            help="What LFE is multiplied by: the paper's attention score, or its CLS row, which fuses.",
            rich_help_panel=SHAPES,
        ),
    ] = None,
    as_published: Annotated[
        bool,
        typer.Option(
            "--as-published",
            help="The paper's own shapes: for comparison; slow to deploy.",
            rich_help_panel=SHAPES,
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images at a time in the search.", rich_help_panel=MACHINE)] = 64,
    memory_budget: Annotated[
        float,
        typer.Option(
            metavar="GIB",
            help="For the search's activations (of each process); past it they are files in the run directory.",
            rich_help_panel=MACHINE,
        ),
    ] = 8.0,
    workers: Workers = None,
    mixed_precision: Annotated[
        bool,
        typer.Option(
            "--mixed-precision",
            help="Trials in FP16 on a GPU (BF16 on a CPU); scores stay FP32.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    recovery: Annotated[
        bool,
        typer.Option(
            help="Refit what reads removed channels, in closed form, as part of every trial.", rich_help_panel=METHOD
        ),
    ] = True,
    image_cutoff: Annotated[
        float, typer.Option(help="Low-pass of the images LFS sees, in cycles per pixel.", rich_help_panel=METHOD)
    ] = 0.1,
    token_cutoff: Annotated[
        float, typer.Option(help="Low-pass along the tokens for LFE.", rich_help_panel=METHOD)
    ] = 0.85,
    energy_norm: Annotated[
        Literal["l2", "l1"],
        typer.Option(help="LFE norm: l2 is the paper's, l1 the released code's.", rich_help_panel=METHOD),
    ] = "l2",
    channel_criterion: Annotated[
        Literal["obs", "lfs", "taylor", "magnitude", "random"] | None,
        typer.Option(
            help="What channels are scored by: obs, what no refit gives back; lfs, the paper's; or a rival. "
            "[default: obs; with --as-published lfs]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    token_criterion: Annotated[
        Literal["lfe-attention", "attention", "lfe", "random"],
        typer.Option(
            help="What tokens are scored by: LFE times attention, the method, or a rival.", rich_help_panel=METHOD
        ),
    ] = "lfe-attention",
    order: Annotated[
        Literal["bottom-up", "top-down", "one-shot"],
        typer.Option(
            help="On which model a block's channels are scored: all below it cut, all above it, or none.",
            rich_help_panel=METHOD,
        ),
    ] = "bottom-up",
    prune: Annotated[
        Literal["both", "channels", "tokens"],
        typer.Option(help="Drop channels and tokens, or one of them.", rich_help_panel=METHOD),
    ] = "both",
    lfs_weight: Annotated[float, typer.Option(help="Share of the cross-entropy in LFS.", rich_help_panel=METHOD)] = 0.1,
    token_share: Annotated[
        float, typer.Option(help="Share of a block's allowance that tokens may spend.", rich_help_panel=METHOD)
    ] = 0.56,
) -> None:
    """Search a slim model (or apply a given table), and save it in a run directory.

    The shortest: lowpass compress --model NAME --weights FILE --data FOLDER --target-macs 0.5

    Several processes: `accelerate launch -m lowpass compress ...` or `torchrun -m lowpass compress ...`."""
    from lowpass.api import recipe_of
    from lowpass.pipeline.base.processes import agreed
    from lowpass.pipeline.run.recipe import read_recipe

    def asked() -> "Recipe":
        if not dry_run:
            refuse(context, ("timed",), "{} is for --dry-run")
            if not ship:
                refuse(context, ("epochs",), "{} is of fine-tuning; give --ship, too, or run `lowpass finetune` next")
        if ship and started_together() > 1:
            raise InputError("--ship takes one process: give several `compress` and `finetune`, then `export` one")
        if recipe_file is not None:
            refuse_all_but(context, BESIDE_RECIPE, "--recipe settles {}: leave it out, or change the file")
            return read_recipe(recipe_file, weights=weights, data=data)
        if model is None:
            raise InputError("give --model NAME, or --recipe FILE")
        if runtime is None:
            refuse(context, ("batch", "precision"), "{}: for --target-latency and its --runtime alone; leave that out")
        beside = {*BESIDE_RECIPE, "model", "tune_for", "as_published"} - {"weights"}
        settings = {name: value for name, value in context.params.items() if name not in beside}
        settings |= {name: numbers(f"--{name}", settings[name]) for name in ("mean", "std")}
        return recipe_of(model, data, tune_for, as_published, **settings)

    recipe = agreed(asked)
    start(recipe, out, resume, ship, epochs, as_json, memory_budget, dry_run, yes, timed)
