"""Versions and configurations that somebody damaged: not served, said, and mended; no server here."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from served import ONE

from lowpass.export.triton.canary import abort_canary, promote_canary, start_canary
from lowpass.export.triton.decode import DecodeLimits
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy, list_versions, prune_versions, roll_back
from lowpass.export.triton.version import CONFIG_FILE, SUMS_FILE, served_version, unreadable_configs, versions_of
from lowpass.pipeline.base.errors import InputError


def snapshot(model: Path) -> dict[str, bytes]:
    return {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}


def other_version(folder: Path) -> None:
    (folder / CONFIG_FILE).write_bytes((folder.parent / "2" / CONFIG_FILE).read_bytes())


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "model": (
        lambda folder: (folder / "model.onnx").write_bytes(b"damaged"),
        r"1/model\.onnx is not what was deployed",
    ),
    "code gone": (lambda folder: (folder / "model.py").unlink(), r"1/model\.py is not what was deployed"),
    "labels emptied": (lambda folder: (folder / "labels.txt").write_text(""), r"1/labels\.txt is not what was"),
    "labels gone": (lambda folder: (folder / "labels.txt").unlink(), r"1/labels\.txt is not what was deployed"),
    "facts": (lambda folder: (folder / "version.json").write_text("{"), r"1/version\.json is not what was deployed"),
    "config of another": (other_version, r"1/config\.pbtxt does not serve version 1"),
    "config empty": (lambda folder: (folder / CONFIG_FILE).write_text(""), r"1/config\.pbtxt is empty"),
    "config no text": (
        lambda folder: (folder / CONFIG_FILE).write_bytes(b"\xff\xfe"),
        r"1/config\.pbtxt cannot be read",
    ),
    "config gone": (lambda folder: (folder / CONFIG_FILE).unlink(), r"1 has no config\.pbtxt: it was taken away"),
    "sums": (lambda folder: (folder / SUMS_FILE).write_bytes(b"\xff"), r"1/SHA256SUMS cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_version_is_not_rolled_back_to(run: Path, repository: Path, damage: str) -> None:
    for _ in range(2):
        deploy(run, repository, "digits", ONE)
    break_, said = DAMAGES[damage]
    break_(repository / "digits" / "1")
    before = snapshot(repository / "digits")
    with pytest.raises(InputError, match=said):
        roll_back(repository, "digits")
    assert snapshot(repository / "digits") == before and served_version(repository / "digits") == 2


CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "garbage": (lambda path: path.write_text("name: of nothing"), "is not a Triton configuration"),
    "empty": (lambda path: path.write_text(" "), "is empty"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
    "gone": (lambda path: path.unlink(), "is gone, digits is not served"),
    "no such version": (lambda path: shutil.rmtree(path.with_name("2")), "serves version 2, which is not there"),
    "no such labels": (lambda path: (path.with_name("2") / "labels.txt").unlink(), "labels.txt is not there"),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_what_damages_a_served_model_is_said_and_mended(run: Path, repository: Path, damage: str) -> None:
    for _ in range(2):
        deploy(run, repository, "digits", ONE)
    model = repository / "digits"
    assert unreadable_configs(repository) == {}
    break_, said = CONFIGS[damage]
    break_(model / CONFIG_FILE)
    (line,) = unreadable_configs(repository).values()
    assert said in line and "--rollback --version N` writes that of a version that is there" in line
    if damage in ("garbage", "empty", "no text", "gone"):
        with pytest.raises(InputError):  # nothing is removed where nobody knows what serves
            prune_versions(repository, ["digits"], 1)
    assert versions_of(model)[0] == 1 and roll_back(repository, "digits", 1).version == 1
    assert unreadable_configs(repository) == {} and list_versions(repository)[0].serves


def test_a_model_that_is_called_like_a_canary_is_nobodys_canary(run: Path, repository: Path) -> None:
    for name in ("digits", "digits-canary"):
        deploy(run, repository, name, ONE)
    before = snapshot(repository / "digits-canary")
    for work in (promote_canary, abort_canary):
        with pytest.raises(InputError, match="digits has no canary"):
            work(repository, "digits")
    with pytest.raises(InputError, match="digits-canary is no canary of digits, and in its place"):
        start_canary(run, repository, "digits", ONE, 10)
    assert snapshot(repository / "digits-canary") == before and versions_of(repository / "digits") == (1,)


def test_what_is_missing_is_said_with_the_command_that_makes_it(run: Path, repository: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("*.onnx")))
    for dense, precision, said in ((True, "fp32", "--precision fp32 --dense"), (False, "fp16", "--precision fp16")):
        with pytest.raises(InputError, match=f"run `lowpass export {bare} {said}` first"):
            deploy(bare, repository, "digits", DeployOptions(precision=precision), dense=dense)  # type: ignore[arg-type]


def test_a_model_that_is_called_like_what_takes_pictures_is_somebodys(run: Path, repository: Path) -> None:
    for name in ("digits", "digits-prepare", "digits-prepare", "digits-pictures", "digits-pictures"):
        deploy(run, repository, name, ONE)
    before = {name: snapshot(repository / name) for name in ("digits-prepare", "digits-pictures")}
    with pytest.raises(InputError, match="is in the place of what --decode puts around digits; give another --name"):
        deploy(run, repository, "digits", replace(ONE, decode=DecodeLimits()))
    assert prune_versions(repository, ["digits"], 1) == []
    deploy(run, repository, "digits", ONE)
    assert {name: snapshot(repository / name) for name in before} == before
