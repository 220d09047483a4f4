"""The `lowpass` command as its users meet it: what it answers, what it refuses, and what a kill leaves behind."""

import json
from pathlib import Path

import pytest
import torch
from command_line import answer, refusal
from PIL import Image
from safetensors.torch import load_file, save_file

from lowpass.cli import main
from lowpass.pipeline.model.slim_vit import SlimViT

QUICK = ["--model", "digits_deit", "--data", "digits", "--score-images", "128", "--measure-images", "128"]
WEIGHTS = Path("pipeline/checkpoints/weights/digits_deit.safetensors")
ROOT = Path(__file__).parent.parent


def test_whole_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    first = answer(capsys, "compress", *QUICK, "--target-macs", "0.8", "--out", str(run))
    assert set(first) >= {"run", "dense", "slim"} and first["run"] == str(run)
    assert set(first["dense"]) == set(first["slim"]) == {"top1", "macs", "parameters", "bytes", "runtimes"}
    assert first["dense"]["runtimes"] is None
    assert first["dense"]["top1"] >= 98 and first["dense"]["bytes"] <= 3e6
    assert 0.78 <= first["slim"]["macs"] / first["dense"]["macs"] <= 0.8
    assert first["slim"]["parameters"] < first["dense"]["parameters"]
    decisions = [json.loads(line) for line in (run / "search.jsonl").read_text().splitlines()[1:]]
    assert {decision["kind"] for decision in decisions} >= {"curve", "plan", "channels"}
    assert decisions[-2]["macs"] == first["slim"]["macs"] and decisions[-1]["kind"] == "classifier"

    tuned = answer(capsys, "finetune", str(run), "--epochs", "1")
    assert tuned["slim"]["macs"] == first["slim"]["macs"]
    measured = answer(capsys, "evaluate", str(run))
    assert measured["slim"]["top1"] == tuned["slim"]["top1"] and measured["dense"] == first["dense"]

    exported = answer(capsys, "export", str(run), "--precision", "fp16", "--batch", "1:2:4")
    assert exported["same_top1"] >= 99.5 and exported["images"] == 1000 and Path(exported["onnx"]).exists()
    scored = answer(capsys, "evaluate", str(run), "--runtime", "onnxruntime", "--precision", "fp16")
    (deployed,) = scored["deployed"]  # a real file in a real runtime scores as PyTorch does
    assert deployed["images"] == 1000 and abs(deployed["top1"] - tuned["slim"]["top1"]) <= 0.3
    built = answer(capsys, "build", str(run), "--runtime", "tensorrt-rtx")
    assert built["manifest"]["profile"] == {"least": 1, "best": 2, "most": 4} and Path(built["plan"]).exists()
    assert "--minShapes=images:1x3x32x32" in built["trtexec"] and "--stronglyTyped" in built["trtexec"]

    timed = answer(
        capsys, "benchmark", str(run), "--runtime", "onnxruntime,tensorrt", "--batches", "1,2", "--seconds", "0.05"
    )
    for model in ("dense", "slim"):
        latency = timed[model]["runtimes"]["onnxruntime"]["2"]
        assert latency["p50_ms"] > 0 and latency["images_per_s"] == pytest.approx(2000 / latency["p50_ms"])
        assert {"p50_ms", "p90_ms", "p99_ms", "images_per_s"} <= set(latency)
    assert timed["slim"]["top1"] == tuned["slim"]["top1"]
    assert answer(capsys, "doctor")["cores"] >= 1


def test_same_seed_same_bytes(
    tiny_source: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tiny_source | {"data": "digits", "score-images": 64, "measure-images": 128}
    quick = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    for name in ("a", "b"):
        run = str(tmp_path / name)
        answer(capsys, "compress", *quick, "--target-macs", "0.8", "--out", run, "--seed", "3", "--yes")
        answer(capsys, "finetune", run, "--epochs", "1")
        answer(capsys, "export", run)
    for file in ("architecture.json", "search.jsonl", "slim.safetensors", "dense.safetensors", "model.fp32.onnx"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.slow
def test_deit_small_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights and a table, to an engine: thin and unequal heads must be padded so that attention fuses."""
    table = json.loads((ROOT / "recipes" / "deit_small_paper.json").read_text())
    table["blocks"][1] |= {"qk_dim": 23, "v_dim": 50}
    file, run = tmp_path / "table.json", str(tmp_path / "run")
    file.write_text(json.dumps(table))
    made = answer(
        capsys,
        "compress",
        "--model",
        "deit_small_patch16_224",
        "--random-weights",
        "--channel-criterion",
        "magnitude",
        "--architecture",
        str(file),
        "--out",
        run,
    )
    assert made["dense"]["top1"] is None and made["slim"]["macs"] < 0.5 * made["dense"]["macs"]
    assert [block.shape.model_dump() for block in SlimViT.load(run).blocks] == table["blocks"]
    exported = answer(capsys, "export", run, "--precision", "fp16")
    assert exported["made_images"]
    built = answer(capsys, "build", run, "--runtime", "tensorrt-rtx")
    assert Path(built["plan"]).stat().st_size > 1e6


def _folder(root: Path, classes: int = 10, images: int = 3) -> Path:
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for index in range(images):
            Image.new("RGB", (40, 40), (label * 20, index * 50, 0)).save(root / f"class{label}" / f"{index}.png")
    return root


def _changed_weights(path: Path, **changes: torch.Tensor) -> Path:
    save_file(load_file(ROOT / WEIGHTS) | {name.replace("__", "."): value for name, value in changes.items()}, path)
    return path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--model": "deit_smal_patch16_224"}, "did you mean deit_small_patch16_224"),
        (
            {"--model": "resnet18", "--target-macs": None, "--random-weights": None, "--architecture": "TABLE"},
            "not a plain ViT",
        ),
        ({"--model": "deit_tiny_patch16_224"}, "needs trained weights"),
        ({"--weights": "none.pth"}, "no weights at"),
        ({"--weights": "TRUNCATED"}, "cannot read the weights"),
        ({"--weights": "RESHAPED"}, "patch_embed.proj.bias is (5,)"),
        ({"--weights": "NAN"}, "norm.bias holds NaN"),
        ({"--data": "EMPTY"}, "no images"),
        ({"--data": "nowhere"}, "no folder nowhere"),
        ({"--data": "BROKEN"}, "cannot read the image"),
        ({"--data": "THREE"}, "3 classes, but the model has 10"),
        ({"--target-macs": "0.01"}, "out of reach"),
        ({"--target-macs": "1.5"}, "target_macs"),
        ({"--allowable-drop": "5"}, "exactly one of"),
        ({"--target-macs": None}, "exactly one of"),
        ({"--target-macs": None, "--architecture": "TABLE"}, "6 blocks, the architecture 1"),
        ({"--target-macs": None, "--architecture": "missing.json"}, "cannot read the architecture"),
        ({"--random-weights": ""}, "random weights"),
        ({"--token-cutoff": "2"}, "token_cutoff"),
        ({"--target-macs": None, "--target-latency": "1"}, "go together"),
        ({"--runtime": "onnxruntime"}, "go together"),
        ({"--target-macs": None, "--target-latency": "1", "--runtime": "abacus"}, "no runtime 'abacus'"),
        ({"--target-macs": None, "--target-latency": "1", "--runtime": "tensorrt"}, "tensorrt"),
    ],
)
def test_refused_before_anything_is_written(
    change: dict[str, str | None], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "empty").mkdir()
    (made / "truncated.safetensors").write_bytes((ROOT / WEIGHTS).read_bytes()[:5000])
    table = made / "table.json"
    table.write_text('{"blocks": [{"heads": 1, "qk_dim": 1, "v_dim": 1, "hidden": 1, "keep": 1}]}')
    broken = _folder(made / "broken")
    (broken / "class0" / "0.png").write_bytes(b"not an image")
    values = {
        "TRUNCATED": made / "truncated.safetensors",
        "RESHAPED": _changed_weights(made / "shape.safetensors", patch_embed__proj__bias=torch.zeros(5)),
        "NAN": _changed_weights(made / "nan.safetensors", norm__bias=torch.full((96,), torch.nan)),
        "EMPTY": made / "empty",
        "BROKEN": broken,
        "THREE": _folder(made / "three", classes=3),
        "TABLE": table,
    }
    out = tmp_path / "out"
    options: dict[str, str | None] = {"--model": "digits_deit", "--data": "digits", "--target-macs": "0.5"}
    options |= {name: None if value == "" else value for name, value in change.items()}
    arguments = ["compress", "--out", str(out)]
    for name, value in options.items():
        if name == "--random-weights":
            arguments.append(name)
        elif value is not None:
            arguments += [name, str(values.get(value, value))]
    assert expected in refusal(capsys, *arguments)
    assert not out.exists()


def test_another_run_is_not_overwritten(slim_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in slim_run.iterdir()}
    command = ["compress", *QUICK, "--target-macs", "0.8", "--out", str(slim_run)]
    assert "already holds a run" in refusal(capsys, *command)
    assert "was started with" in refusal(capsys, *command, "--resume")
    assert {file: file.read_bytes() for file in slim_run.iterdir()} == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "not empty" in refusal(capsys, *command[:-1], str(other))
    assert "takes a directory" in refusal(capsys, *command[:-1], str(other / "thesis.txt"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["export", "RUN", "--batch", "8:4:2"], "batch profile"),
        (["export", "nowhere"], "is nowhere a run directory"),
        (["build", "RUN", "--precision", "fp32"], "FP32"),
        (["build", "RUN"], "lowpass export"),
        (["evaluate", "nowhere"], "is nowhere a run directory"),
        (["evaluate", "RUN", "--precision", "fp16"], "name the --runtime it is to run in"),
        (["evaluate", "RUN", "--runtime", "onnxruntime", "--precision", "fp8"], "run `lowpass export"),
        (["evaluate", "RUN", "--data", "nowhere"], "no folder nowhere"),
        (["finetune", "RUN", "--lr", "-1"], "lr"),
        (["benchmark", "RUN", "--batches", "0"], "--batches"),
        (["benchmark", "RUN", "--runtime", "tflite"], "tflite"),
        (["benchmark", "RUN", "--against", "eyesight"], "eyesight"),
    ],
)
def test_other_refusals(
    arguments: list[str], expected: str, slim_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(slim_run.iterdir())
    assert expected in refusal(capsys, *(str(slim_run) if word == "RUN" else word for word in arguments))
    assert sorted(slim_run.iterdir()) == before


def test_an_image_folder_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _folder(tmp_path / "images", images=10)
    made = answer(
        capsys, "compress", "--model", "digits_deit", "--data", str(folder), "--target-macs", "0.9",
        "--batch-size", "16", "--yes", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert made["dense"]["top1"] is not None and made["slim"]["macs"] <= 0.9 * made["dense"]["macs"]


def test_a_failure_is_not_a_refusal(
    slim_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowpass.export.onnx.export.write_bytes", full)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(slim_run)])
    assert stop.value.code == 1 and "No space left" in capsys.readouterr().err
    assert not (slim_run / "model.fp32.onnx").exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "compress", "import-vtc", "finetune", "evaluate", "export", "build", "benchmark", "doctor"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0 and "Usage:" in capsys.readouterr().out
