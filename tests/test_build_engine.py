"""`deploy/build_engine.sh`: what it gives trtexec, and what it refuses. trtexec needs a GPU: a script stands in."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "deploy" / "build_engine.sh"
FAKE = """#!/usr/bin/env bash
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] [b1] # trtexec $*"
[[ $1 == --help ]] && exit 0
printf '%s\\n' "$@" > "$RECORD"
for argument in "$@"; do
  [[ $argument == --saveEngine=* ]] && printf {content} > "${{argument#*=}}"
done
exit {code}
"""


def called(
    folder: Path, *arguments: str, version: str = "101600", content: str = "engine", code: int = 0
) -> subprocess.CompletedProcess[str]:
    """The script with a trtexec of that version; what it was given is in `folder/record`."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "trtexec").write_text(FAKE.format(version=version, content=content or "''", code=code))
    (tools / "trtexec").chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "RECORD": str(folder / "record")}
    environment.pop("TRTEXEC", None)
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "my run"
    directory.mkdir()
    for name in ("model.fp16.onnx", "model.int8.onnx", "dense.fp16.onnx"):
        (directory / name).touch()
    return directory


def test_trtexec_is_told_of_shapes_types_and_files(run: Path, tmp_path: Path) -> None:
    (run / "model.fp16.plan.json").touch()  # of an engine that lay here before
    done = called(tmp_path, str(run), "--batch", "1:4:16")
    assert done.returncode == 0, done.stderr
    given = (tmp_path / "record").read_text().splitlines()
    assert {
        f"--onnx={run}/model.fp16.onnx",
        "--stronglyTyped",
        "--minShapes=images:1x3x224x224",
        "--optShapes=images:4x3x224x224",
        "--maxShapes=images:16x3x224x224",
        f"--timingCacheFile={run}/timing.trtexec.cache",
        "--skipInference",
    } < set(given)
    assert not {"--fp16", "--bf16", "--int8", "--best"} & set(given)  # a strongly typed network takes none
    assert "TensorRT 10.16.0" in done.stdout and str(run / "model.fp16.plan") in done.stdout.splitlines()[-1]
    assert (run / "model.fp16.plan").read_text() == "engine"
    assert not (run / "model.fp16.plan.json").exists() and not list(run.glob(".*.part"))


def test_precision_shape_and_dense_are_taken(run: Path, tmp_path: Path) -> None:
    assert called(tmp_path, "--precision", "int8", "--image", "32x32x3", "--batch", "8", str(run)).returncode == 0
    given = (tmp_path / "record").read_text().splitlines()
    assert f"--onnx={run}/model.int8.onnx" in given
    assert {f"--{which}Shapes=images:8x32x32x3" for which in ("min", "opt", "max")} < set(given)
    assert called(tmp_path, "--dense", str(run)).returncode == 0
    assert f"--onnx={run}/dense.fp16.onnx" in (tmp_path / "record").read_text().splitlines()
    assert (run / "model.int8.plan").exists() and (run / "dense.fp16.plan").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which run directory"),
        (["--fast", "DIR"], "no option --fast"),
        (["DIR", "--batch"], "--batch wants a value"),
        (["DIR", "--batch", "8:4:16"], "must ascend"),
        (["DIR", "--batch", "0"], "MIN:OPT:MAX or one number"),
        (["DIR", "--batch", "1:8"], "not 1:8"),
        (["DIR", "--image", "224"], "not 224"),
        (["DIR", "--precision", "fp32"], "not fp32"),
        (["DIR", "--precision", "bf16"], "lowpass export"),
        (["DIR", "OTHER"], "one directory"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(arguments: list[str], said: str, run: Path, tmp_path: Path) -> None:
    done = called(tmp_path, *(str(run) if argument == "DIR" else argument for argument in arguments))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        ({"version": "101303"}, "needs 10.14"),
        ({"version": "8602"}, "older than 10"),
        ({"code": 1}, "did not build"),
        ({"content": ""}, "wrote no engine"),
    ],
)
def test_a_failure_leaves_the_old_engine(fake: dict[str, str | int], said: str, run: Path, tmp_path: Path) -> None:
    (run / "model.fp16.plan").write_text("old")
    done = called(tmp_path, str(run), **fake)  # type: ignore[arg-type]
    assert done.returncode == 1 and said in done.stderr
    assert (run / "model.fp16.plan").read_text() == "old" and not list(run.glob(".*.part"))


def test_usage_names_every_option() -> None:
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert all(option in done.stdout for option in ("--batch", "--image", "--precision", "--dense", "TRTEXEC", "DIR"))
