"""What a deploy must not take, change or pass over in silence; no server here."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from served import ONE, PICTURES

from lowpass.export.triton.canary import abort_canary, promote_canary, start_canary
from lowpass.export.triton.config import as_text, parse_config
from lowpass.export.triton.decode import AROUND_OF
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy, prune_versions, roll_back
from lowpass.export.triton.version import CONFIG_FILE, FACTS_FILE, SUMS_FILE, served_version, versions_of
from lowpass.pipeline.base.errors import InputError

TOP = 'backend: "python"\nparameters { key: "top" value { string_value: "5" } }'
ENSEMBLE = 'platform: "ensemble"'


@pytest.mark.parametrize(("what", "text"), [("labels", TOP), ("prepare", TOP), ("pictures", ENSEMBLE)])
def test_somebodys_models_that_look_like_ours_are_left_alone(run: Path, repository: Path, what: str, text: str) -> None:
    for _ in range(3):
        deploy(run, repository, "digits", ONE)
    own = repository / f"digits-{what}"
    for version in (1, 2, 3):
        (own / str(version)).mkdir(parents=True)
    before = f'name: "{own.name}"\n{text}\nversion_policy {{ specific {{ versions: 3 }} }}\n'
    (own / CONFIG_FILE).write_text(before)
    with pytest.raises(InputError, match=f"digits-{what} is in the place of what --decode puts around digits"):
        deploy(run, repository, "digits", PICTURES)
    deploy(run, repository, "digits", ONE)
    roll_back(repository, "digits")
    removed = prune_versions(repository, ["digits"], 1)
    assert {one.name for one in removed} == {"digits"}
    assert versions_of(own) == (1, 2, 3) and (own / CONFIG_FILE).read_text() == before


def test_what_stands_around_a_model_is_no_name_for_another(run: Path, repository: Path) -> None:
    deploy(run, repository, "digits", PICTURES)
    for what in ("prepare", "labels", "pictures"):
        with pytest.raises(InputError, match=f"digits-{what} stands around digits, see --decode"):
            deploy(run, repository, f"digits-{what}", ONE)
        assert versions_of(repository / f"digits-{what}") == (1,)
    deploy(run, repository, "others-labels", ONE)  # of no model that takes pictures


def test_pictures_from_before_they_were_marked_are_still_looked_after(
    run: Path, repository: Path, tmp_path: Path
) -> None:
    deploy(run, repository, "digits", PICTURES)
    for what in ("prepare", "labels", "pictures"):
        for config in (repository / f"digits-{what}").rglob(CONFIG_FILE):
            unmarked = parse_config(config.read_text(), str(config))
            del unmarked.parameters[AROUND_OF]
            config.write_text(as_text(unmarked))
    other = tmp_path / "labels.txt"
    other.write_text("".join(f"new {digit}\n" for digit in range(10)))
    with pytest.raises(InputError, match="digits-pictures stands around digits, and this version differs in labels"):
        deploy(run, repository, "digits", DeployOptions(instances=1, threads=1, labels=other))
    deploy(run, repository, "digits", PICTURES)
    assert versions_of(repository / "digits-pictures") == (1, 2)


def emptied(folder: Path) -> None:
    for name in (SUMS_FILE, "model.onnx", FACTS_FILE):
        (folder / name).write_bytes(b"")


def ends_early(folder: Path) -> None:
    lines = (folder / SUMS_FILE).read_text().splitlines(keepends=True)
    (folder / SUMS_FILE).write_text("".join(line for line in lines if "labels.txt" not in line))
    (folder / "labels.txt").write_text("another\n" * 10)


def without_sums(folder: Path) -> None:
    (folder / SUMS_FILE).unlink()
    (folder / "labels.txt").write_text("another\n" * 10)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (emptied, r"SHA256SUMS does not list config\.pbtxt: it was damaged"),
        (ends_early, r"SHA256SUMS does not list labels\.txt: it was damaged"),
        (without_sums, "has lost its SHA256SUMS"),
    ],
)
def test_sums_that_are_damaged_let_nothing_pass(
    run: Path, repository: Path, damage: Callable[[Path], None], said: str
) -> None:
    for _ in range(2):
        deploy(run, repository, "digits", ONE)
    damage(repository / "digits" / "1")
    with pytest.raises(InputError, match=said):
        roll_back(repository, "digits")
    assert served_version(repository / "digits") == 2


def test_a_version_of_another_model_is_not_served(run: Path, repository: Path) -> None:
    deploy(run, repository, "other", ONE)
    deploy(run, repository, "digits", DeployOptions(instances=1, threads=1, version=2))
    shutil.copytree(repository / "other" / "1", repository / "digits" / "1")
    with pytest.raises(InputError, match="is of a model 'other'"):
        roll_back(repository, "digits")


def test_versions_that_somebody_serves_stay(run: Path, repository: Path) -> None:
    for _ in range(4):
        deploy(run, repository, "digits", ONE)
    config = repository / "digits" / CONFIG_FILE
    assert "versions: 4" in config.read_text()
    config.write_text(config.read_text().replace("versions: 4", "versions: 1\n    versions: 4"))
    prune_versions(repository, ["digits"], 1)
    assert versions_of(repository / "digits") == (1, 3, 4)


def test_what_is_on_trial_is_no_way_back(run: Path, repository: Path) -> None:
    for _ in range(2):
        deploy(run, repository, "digits", ONE)
    start_canary(run, repository, "digits", ONE, 10)  # version 3
    deploy(run, repository, "digits", ONE)  # version 4
    assert roll_back(repository, "digits").version == 2
    abort_canary(repository, "digits")
    assert versions_of(repository / "digits") == (1, 2, 4)


def test_a_canary_has_its_classes_in_the_same_order(run: Path, repository: Path, tmp_path: Path) -> None:
    deploy(run, repository, "digits", ONE)
    turned = tmp_path / "labels.txt"
    turned.write_text("".join(f"{digit}\n" for digit in reversed(range(10))))
    with pytest.raises(InputError, match="digits has the new version's classes in another order"):
        start_canary(run, repository, "digits", DeployOptions(instances=1, threads=1, labels=turned), 10)
    assert versions_of(repository / "digits") == (1,) and not (repository / "digits-canary").exists()


def test_a_canary_whose_start_was_killed_can_be_started_again(run: Path, repository: Path) -> None:
    deploy(run, repository, "digits", ONE)
    (repository / "digits-canary" / ".2.abcd.part").mkdir(parents=True)
    start_canary(run, repository, "digits", ONE, 10)
    assert promote_canary(repository, "digits").version == 2
    (repository / "digits-canary" / "mine").mkdir(parents=True)
    with pytest.raises(InputError, match="digits-canary is no canary of digits, and in its place"):
        start_canary(run, repository, "digits", ONE, 10)


@pytest.mark.parametrize("name", ["caf\udce9", "two\rlines", "two\nlines"])
def test_classes_that_are_no_line_of_text_are_refused(run: Path, repository: Path, tmp_path: Path, name: str) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run"))
    text = json.dumps(json.loads((other / "classes.json").read_text()))
    assert '"3"' in text
    (other / "classes.json").write_text(text.replace('"3"', json.dumps(name)))
    with pytest.raises(InputError, match=r"class 3 is called .*(is no text|one line)"):
        deploy(other, repository, "digits", ONE)
    assert not repository.exists()


def test_a_benchmark_of_another_form_is_none(run: Path, repository: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run"))
    (other / "benchmark.json").write_text('{"runtimes": {"onnxruntime": {"batches": []}}}')
    assert deploy(other, repository, "digits", ONE).version == 1


def test_others_can_enter_every_folder_that_is_made(run: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        deploy(run, tmp_path / "a" / "b" / "repo", "digits", ONE)
    finally:
        os.umask(before)
    for folder in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "repo"):
        assert folder.stat().st_mode & 0o755 == 0o755


def test_an_abort_that_cannot_end_removes_nothing(run: Path, repository: Path) -> None:
    deploy(run, repository, "digits", ONE)
    start_canary(run, repository, "digits", ONE, 10)
    config = repository / "digits" / CONFIG_FILE
    said = {
        "latest": (
            re.sub(r"version_policy \{.*?\n\}\n", "", config.read_text(), flags=re.DOTALL),
            "does not say which",
        ),
        "garbage": ("name: of nothing", "is not a Triton configuration"),
    }
    for text, message in said.values():
        config.write_text(text)
        with pytest.raises(InputError, match=message):
            abort_canary(repository, "digits")
        assert versions_of(repository / "digits") == (1, 2) and (repository / "digits-canary" / CONFIG_FILE).exists()
