"""Any combination of models, files, folders and options is taken or refused in a sentence, never a traceback."""

import contextlib
import io
import os
import random
import shutil
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from test_checkpoints import WRAPPED
from test_ends import TO_TORCHVISION, digits_of_transformers, renamed
from test_trials import W, scenes

from lowpass.cli import main

EXAMPLES = int(os.environ.get("LOWPASS_COMBINATIONS", "60"))
DIGITS = list("0123456789")


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What options may name: `model`, `weights`, `data` and `classes`."""
    root = tmp_path_factory.mktemp("things")
    found: dict[str, list[str]] = {
        "weights": [str(root / "none.pth")],
        "data": ["digits", str(root / "none"), "hfds/", ""],
    }
    for number, name in enumerate(["bare", "EMA beside noise", "both in one table", "Lightning", "student alone"]):
        torch.save(WRAPPED[name], root / f"{number}.pth")
        found["weights"].append(str(root / f"{number}.pth"))
    odd: dict[str, Any] = {
        "list": [1, 2],
        "empty": {},
        "grey": W | {"patch_embed.proj.weight": W["patch_embed.proj.weight"][:, :1]},
        "small": W | {"pos_embed": W["pos_embed"][:, :37]},
        "odd": W | {"pos_embed": W["pos_embed"][:, :51]},
        "more": W | {"head.weight": torch.randn(12, 96), "head.bias": torch.zeros(12)},
        "scalar": W | {"head.weight": torch.tensor(1.0)},
        "torchvision": renamed(TO_TORCHVISION, "encoder.ln"),
        "integers": {name: tensor.long() for name, tensor in W.items()},
    }
    for name, content in odd.items():
        torch.save(content, root / f"{name}.pth")
        found["weights"].append(str(root / f"{name}.pth"))
    save_file({f"module.{name}": tensor for name, tensor in W.items()}, root / "ddp.safetensors")
    (root / "text.safetensors").write_text("not weights")
    found["weights"] += [str(root / "ddp.safetensors"), str(root / "text.safetensors"), str(root)]
    digits_of_transformers().save_pretrained(root / "transformers")  # type: ignore[operator]
    shutil.copytree(root / "transformers", root / "broken")
    (root / "broken" / "config.json").write_text('{"model_type": "vit", "hidden_size": 96}')
    (root / "empty").mkdir()
    models = ["transformers", "broken", "empty", "nowhere/at/all"]
    found["model"] = ["digits_deit", "vit_b_16", "resnet18", "swin_tiny_patch4_window7_224", "?", "digits_deit.no_tag"]
    found["model"] += [str(root / name) for name in models] + [f"local-dir:{root / 'transformers'}"]
    good = scenes(root / "good", DIGITS, 40, 40)
    found["data"].append(str(good))
    for name, splits in (("valid", ("train", "VALID")), ("holdout", ("train", "holdout"))):
        found["data"].append(str(scenes(root / name, DIGITS, 30, 30, splits)))
    found["data"].append(str(scenes(root / "named", [f"class{digit}" for digit in range(1, 11)], 40, 40)))
    found["data"].append(str(scenes(root / "three", [*"012", *("012" * 3)][:10], 30, 30)))
    broken = scenes(root / "unreadable", DIGITS, 40, 40)
    for file in sorted(broken.rglob("*.png"))[::7]:
        file.write_bytes(file.read_bytes()[:99])
    (root / "single" / "a").mkdir(parents=True)
    Image.new("L", (3, 900)).save(root / "single" / "a" / "x.png")
    (root / "loose").mkdir()
    Image.new("RGB", (9, 9)).save(root / "loose" / "x.png")
    found["data"] += [str(broken), str(root / "single"), str(root / "loose"), str(root / "empty")]
    (root / "names.txt").write_text("\n".join(DIGITS))
    (root / "twice.txt").write_text("\n".join("0012345678"))
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    found["classes"] = [str(root / name) for name in ("names.txt", "twice.txt", "binary.txt", "none.txt")]
    return found


OPTIONS: dict[str, list[str]] = {
    "--weights-key": ["state_dict_ema", "model", "teacher", "nothing", ""],
    "--img-size": ["32", "24", "48", "16x64", "31", "0", "x", "-1", "99999999"],
    "--in-chans": ["1", "3", "5"],
    "--mean": ["0.5,0.5,0.5", "0.5", "a", "", "nan,nan,nan", "1e308,1,1"],
    "--std": ["0.5,0.5,0.5", "0,0,0", "-1,1,1", "inf,1,1"],
    "--crop-pct": ["1", "0.5", "0", "2", "nan", "1e-9"],
    "--interpolation": ["bilinear", "lanczos"],
    "--class-order": ["plain", "natural"],
    "--input-key": ["image", ""],
    "--target-key": ["label"],
    "--score-images": ["1", "3", "5", "100000"],
    "--measure-images": ["1", "100"],
    "--batch-size": ["1", "1000"],
    "--seed": ["0", "7"],
    "--token-score": ["full", "cls"],
    "--memory-budget": ["0", "0.001"],
}
FLAGS = ["--exif", "--skip-unreadable", "--yes", "--thin-heads", "--as-published", "--no-recovery"]
GOALS = [["--target-macs", "0.5"], ["--target-macs", "0.001"], ["--allowable-drop", "5"], ["--target-macs", "1.5"]]


@pytest.mark.slow
def test_any_combination_is_taken_or_refused(
    things: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize="LOWPASS_COMBINATIONS" not in os.environ,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def combination(draw: random.Random) -> None:
        words = ["compress", "--model", draw.choice(things["model"][:1] * 8 + things["model"])]
        if draw.random() < 0.7:
            words += ["--weights", draw.choice(things["weights"])]
        words += ["--data", draw.choice(things["data"]), *draw.choice(GOALS)]
        if draw.random() < 0.2:
            words += ["--classes", draw.choice(things["classes"])]
        for option in draw.sample(sorted(OPTIONS), draw.randint(0, 4)):
            words += [option, draw.choice(OPTIONS[option])]
        words += draw.sample(FLAGS, draw.randint(0, 2))
        out = tmp_path_factory.mktemp("out") / "run"
        words += ["--workers", "0", "--dry-run", "--out", str(out)]
        said = io.StringIO()
        with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            main(words)
        assert ended.value.code in (0, 2), (words, said.getvalue())
        assert "Traceback" not in said.getvalue() and not out.exists()

    combination()
