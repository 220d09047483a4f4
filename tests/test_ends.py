"""From what people bring to an engine: a folder of Transformers' Trainer, torchvision's module, other sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from command_line import answer
from PIL import Image
from test_trials import W, scenes
from torch import nn

import lowpass
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.session import logits_of

ROOT = Path(__file__).parent.parent
# The embedded digits model under the names of others: they score what it does.
TO_TRANSFORMERS = (
    ("cls_token", "vit.embeddings.cls_token"),
    ("pos_embed", "vit.embeddings.position_embeddings"),
    ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("blocks.", "vit.layers."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.o_proj."),
    ("head.", "classifier."),
)
TO_TORCHVISION = (
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    ("patch_embed.proj.", "conv_proj."),
    ("blocks.", "encoder.layers.encoder_layer_"),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".attn.qkv.", ".self_attention.in_proj_"),
    (".attn.proj.", ".self_attention.out_proj."),
    (".fc1.", ".0."),
    (".fc2.", ".3."),
    ("head.", "heads.head."),
)


def renamed(pairs: tuple[tuple[str, str], ...], last_norm: str) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in W.items():
        other = last_norm + name[4:] if name.startswith("norm.") else name
        for ours, theirs in pairs:
            if other.startswith(ours) or ours.startswith("."):
                other = other.replace(ours, theirs)
        state[other] = tensor
    return state


def digits_of_transformers() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=32,
        patch_size=4,
        layer_norm_eps=1e-6,
        id2label=dict(enumerate("0123456789")),
    )
    model: Any = transformers.ViTForImageClassification(config)
    state = renamed(TO_TRANSFORMERS, "vit.layernorm")
    for name in [name for name in state if ".attn.qkv." in name]:
        thirds = state.pop(name).chunk(3)
        for part, rows in zip("qkv", thirds, strict=True):
            state[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = rows
    model.load_state_dict(state)
    return model  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_folder_of_the_trainer_to_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = scenes(tmp_path / "images", list("0123456789"), 200), str(tmp_path / "run")
    settings = transformers.TrainingArguments(output_dir=str(tmp_path / "trained"), report_to=[])
    trainer = transformers.Trainer(model=digits_of_transformers(), args=settings)  # type: ignore[arg-type]
    trainer.save_model(str(tmp_path / "trained"))
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "trained")
    capsys.readouterr()
    made = answer(
        capsys,
        *("compress", "--model", str(tmp_path / "trained"), "--data", str(folder), "--target-macs", "0.6"),
        *("--score-images", "64", "--measure-images", "128", "--out", run),
    )
    assert made["dense"]["top1"] > 96 and made["slim"]["top1"] > 90
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == list("0123456789")
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert inputs["classes"] == "id2label" and "preprocessor_config.json" in inputs["preprocessing"]
    answer(capsys, "finetune", run, "--epochs", "1")
    answer(capsys, "export", run, "--precision", "fp16")
    answer(capsys, "build", run)
    assert (tmp_path / "run" / "model.fp16.plan").exists()


@pytest.mark.slow
def test_a_module_of_torchvision_to_an_engine(tmp_path: Path) -> None:
    folder = scenes(tmp_path / "images", list("0123456789"), 200)
    model = torchvision.models.VisionTransformer(32, 4, 6, 3, 96, 384, num_classes=10)
    model.load_state_dict(renamed(TO_TORCHVISION, "encoder.ln"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    few: dict[str, Any] = {"target_macs": 0.6, "score_images": 64, "measure_images": 128}
    with pytest.raises(lowpass.InputError, match=r"give --mean 0\.5,0\.5,0\.5"):
        lowpass.compress(model, str(folder), tmp_path / "refused", mean=(0.0,) * 3, std=(0.05,) * 3, **few)
    run = lowpass.compress(model, str(folder), tmp_path / "run", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, **few)
    assert run.metrics.dense.top1 is not None and run.metrics.dense.top1 > 96
    run.export("fp16")
    assert run.build("fp16").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "channels"), [((384, 384), 3), ((224, 448), 3), ((224, 224), 1)])
def test_other_sizes_and_channels(
    size: tuple[int, int], channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=size, in_chans=channels, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(3):
                pixels = noise.integers(0, 256, (50, 80, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{index}.png")
    tokens = size[0] * size[1] // 256
    blocks = [
        {"heads": 2, "qk_dim": 64, "v_dim": 64, "hidden": 512, "keep": tokens - 20 * (index > 5)} for index in range(12)
    ]
    (tmp_path / "table.json").write_text(json.dumps({"blocks": blocks}))
    asked = ("--img-size", f"{size[0]}x{size[1]}") if size[0] != size[1] else ()
    run = tmp_path / "run"
    answer(
        capsys,
        *("compress", "--model", "deit_tiny_patch16_224", "--weights", str(tmp_path / "weights.pth"), *asked),
        *("--data", str(tmp_path / "images"), "--architecture", str(tmp_path / "table.json"), "--out", str(run)),
        *("--workers", "0", "--batch-size", "4", "--yes"),
    )
    answer(capsys, "export", str(run))
    images = noise.standard_normal((1, channels, *size), np.float32)
    found = logits_of(OnnxRuntime((run / "model.fp32.onnx").read_bytes()), images)
    with torch.no_grad():
        np.testing.assert_allclose(found, lowpass.Run(run).slim(torch.from_numpy(images)).numpy(), atol=1e-4)


SMALL_SHM = """
import subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"], check=True)
sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""


@pytest.mark.slow
def test_a_small_shared_memory_is_said_and_gone_around(tmp_path: Path) -> None:
    """As in a container, where it is 64 MB."""
    folder = scenes(tmp_path / "images", list("0123456789"), 60, 60)
    command = [sys.executable, "-m", "lowpass.cli", "compress", "--model", "digits_deit", "--data", str(folder)]
    command += ["--target-macs", "0.8", "--out", str(tmp_path / "run")]
    private = ["unshare", "--mount", "--propagation", "private"]
    if os.getuid():
        private += ["--map-root-user"]
    done = subprocess.run(
        [*private, sys.executable, "-c", SMALL_SHM, *command, "--workers", "2", "--batch-size", "64"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "shm has 1 MiB free" in done.stderr and "reading in this one (--workers 0)" in done.stderr
