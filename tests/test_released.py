"""`import-vtc`: any checkpoint of the released format becomes a run like any other, and a malformed one is refused."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import refusal
from conftest import MakeViT
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor
from torch.nn import functional as F

from lowpass.benchmarks.latency.compare import benchmark
from lowpass.cli import main
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.released import read_released
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.evaluate import evaluate_run
from lowpass.pipeline.run.finetune import finetune_run
from lowpass.pipeline.run.import_released import import_released
from lowpass.pipeline.run.recipe import Recipe

DATA = Path(__file__).parent / "data"
CUTOFF = 0.85
Checkpoint = dict[str, Any]


def make_checkpoint(
    blocks: list[dict[str, int]], embed: int, grid: int = 4, scaled: bool = True, seed: int = 0, classes: int = 5
) -> Checkpoint:
    """A checkpoint as the released code writes it, with weights large enough that attention and selection matter.
    `blocks`: heads, qk (channels of a head), v, hidden and keep of each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    state = {
        "cls_token": draw(1, 1, embed),
        "pos_embed": draw(1, grid**2 + 1, embed) * 3,
        "patch_embed.proj.weight": draw(embed, 3, 4, 4),
        "patch_embed.proj.bias": draw(embed),
    }
    dims: dict[str, tuple[int, ...]] = {"embed": (3, embed)}
    for i, b in enumerate(blocks):
        pairs, values, name = b["heads"] * b["qk"], b["heads"] * b["v"], f"blocks.{i}."
        if scaled:
            state |= {f"{name}gamma_{n}": 1 + draw(embed) for n in (1, 2)}
        for layer, rows, columns in (
            ("attn.qkv", 2 * pairs + values, embed),
            ("attn.proj", embed, values),
            ("mlp.fc1", b["hidden"], embed),
            ("mlp.fc2", embed, b["hidden"]),
        ):
            state |= {f"{name}{layer}.weight": 2 * draw(rows, columns), f"{name}{layer}.bias": draw(rows)}
        for norm in ("norm1", "norm2"):
            state |= {f"{name}{norm}.weight": 1 + draw(embed), f"{name}{norm}.bias": draw(embed)}
        dims |= {f"q.{i}": (embed, pairs), f"k.{i}": (embed, pairs), f"v.{i}": (embed, values), f"h.{i}": (b["heads"],)}
        dims |= {f"proj.{i}": (values, embed), f"fc1.{i}": (embed, b["hidden"]), f"fc2.{i}": (b["hidden"], embed)}
    state |= {"norm.weight": 1 + draw(embed), "norm.bias": draw(embed)}
    state |= {"head.weight": draw(classes, embed), "head.bias": draw(classes)}
    dims["head"] = (embed, classes)
    return {"model": state, "dim_cfg": dims, "token_cfg": [b["keep"] for b in blocks]}


def reference_logits(checkpoint: Checkpoint, images: Tensor, scale: float) -> tuple[Tensor, float]:
    """The released model written out plainly in FP64, and the narrowest margin by which a token was kept."""
    w, margin = {name: tensor.double() for name, tensor in checkpoint["model"].items()}, float("inf")

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    patches = F.conv2d(images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4)
    x = torch.cat([w["cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], 1) + w["pos_embed"]
    for i, keep in enumerate(checkpoint["token_cfg"]):
        block, dims = f"blocks.{i}", checkpoint["dim_cfg"]
        heads, sizes = dims[f"h.{i}"][0], [dims[f"{part}.{i}"][1] for part in "qkv"]
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").split(sizes, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attention = (scale * q @ k.mT).softmax(-1)
        mixed = linear((attention @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + w.get(f"{block}.gamma_1", 1) * mixed
        n = x.shape[1] - 1
        if keep < n:
            tokens = x[:, 1:]
            low = torch.fft.ifft(torch.fft.fft(tokens, dim=1) * _gain(n)[:, None], dim=1).real
            energy = low.abs().sum(-1) / tokens.abs().sum(-1).mean(1, keepdim=True)
            cls, seen = attention[:, :, 0], attention[:, :, 1:].mean(2)  # what CLS, and what image queries, look at
            worth = (cls[..., 1:] * seen[..., :1] + cls[..., :1] * seen[..., 1:]).mean(1) * energy
            ranked = worth.sort(descending=True)
            margin = min(margin, float((1 - ranked.values[:, keep] / ranked.values[:, keep - 1]).min()))
            index = ranked.indices[:, :keep].sort().values
            x = torch.cat([x[:, :1], tokens[torch.arange(len(x))[:, None], index]], 1)
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + w.get(f"{block}.gamma_2", 1) * linear(hidden, f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head"), margin


def _gain(n: int) -> Tensor:
    """The released low-pass over `n` tokens."""
    width = n * (1 - CUTOFF) / 2
    half = [1 - np.exp(-((k - (n - 1) / 2) ** 2) / (2 * width**2)) for k in range(n // 2 + 1)]
    return torch.tensor([half[min(k, n - k)] for k in range(n)])


def saved(checkpoint: Any, folder: Path) -> Path:
    path = folder / "checkpoint.pth"
    torch.save(checkpoint, path)
    return path


@st.composite
def models(draw: st.DrawFn) -> tuple[Checkpoint, int]:
    """A checkpoint cut out of a dense model, and that one's head size."""
    head_dim, most_heads, grid = draw(st.sampled_from([4, 9, 16])), draw(st.integers(1, 3)), draw(st.integers(2, 5))
    embed, keep, blocks = head_dim * most_heads, grid**2, []
    for _ in range(draw(st.integers(1, 4))):
        keep = draw(st.integers(1, keep))
        size = st.integers(1, head_dim)
        heads, hidden = draw(st.integers(1, most_heads)), draw(st.integers(1, 4 * embed))
        blocks.append({"heads": heads, "qk": draw(size), "v": draw(size), "hidden": hidden, "keep": keep})
    return make_checkpoint(blocks, embed, grid, draw(st.booleans()), draw(st.integers(0, 99))), head_dim


@given(models())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_checkpoint_computes_what_it_did(tmp_path: Path, model: tuple[Checkpoint, int]) -> None:
    checkpoint, head_dim = model
    slim = read_released(saved(checkpoint, tmp_path), head_dim**-0.5, CUTOFF)
    side = slim.architecture.dense.img_size[0]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected, margin = reference_logits(checkpoint, images, head_dim**-0.5)
    assume(margin > 1e-5)  # nearer than that FP32 cannot tell which token to keep
    with torch.inference_mode():
        torch.testing.assert_close(slim(images).double(), expected, rtol=1e-4, atol=1e-4)
    told = checkpoint["dim_cfg"]
    for index, block in enumerate(slim.architecture.blocks):
        assert (
            block.heads * block.qk_dim == told[f"q.{index}"][1] and block.heads * block.v_dim == told[f"v.{index}"][1]
        )
    assert slim.architecture.dense.blocks()[0].qk_dim == head_dim


def test_blocks_larger_than_the_scale_implies(tmp_path: Path) -> None:
    """Nothing but the sizes in the file limits what imports: more and wider heads, and a wider MLP, than a DeiT's."""
    block = {"heads": 5, "qk": 7, "v": 30, "hidden": 200, "keep": 9}
    checkpoint = make_checkpoint([block, block | {"heads": 1, "keep": 4}], 24)
    slim = read_released(saved(checkpoint, tmp_path), 0.3, CUTOFF)
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(
            slim(images).double(), reference_logits(checkpoint, images, 0.3)[0], rtol=1e-4, atol=1e-4
        )


@pytest.fixture(scope="module")
def reference() -> tuple[np.ndarray, np.ndarray]:
    with np.load(DATA / "checkpoint_io.npz") as file:
        return file["images"], file["logits"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference checkpoint as a run. Shared: copy it before changing it."""
    directory = tmp_path_factory.mktemp("imported") / "run"
    import_released(DATA / "checkpoint.pth", directory, 0.25, CUTOFF)
    return directory


def test_reference_logits(imported: Path, reference: tuple[np.ndarray, np.ndarray]) -> None:
    images, logits = reference
    with torch.inference_mode():
        np.testing.assert_allclose(SlimViT.load(imported)(torch.from_numpy(images)), logits, rtol=0, atol=1e-4)


def test_reference_logits_exported(
    imported: Path, reference: tuple[np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, logits = reference
    run = tmp_path / "run"
    shutil.copytree(imported, run)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), "--json"])
    assert stop.value.code == 0 and json.loads(capsys.readouterr().out)["made_images"]
    session = onnxruntime.InferenceSession(run / "model.fp32.onnx")
    np.testing.assert_allclose(session.run(["logits"], {"images": images})[0], logits, rtol=0, atol=1e-4)
    deployed = deploy(run, tmp_path / "models", "theirs", DeployOptions())
    assert (deployed.path / "1" / "model.onnx").read_bytes() == (run / "model.fp32.onnx").read_bytes()
    assert len((deployed.path / "1" / "labels.txt").read_text().splitlines()) == logits.shape[1]


def test_the_command_remembers_its_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "import-vtc",
                str(DATA / "checkpoint.pth"),
                "--out",
                str(run),
                "--qk-scale",
                "0.25",
                "--data",
                "digits",
                "--yes",
                "--json",
            ]
        )
    told = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and told["run"] == str(run)
    assert told["dense"]["top1"] is None and told["slim"]["top1"] == evaluate_run(run, None).slim.top1
    assert told["slim"]["parameters"] == sum(p.numel() for p in SlimViT.load(run).parameters())


def test_a_run_without_its_dense_model(imported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(imported, run)
    assert not (run / DENSE_WEIGHTS_FILE).exists() and Recipe.load(run).released == DATA / "checkpoint.pth"
    measured = evaluate_run(run, "digits")
    assert measured.dense.top1 is None and measured.slim.top1 is not None
    with pytest.raises(InputError, match="--dense"):
        finetune_run(run, "digits", {"epochs": 1, "distill_weight": 0.5}, None)
    tuned = finetune_run(run, "digits", {"epochs": 1}, None)
    assert tuned.finetuned_epochs == 1 and tuned.dense.top1 is None and tuned.dense.macs > tuned.slim.macs
    timed = benchmark(run, ["pytorch"], [1], seconds=0.05)
    assert timed.runtimes["pytorch"].batches[1].dense.p50_ms > 0
    assert not list(run.glob("dense*"))
    with pytest.raises(InputError, match="--dense"):
        SlimViT.load(run, DENSE_WEIGHTS_FILE)


BLOCK = {"heads": 3, "qk": 8, "v": 8, "hidden": 96, "keep": 16}  # of a DeiT 24 wide with heads of 8
SCALE = 8**-0.5


def test_a_dense_checkpoint_is_its_own_dense_model(tmp_path: Path) -> None:
    checkpoint = make_checkpoint([BLOCK] * 2, 24)
    whole = read_released(saved(checkpoint, tmp_path), SCALE, CUTOFF).serialised()
    for name, content in (
        ("full", checkpoint),
        ("trained", {"model": checkpoint["model"], "epoch": 299, "args": Namespace(lr=1e-4)}),
        ("state", checkpoint["model"]),
    ):
        run = tmp_path / name
        metrics = import_released(saved(content, tmp_path), run, SCALE, CUTOFF)
        assert (run / DENSE_WEIGHTS_FILE).read_bytes() == (run / "slim.safetensors").read_bytes() == whole
        assert metrics.dense == metrics.slim


def test_a_distilled_checkpoint(make_vit: MakeViT, tmp_path: Path) -> None:
    vit = make_vit(VisionTransformerDistilled)
    slim = read_released(saved({"model": vit.state_dict()}, tmp_path), SCALE, CUTOFF)
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(slim(images), vit(images), rtol=1e-5, atol=1e-5)


def test_its_dense_model_is_kept_where_it_is_given(tmp_path: Path) -> None:
    """Without layer scale, as DeiT's own; the slim one has it."""
    (tmp_path / "dense").mkdir()
    dense_checkpoint = make_checkpoint([BLOCK | {"hidden": 60}] * 2, 24, scaled=False)
    dense = saved(dense_checkpoint["model"], tmp_path / "dense")
    slim = make_checkpoint([BLOCK | {"qk": 5, "hidden": 31}, BLOCK | {"heads": 1, "hidden": 60, "keep": 6}], 24)
    run = tmp_path / "run"
    metrics = import_released(saved(slim, tmp_path), run, SCALE, CUTOFF, dense)
    images = torch.randn(2, 3, 16, 16)
    for file, checkpoint in (("slim.safetensors", slim), (DENSE_WEIGHTS_FILE, dense_checkpoint)):
        with torch.inference_mode():
            logits = SlimViT.load(run, file)(images).double()
        torch.testing.assert_close(logits, reference_logits(checkpoint, images, SCALE)[0], rtol=1e-4, atol=1e-4)
    assert metrics.dense.bytes == (run / DENSE_WEIGHTS_FILE).stat().st_size
    for other, problem in (
        (make_checkpoint([BLOCK] * 2, 24, classes=7), "num_classes"),
        (make_checkpoint([BLOCK | {"hidden": 40}] * 2, 24), "hidden is 60"),
        (make_checkpoint([BLOCK, BLOCK | {"hidden": 40}], 24), "not a dense model"),
    ):
        with pytest.raises(InputError, match=problem):
            import_released(
                saved(slim, tmp_path), tmp_path / "new", SCALE, CUTOFF, saved(other["model"], tmp_path / "dense")
            )
    assert not (tmp_path / "new").exists()


def _cut(key: str, axis: int = 0) -> Callable[[Checkpoint], None]:
    """Take the last row (or column) off a tensor."""

    def change(checkpoint: Checkpoint) -> None:
        tensor = checkpoint["model"][key]
        checkpoint["model"][key] = tensor.narrow(axis, 0, tensor.shape[axis] - 1)

    return change


def _drop(table: str, key: str) -> Callable[[Checkpoint], None]:
    return lambda checkpoint: checkpoint[table].pop(key)


def _put(table: str, value: Any, key: str | None = None) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        if key is None:
            checkpoint[table] = value
        else:
            checkpoint[table][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cut("blocks.1.attn.qkv.weight"), ["blocks.1.attn.qkv.weight", "(71, 24)", "(24, 24)"]),
        (_cut("blocks.1.attn.qkv.weight", 1), ["blocks.1.attn.qkv.weight", "(72, 23)", "(72, 24)"]),
        (_cut("blocks.1.attn.qkv.bias"), ["blocks.1.attn.qkv.bias", "(71,)", "(72,)"]),
        (_cut("blocks.0.attn.proj.weight", 1), ["blocks.0.attn.proj.weight", "(24, 23)"]),
        (_cut("blocks.0.mlp.fc1.weight"), ["blocks.0.mlp.fc1.weight", "(95, 24)", "fc1.0"]),
        (_cut("blocks.0.mlp.fc2.weight", 1), ["blocks.0.mlp.fc2.weight", "(24, 95)", "(24, 96)"]),
        (_cut("blocks.0.gamma_1"), ["blocks.0.gamma_1", "(23,)", "(24,)"]),
        (_cut("pos_embed", 1), ["pos_embed", "(1, 16, 24)", "15 image tokens"]),
        (_cut("head.weight", 1), ["head.weight", "(5, 23)", "(5, 24)"]),
        (_put("model", torch.zeros(3), "pos_embed"), ["pos_embed", "(3,)", "3 dimensions"]),
        (_put("model", torch.zeros(3), "mask"), ["mask"]),
        (_put("model", torch.full((24,), torch.nan), "norm.bias"), ["norm.bias", "NaN"]),
        (_drop("model", "head.weight"), ["no head.weight"]),
        (_drop("model", "blocks.0.attn.qkv.weight"), ["no blocks.0.attn.qkv.weight"]),
        (_drop("model", "blocks.1.norm2.bias"), ["no blocks.1.norm2.bias"]),
        (_put("dim_cfg", (24, 20), "q.1"), ["q.1", "(24, 20)", "(72, 24)"]),
        (_put("dim_cfg", (5,), "h.0"), ["h.0", "5 heads", "(72, 24)"]),
        (_put("dim_cfg", ("three",), "h.0"), ["h.0", "three"]),
        (_put("dim_cfg", [3, 3]), ["dim_cfg", "list"]),
        (_put("token_cfg", [16]), ["token_cfg", "1 counts", "2 blocks"]),
        (_put("token_cfg", [8, 9]), ["token_cfg", "keep is 9", "8"]),
        (_put("token_cfg", [16, 0]), ["token_cfg", "[16, 0]"]),
        (_put("token_cfg", 16), ["token_cfg", "16"]),
        (_put("model", 3), ["no state dict"]),
    ],
)
def test_a_malformed_checkpoint_is_refused(
    change: Callable[[Checkpoint], None], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint([BLOCK] * 2, 24)
    change(checkpoint)
    line = _refusal(capsys, saved(checkpoint, tmp_path), tmp_path / "run", str(SCALE))
    assert all(word in line for word in [*words, "checkpoint.pth"]), line
    assert not (tmp_path / "run").exists()


def test_other_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slim = make_checkpoint([BLOCK | {"qk": 5}] * 2, 24)
    path = saved({"model": slim["model"]}, tmp_path)
    assert "h.0" in _refusal(capsys, path, tmp_path / "run", str(SCALE))
    assert "no weights" in _refusal(capsys, tmp_path / "none.pth", tmp_path / "run", str(SCALE))
    path = saved(slim, tmp_path)
    assert "--qk-scale" in _refusal(capsys, path, tmp_path / "run", "0")
    assert "--cutoff" in _refusal(capsys, path, tmp_path / "run", "0.35", "--cutoff", "1")
    assert "digits" in _refusal(capsys, path, tmp_path / "run", "0.35", "--data", "digits")
    assert "empty" in _refusal(capsys, path, tmp_path, "0.35")
    path.write_bytes(path.read_bytes()[:999])
    assert "truncated" in _refusal(capsys, path, tmp_path / "run", "0.35")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pth"]


def _refusal(capsys: pytest.CaptureFixture[str], path: Path, run: Path, scale: str, *options: str) -> str:
    """The one line of a refusal."""
    return refusal(capsys, "import-vtc", str(path), "--out", str(run), "--qk-scale", scale, *options)
