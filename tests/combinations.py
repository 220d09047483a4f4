"""Random combinations of models, files, folders and options, each taken or refused in a sentence, never a traceback.

As a script: `python tests/combinations.py --seed 15 --minutes 60` tries as many as that time allows, and says how many.
"""

import argparse
import contextlib
import faulthandler
import io
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from test_checkpoints import WRAPPED, sharded
from test_ends import TO_TORCHVISION, digits_of_transformers, renamed
from test_trials import W, scenes
from written import tables, write_parquet, write_shards

from lowpass.cli import main

DIGITS = list("0123456789")
Things = dict[str, list[str]]
T = TypeVar("T")
USUAL = 0.8  # of the draws are of what is sound
REAL = 0.15  # of what a dry run takes is run
IMPORTS = 0.15  # of all are of `import-vtc`
OF_IMPORTS = ("--class-order", "--mean", "--std", "--crop-pct", "--interpolation", "--input-key", "--target-key")


def make_things(root: Path) -> Things:
    """What options may name: `model`, `weights`, `data` and `classes`."""
    makers = {"model": make_models, "weights": make_weights, "data": make_data, "classes": make_classes}
    made = {what: make(root) for what, make in makers.items()}
    sound = [path for path in made["weights"] if Path(path).name in ("bare.pth", "more.pth")]
    return made | {"released": [*sound, str(Path(__file__).parent / "data" / "checkpoint.pth"), *made["weights"]]}


def make_weights(root: Path) -> list[str]:
    """Checkpoints, the sound ones first."""
    sound: dict[str, Any] = {
        name: WRAPPED[name]
        for name in (
            *("bare", "EMA beside noise", "both in one table", "Lightning", "student alone", "a head of another name"),
            "blocks compiled, sharded and checkpointed one by one",
        )
    }
    odd: dict[str, Any] = {
        "list": [1, 2],
        "empty": {},
        "grey": W | {"patch_embed.proj.weight": W["patch_embed.proj.weight"][:, :1]},
        "small": W | {"pos_embed": W["pos_embed"][:, :37]},
        "odd": W | {"pos_embed": W["pos_embed"][:, :51]},
        "more": W | {"head.weight": torch.randn(12, 96), "head.bias": torch.zeros(12)},
        "scalar": W | {"head.weight": torch.tensor(1.0)},
        "torchvision": renamed(TO_TORCHVISION, "encoder.ln"),
        "two heads": {f"backbone.{name}": tensor for name, tensor in W.items()} | {"head.weight": W["head.weight"]},
        "LoRA": W | {"blocks.0.attn.qkv.lora_A": torch.ones(8, 96)},
        "sparse": W | {"norm.bias": W["norm.bias"].to_sparse()},
        "integers": {name: tensor.long() for name, tensor in W.items()},
    }
    for name, content in (sound | odd).items():
        torch.save(content, root / f"{name}.pth")
    save_file({f"module.{name}": tensor for name, tensor in W.items()}, root / "ddp.safetensors")
    (root / "text.safetensors").write_text("not weights")
    np.savez(root / "google.npz", cls=np.ones(3))
    (root / "index").mkdir()
    return [
        *(str(root / f"{name}.pth") for name in sound),
        str(root / "ddp.safetensors"),
        str(sharded(root / "index")),
        *(str(root / f"{name}.pth") for name in odd),
        *(str(root / name) for name in ("text.safetensors", "google.npz", "none.pth", "")),
    ]


def make_models(root: Path) -> list[str]:
    """Names and folders of models, the sound ones first."""
    digits_of_transformers().save_pretrained(root / "transformers")  # type: ignore[operator]
    shutil.copytree(root / "transformers", root / "broken")
    (root / "broken" / "config.json").write_text('{"model_type": "vit", "hidden_size": 96}')
    folders = [str(root / name) for name in ("transformers", "broken", "nowhere/at/all")]
    names = ["vit_b_16", "resnet18", "swin_tiny_patch4_window7_224", "?", "digits_deit.no_tag"]
    return ["digits_deit", f"local-dir:{root / 'transformers'}", *folders, *names]


def make_data(root: Path) -> list[str]:
    """Data sets of every kind, the sound ones first."""
    good = scenes(root / "good", DIGITS, 40, 40)
    shards = [write_shards(root / name, (40, 40), 3, name == "described") for name in ("described", "plain")]
    fields = write_shards(root / "fields", (40, 40), 3, json_labels=True)
    cut = write_shards(root / "cut", (40, 40), 3) / "digits-validation-0001.tar"
    cut.write_bytes(cut.read_bytes()[:5000])
    parquet, saved = write_parquet(root / "parquet", (40, 40), 3, DIGITS), root / "saved"
    datasets.DatasetDict(zip(("train", "test"), tables((40, 40), DIGITS), strict=True)).save_to_disk(str(saved))
    numbered = write_parquet(root / "numbered", (40, 40), 3)
    names = [f"class{digit}" for digit in range(1, 11)]
    broken = scenes(root / "unreadable", DIGITS, 40, 40)
    for file in sorted(broken.rglob("*.png"))[::7]:
        file.write_bytes(file.read_bytes()[:99])
    (root / "single" / "a").mkdir(parents=True)
    Image.new("L", (3, 900)).save(root / "single" / "a" / "x.png")
    (root / "loose").mkdir()
    Image.new("RGB", (9, 9)).save(root / "loose" / "x.png")
    (root / "nothing").mkdir()
    folders = {
        "valid": scenes(root / "valid", DIGITS, 60, 60, ("train", "VALID")),
        "named": scenes(root / "named", names, 60, 60),
        "holdout": scenes(root / "holdout", DIGITS, 30, 30, ("train", "holdout")),
        "sets": scenes(root / "sets", DIGITS, 30, 30, ("training_set", "test_set")),
        "accents": scenes(root / "accents", [f"e\u0301{digit}" for digit in DIGITS], 60, 60),
        "three": scenes(root / "three", [*"012", *("012" * 3)][:10], 30, 30),
    }
    return [
        *("digits", str(good), str(folders["valid"]), str(folders["named"])),
        *(f"wds/{path}" for path in (*shards, fields)),
        *(f"{reader}/{path}" for reader in ("hfds", "hfids") for path in (parquet, saved, numbered)),
        *(f"{reader}/{path}" for reader in ("wds", "hfids") for path in (good, root / "nothing", root / "none")),
        *(f"wds/{cut.parent}", "wds/", "hfids/", "hfds/", "", str(folders["holdout"]), str(folders["three"])),
        *(str(folders["sets"]), str(folders["accents"])),
        *map(str, (broken, root / "single", root / "loose", root / "nothing", root / "none")),
    ]


def make_classes(root: Path) -> list[str]:
    """Files of class names, the sound ones first."""
    (root / "names.txt").write_text("\n".join(DIGITS))
    (root / "sorted.txt").write_text("\n".join(sorted(f"class{digit}" for digit in range(1, 11))))
    (root / "wide.txt").write_bytes("\r\n".join(DIGITS).encode("utf-16"))
    (root / "twice.txt").write_text("\n".join("0012345678"))
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    return [str(root / name) for name in ("names.txt", "sorted.txt", "wide.txt", "twice.txt", "binary.txt", "none.txt")]


OPTIONS: dict[str, list[str]] = {
    "--weights-key": ["state_dict_ema", "model", "teacher", "nothing", "", "?"],
    "--img-size": ["32", "24", "48", "16x64", "31", "0", "x", "-1", "99999999"],
    "--in-chans": ["3", "1", "5"],
    "--mean": ["0.5,0.5,0.5", "0.485,0.456,0.406", "0.5", "a", "", "nan,nan,nan", "1e308,1,1"],
    "--std": ["0.5,0.5,0.5", "0,0,0", "-1,1,1", "inf,1,1"],
    "--crop-pct": ["1", "0.5", "0", "2", "nan", "1e-9"],
    "--interpolation": ["bilinear", "lanczos"],
    "--class-order": ["plain", "natural"],
    "--input-key": ["picture", "png", "jpg;png", ""],
    "--target-key": ["digit", "cls", "label"],
    "--score-images": ["1", "3", "5", "100000"],
    "--measure-images": ["1", "100"],
    "--batch-size": ["1", "1000"],
    "--seed": ["0", "7"],
    "--token-score": ["full", "cls"],
    "--memory-budget": ["0", "0.001"],
}
FLAGS = ["--exif", "--skip-unreadable", "--yes", "--thin-heads", "--as-published", "--no-recovery"]
GOALS = [
    *(["--target-macs", share] for share in ("0.5", "0.7", "0.9")),
    *(["--allowable-drop", "5"], ["--target-macs", "0.001"], ["--target-macs", "1.5"]),
]


def usual(draw: random.Random, values: list[T]) -> T:
    """Mostly one of the first half, where the sound ones are."""
    return draw.choice(values[: (len(values) + 1) // 2] if draw.random() < USUAL else values)


def drawn(things: Things, draw: random.Random) -> list[str]:
    """The words of a `compress`, but for `--out`."""
    words = ["compress", "--model", "digits_deit" if draw.random() < USUAL else draw.choice(things["model"])]
    if draw.random() < 0.6:
        words += ["--weights", usual(draw, things["weights"])]
    words += ["--data", usual(draw, things["data"]), *usual(draw, GOALS)]
    if draw.random() < 0.2:
        words += ["--classes", usual(draw, things["classes"])]
    for option in draw.sample(sorted(OPTIONS), draw.randint(0, 4)):
        words += [option, usual(draw, OPTIONS[option])]
    return [*words, *draw.sample(FLAGS, draw.randint(0, 2)), "--workers", draw.choice(["0", "0", "0", "2"])]


def import_drawn(things: Things, draw: random.Random) -> list[str]:
    """The words of an `import-vtc`, but for `--out`."""
    words = [
        "import-vtc",
        usual(draw, things["released"]),
        "--qk-scale",
        usual(draw, ["0.1767767", "0.25", "0", "nan"]),
    ]
    if draw.random() < 0.8:
        words += ["--data", usual(draw, things["data"])]
    if draw.random() < 0.3:
        words += ["--classes", usual(draw, things["classes"])]
    if draw.random() < 0.2:
        words += ["--dense", usual(draw, things["released"])]
    options = [option for option in sorted(OPTIONS) if option in OF_IMPORTS]
    for option in draw.sample(options, draw.randint(0, 4)):
        words += [option, usual(draw, OPTIONS[option])]
    return [*words, *draw.sample(["--exif", "--skip-unreadable", "--yes"], draw.randint(0, 2)), "--workers", "0"]


def ended(words: list[str]) -> tuple[int, str]:
    """The exit code of a command, and what it said.

    Raises:
        AssertionError: it ended otherwise than done, refused, or failed with a reason.
    """
    said = io.StringIO()
    code: Any = None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code
    text = said.getvalue()
    assert code in (0, 1, 2) and "Traceback" not in text and "this should not happen" not in text, (words, code, text)
    return code, text


def tried(things: Things, draw: random.Random, root: Path) -> str:
    """One combination; how it ended. What a dry run takes is done now and then, and gone on with."""
    out = root / "run"
    if is_import := draw.random() < IMPORTS:
        words = [*import_drawn(things, draw), "--out", str(out)]
    else:
        words = [*drawn(things, draw), "--out", str(out)]
        code, said = ended([*words, "--dry-run"])
        assert code != 1 and not out.exists(), (words, said)
        if code or draw.random() > REAL:
            return "refused" if code else "taken"
        words += ["--score-images", "16", "--measure-images", "16"]
    code, said = ended(words)
    assert code != 1 and (not code or not (out / "recipe.yaml").exists()), (words, said)
    if code:
        return "import refused" if is_import else "refused by its run"
    other = draw.choice([[], ["--data", draw.choice(things["data"])]])
    ended(["evaluate", str(out), *other])
    ended(["finetune", str(out), *other, "--epochs", "1"])
    return "imported" if is_import else "run"


def try_for(minutes: float, seed: int) -> int:
    """Try combinations for so long, and say how they ended; how many failed."""
    results, end, number = Counter[str](), time.monotonic() + 60 * minutes, 0
    with tempfile.TemporaryDirectory() as folder:
        things = make_things(Path(folder))
        while time.monotonic() < end:
            with tempfile.TemporaryDirectory() as place:
                try:
                    results[tried(things, random.Random(f"{seed}/{number}"), Path(place))] += 1
                except BaseException:
                    results["FAILED"] += 1
                    print(f"{seed}/{number}", traceback.format_exc(), flush=True)
            number += 1
            if number % 100 == 0:
                print(f"{number}: {dict(results)}", flush=True)
    print(f"seed {seed}, {number} combinations: {dict(results)}", flush=True)
    return results["FAILED"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    sys.exit(bool(try_for(given.minutes, given.seed)))
