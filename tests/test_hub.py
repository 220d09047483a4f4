"""Slim models on a hub of models: folders, cards, uploads to a stand-in, and what is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from command_line import answer, refusal
from conftest import MakeViT
from hub_stand_in import Hub, stand_in
from huggingface_hub import ModelCard

import lowpass
from lowpass.benchmarks.latency.compare import BENCHMARK_FILE, Benchmark, Comparison, RuntimeResult
from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.latency.timing import Latency
from lowpass.cli import main
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import write_json
from lowpass.pipeline.model.hub import upload
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.recipe import Recipe, read_recipe
from lowpass.report.asked import commands

FILES = {"README.md", "architecture.json", "classes.json", "slim.safetensors"}
TOKEN = "hf_of_nobody"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A stand-in, with a token and an empty cache."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with stand_in(monkeypatch) as hub:
        yield hub


def noise() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def agree(one: SlimViT, other: SlimViT) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(one(noise()), other(noise()), atol=1e-6, rtol=0)


def test_a_folder_gives_the_same_logits(slim_run: Path, tmp_path: Path) -> None:
    slim = lowpass.Run(slim_run).publishable()
    slim.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES
    for name in ("architecture.json", "classes.json", "slim.safetensors"):  # one format
        assert (tmp_path / "model" / name).read_bytes() == (slim_run / name).read_bytes()
    for name in (tmp_path / "model", str(tmp_path / "model"), slim_run):
        loaded = lowpass.SlimViT.from_pretrained(name)
        assert loaded.classes == tuple("0123456789") and not loaded.training
        agree(loaded, slim)


def test_a_model_without_a_run_says_what_is_not_known(make_vit: MakeViT, tmp_path: Path) -> None:
    slim = SlimViT.from_timm(make_vit())
    slim.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"classes.json"}
    card = (tmp_path / "README.md").read_text()
    assert "Nothing of this model was measured" in card and "Its licence: not known" in card
    assert "saved without its run" in card and ModelCard.load(tmp_path / "README.md").data.license is None
    assert SlimViT.from_pretrained(tmp_path).classes is None
    (tmp_path / "README.md").write_text("mine")
    slim.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_card_has_the_figures_of_the_run(slim_run: Path, tmp_path: Path) -> None:
    run = lowpass.Run(slim_run)
    run.publishable("someone/digits").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "lowpass")
    assert card.data.pipeline_tag == "image-classification"
    top1, macs = run.metrics.slim.top1, run.metrics.slim.macs
    assert f"{top1:.2f}% | measured on 1,000 test images of digits" in card.text and f"| {macs:,} |" in card.text
    assert "SlimViT.from_pretrained('someone/digits')" in card.text and "ms |" not in card.text
    assert "Not fine-tuned." in card.text and "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in card.text
    assert not [line for line in card.text.splitlines() if str(slim_run) in line]
    for part in ("## Intended use", "## Limits", "## Licence", "## Architecture"):
        assert part in card.text
    run.publishable(license="mit").save_pretrained(tmp_path / "other")
    assert ModelCard.load(tmp_path / "other" / "README.md").data.license == "mit"


def test_figures_of_another_model_are_left_out(slim_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(slim_run, tmp_path / "run"))
    architecture = lowpass.Run(run).architecture
    took = Latency(p50_ms=12.5, p90_ms=13, p99_ms=14, images_per_s=80, runs=30)
    compared = Comparison(dense=took, slim=took, speedup=1, speedup_quartiles=(1, 1), efficiency=1)
    result = RuntimeResult(precision="fp32", description=None, not_measured=None, batches={8: compared})
    macs = {"slim": architecture.macs()}
    name = architecture.dense.name
    measured = Benchmark(run="", model=name, macs=macs, machine=describe(), runtimes={"onnxruntime": result})
    write_json(run / BENCHMARK_FILE, measured.model_dump(mode="json"))
    facts = lowpass.Run(run).publishable().card_facts
    latency, top1 = "onnxruntime fp32, batch 8: ms", "top-1"
    assert {latency, top1} < {figure.what for figure in facts.figures}
    assert "median of 30 runs" in facts.figures[-1].provenance and facts.figures[-1].slim == "12.5"
    SlimViT(architecture.with_keep(3, 20)).save(run)
    assert lowpass.Run(run).publishable().card_facts.figures == ()


def test_paths_of_this_machine_stay_here(slim_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(slim_run, tmp_path / "run"))
    source = tmp_path / "secret" / "model"
    source.mkdir(parents=True)
    (source / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    changed = {"model": str(source), "data": str(tmp_path / "secret" / "pictures"), "architecture": tmp_path / "table"}
    Recipe.load(run).model_copy(update=changed).save(run)
    described = json.loads((run / "architecture.json").read_text())
    described["preprocessing"]["source"] = f"{source}/config.json; a file of {source}; of hf-hub:a/b"
    (run / "architecture.json").write_text(json.dumps(described))
    lowpass.Run(run).publishable().save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert not [path for path in (tmp_path / "out").iterdir() if b"secret" in path.read_bytes()]
    published = SlimViT.from_pretrained(tmp_path / "out")
    assert published.architecture.preprocessing.source == "config.json; a file of model; of hf-hub:a/b"
    agree(published, SlimViT.load(run))
    assert "Images: pictures." in card and "Source model: model." in card
    assert "cc-by-nc-4.0, says the source's README.md" in card
    weights = {"weights": tmp_path / "secret" / "own.pth"}
    Recipe.load(run).model_copy(update=weights).save(run)
    lowpass.Run(run).publishable().save_pretrained(tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text()
    assert "weights own.pth." in card and "Its licence: not known" in card


def test_push_and_load(hub: Hub, slim_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "push", str(slim_run), "--repo", "someone/digits", "--private", "--yes")
    assert set(told["files"]) == set(hub.files["someone/digits"]) == FILES and hub.private == {"someone/digits": True}
    assert hub.files["someone/digits"]["slim.safetensors"] == (slim_run / "slim.safetensors").read_bytes()
    assert TOKEN not in str(told)
    loaded = lowpass.SlimViT.from_pretrained("hf-hub:someone/digits")
    assert loaded.classes == tuple("0123456789")
    agree(loaded, SlimViT.load(slim_run))
    asked = len(hub.asked)
    agree(lowpass.SlimViT.from_pretrained("someone/digits", local_files_only=True), loaded)  # from the cache
    assert len(hub.asked) == asked
    with pytest.raises(InputError, match=r"slim model, not a dense one; .*from_pretrained\('hf-hub:someone/digits'\)"):
        lowpass.load_model("hf-hub:someone/digits")
    # The mixin's own way, from Python.
    lowpass.Run(slim_run).publishable().push_to_hub("someone/other")
    assert set(hub.files["someone/other"]) == FILES
    hub.files["someone/dense"] = {"config.json": b"{}"}
    with pytest.raises(InputError, match="someone/dense holds no slim model"):
        lowpass.SlimViT.from_pretrained("someone/dense")
    with pytest.raises(InputError, match="cannot get someone/nothing"):
        lowpass.SlimViT.from_pretrained("someone/nothing")


def test_push_asks(
    hub: Hub, slim_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["push", str(slim_run), "--repo", "someone/digits"])
    said = capsys.readouterr()
    assert stop.value.code == 2 and "no terminal to ask in; give --yes" in said.err
    assert "to someone/digits on the Hugging Face Hub, public if it is new" in said.err
    assert "slim.safetensors: " in said.err and TOKEN not in said.err and not hub.asked
    monkeypatch.setattr("lowpass.commands.publish.is_terminal", lambda: True)
    for agrees in (False, True):
        monkeypatch.setattr("typer.confirm", lambda *_, agrees=agrees, **__: agrees)
        with pytest.raises(SystemExit) as stop:
            main(["push", str(slim_run), "--repo", "someone/digits"])
        said = capsys.readouterr()
        assert stop.value.code == (0 if agrees else 2) and ("uploaded 4 files" in said.out) is agrees
        assert set(hub.files) == ({"someone/digits"} if agrees else set())


def test_a_pulled_model_is_a_run(hub: Hub, slim_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slim = lowpass.Run(slim_run).publishable()
    slim.push_to_hub("someone/digits")
    told = answer(capsys, "pull", "hf-hub:someone/digits", "--out", str(tmp_path / "run"))
    run = lowpass.Run(tmp_path / "run")
    assert told["slim"]["macs"] == slim.architecture.macs() and told["slim"]["top1"] is told["dense"]["top1"] is None
    assert run.classes == slim.classes and run.dense is None and run.recipe.pulled == "hf-hub:someone/digits"
    agree(run.slim, slim)
    told = answer(capsys, "export", str(run.path))
    assert told["made_images"] and told["largest_difference"] <= 1e-4
    run.publishable().save_pretrained(tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "digits_deit, from hf-hub:someone/digits" in card and "its search is not known" in card
    # A folder will do, and its images are remembered.
    told = answer(capsys, "pull", str(tmp_path / "again"), "--out", str(tmp_path / "other"), "--data", "digits")
    assert told["slim"]["top1"] == lowpass.Run(slim_run).metrics.slim.top1
    assert "is not an empty directory" in refusal(capsys, "pull", "a/b", "--out", str(tmp_path / "run"))
    with pytest.raises(InputError, match="an imported run"):
        read_recipe(tmp_path / "run" / "recipe.yaml")
    asked = commands(run.path, run.recipe, run.metrics, run.architecture, (), (), None)
    assert "lowpass pull hf-hub:someone/digits --out" in asked[-1].lines


def test_a_folder_is_written_without_a_network(
    slim_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    told = answer(capsys, "push", str(slim_run), "--to", str(tmp_path / "out"))
    assert told["folder"] == str(tmp_path / "out") and set(told["files"]) == FILES
    agree(SlimViT.from_pretrained(tmp_path / "out"), SlimViT.load(slim_run))
    assert "is not an empty directory" in refusal(capsys, "push", str(slim_run), "--to", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --repo NAME to upload to, or --to FOLDER"),
        (["--repo", "no spaces allowed"], "'no spaces allowed' cannot be a name on the hub"),
        (["--repo", "a/b/c", "--yes"], "'a/b/c' cannot be a name on the hub"),
        (["--repo", "someone/digits", "--yes"], "there is no token to upload with: run `hf auth login`"),
    ],
)
def test_bad_pushes_are_refused(
    slim_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("lowpass.pipeline.model.hub.get_token", lambda: None)
    assert message in refusal(capsys, "push", str(slim_run), *options)


def test_a_folder_that_is_no_model_is_refused(
    slim_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make_vit: MakeViT
) -> None:
    assert "a run directory?" in refusal(capsys, "push", str(tmp_path), "--to", str(tmp_path / "out"))
    with pytest.raises(InputError, match="there is no folder"):
        SlimViT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot read .*architecture.json"):
        SlimViT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds another model"):
        SlimViT.from_timm(make_vit()).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()
    with pytest.raises(InputError, match=r"slim model, not a dense one; load it with lowpass.SlimViT.from_pretrained"):
        lowpass.load_model(str(slim_run))


def test_what_the_hub_refuses_fails_in_a_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.HFValidationError("403 Forbidden\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(RunError, match=r"^the hub did not take someone/digits: 403 Forbidden$"):
        upload(tmp_path, "someone/digits", private=False)
