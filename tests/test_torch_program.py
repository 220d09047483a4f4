"""Programs of `torch.export`: what plain PyTorch loads gives the model's logits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import answer, refusal
from conftest import MakeViT

import lowpass.export.torch_program
import lowpass.pipeline.run.images
from lowpass.export.onnx.verify import VERIFICATION_FILE
from lowpass.export.torch_program import METADATA_FILE, export_program, program_path, serialise
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.images import verification_batches

ALONE = """
import sys
import numpy, torch
program = torch.export.load(sys.argv[1]).module()
every = numpy.load(sys.argv[2])
numpy.savez(sys.argv[3], *(program(torch.from_numpy(every[:size])).numpy() for size in (1, 2, 7)))
assert not {"lowpass", "timm", "onnx"} & set(sys.modules)
"""


@pytest.mark.slow
def test_plain_pytorch_gives_the_same_logits(
    slim_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowpass.pipeline.run.images, "VERIFIED_IMAGES", 100)
    told = answer(capsys, "export", str(slim_run), "--format", "torch-export")
    path = program_path(slim_run)
    assert told["program"] == str(path) and told["images"] == 100 and not told["made_images"]
    assert told["largest_difference"] <= 1e-6 and told["same_top1"] == 100
    assert json.loads((slim_run / VERIFICATION_FILE).read_text())["model.fp32.pt2"]["runtime"] == "pytorch"
    images = verification_batches(slim_run, None)[0][0][0][:7]
    np.save(tmp_path / "images.npy", images.numpy())
    given = [str(path), str(tmp_path / "images.npy"), str(tmp_path / "logits.npz")]
    subprocess.run([sys.executable, "-c", ALONE, *given], cwd=tmp_path, check=True)
    slim = SlimViT.load(slim_run)
    for size, logits in zip((1, 2, 7), np.load(tmp_path / "logits.npz").values(), strict=True):
        with torch.inference_mode():
            np.testing.assert_allclose(logits, slim(images[:size]).numpy(), atol=1e-6, rtol=0)


def test_the_archive_says_what_it_is_and_nothing_of_this_machine(make_vit: MakeViT) -> None:
    slim = SlimViT.from_timm(make_vit())
    slim.set_keep(0, 9)
    content = serialise(slim, "hash")
    assert serialise(slim, "hash") == content
    assert b"slim_vit.py" not in content and str(Path.cwd()).encode() not in content


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--precision", "fp16"], "precision"), (["--opset", "20"], "opset"), (["--batch", "1:2:4"], "batch")],
)
def test_options_of_onnx_are_refused(
    slim_run: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    said = refusal(capsys, "export", str(slim_run), "--format", "torch-export", *options)
    assert f"--{named} is for ONNX" in said


def test_a_program_that_disagrees_is_not_written(
    slim_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_vit: MakeViT
) -> None:
    slim = SlimViT.from_timm(make_vit())
    slim.save(tmp_path)
    images = [(torch.randn(4, 3, 16, 16), torch.zeros(4))]
    other = serialise(SlimViT.from_timm(make_vit(seed=1)), "")
    with monkeypatch.context() as patch:
        patch.setattr(lowpass.export.torch_program, "serialise", lambda *_: other)
        with pytest.raises(RunError, match=r"model.fp32.pt2: a logit differs .* on 4 of 4 images .*not written"):
            export_program(tmp_path, images)
    assert not program_path(tmp_path).exists()
    assert export_program(tmp_path, images).largest_difference <= 1e-6
    extra: dict[str, Any] = {METADATA_FILE: ""}
    torch.export.load(program_path(tmp_path), extra_files=extra)
    assert json.loads(extra[METADATA_FILE])["input_size"] == [3, 16, 16]
    with pytest.raises(InputError, match=r"dense\.safetensors"):
        export_program(tmp_path, images, dense=True)
