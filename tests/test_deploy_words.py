"""How a deploy ends that cannot go on: leftovers are cleared away, what is wrong is named, and what helps is said."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import printed, refusal
from mounts import private_mounts
from served import ONE, PICTURES, ROOT

from lowpass.cli import main
from lowpass.export.triton.canary import abort_canary, promote_canary, start_canary
from lowpass.export.triton.client import CANARY_SHARE
from lowpass.export.triton.removal import remove_decode
from lowpass.export.triton.repository import deploy, list_versions, prune_versions, roll_back
from lowpass.export.triton.version import (
    CONFIG_FILE,
    FACTS_FILE,
    SUMS_FILE,
    facts_of,
    served_config,
    served_version,
    unreadable_configs,
    versions_of,
)
from lowpass.pipeline.base.errors import InputError

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from lowpass.export.triton.repository import prune_versions
shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
prune_versions(Path(sys.argv[1]), ["digits"], 1)
"""


def test_what_a_killed_prune_left_is_cleared_away_by_whatever_comes_next(run: Path, repository: Path) -> None:
    for _ in range(3):
        deploy(run, repository, "digits", PICTURES)
    model = repository / "digits"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(repository)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL and versions_of(model) == (2, 3)
    (left,) = model.glob(".*.part")
    assert (left / "removed" / CONFIG_FILE).is_file()
    kept = repository.parent / "kept"
    shutil.copytree(left, kept)
    mine = [model / ".mine.part", model / ".1.part", repository / "digits-dense" / ".1.abc.part"]
    for path in mine:
        path.mkdir(parents=True)

    def again() -> None:
        for at in (model, repository / "digits-prepare", repository / "digits-canary"):
            if at.exists():
                shutil.copytree(kept, at / left.name, dirs_exist_ok=True)

    works: list[Callable[[], Any]] = [
        lambda: roll_back(repository, "digits"),
        lambda: roll_back(repository, "digits"),  # which is refused
        lambda: prune_versions(repository, ["digits"], 9),
        lambda: start_canary(run, repository, "digits", ONE, 10),
        lambda: promote_canary(repository, "digits"),
        lambda: start_canary(run, repository, "digits", ONE, 10),
        lambda: abort_canary(repository, "digits"),
        lambda: deploy(run, repository, "digits", ONE),
        lambda: remove_decode(repository, ["digits"]),
    ]
    for work in works:
        again()
        try:
            work()
        except InputError as error:
            assert "has no version before 2" in str(error)
        assert sorted(path for path in repository.rglob("*.part")) == sorted(mine)


@pytest.mark.parametrize("asking", [(), ("--name", "good"), ("--json",)])
def test_one_damaged_model_hides_no_other(
    run: Path, repository: Path, asking: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "garbage", "gone", "good"):
        deploy(run, repository, name, ONE)
    (repository / "garbage" / CONFIG_FILE).write_text("name: of nothing")
    (repository / "gone" / CONFIG_FILE).unlink()
    (repository / "theirs").mkdir()
    (repository / "theirs" / CONFIG_FILE).write_bytes(b"\xff")
    with pytest.raises(SystemExit) as stop:
        main(["deploy", "--repository", str(repository), "--list", *asking])
    said = capsys.readouterr()
    if "--name" in asking:
        assert stop.value.code == 0 and said.err == ""
        return
    assert stop.value.code == 1 and said.err.count("\n") == 1
    for path, what in (("garbage", "is not a Triton"), ("gone", "is gone"), ("theirs", "cannot be read")):
        assert f"{repository / path / CONFIG_FILE} {what}" in said.err
    if "--json" in asking:
        told = json.loads(said.out)
        assert set(told["damaged"]) == {"garbage", "gone", "theirs"}
        listed = [(one["name"], one["version"], one["serves"]) for one in told["versions"]]
    else:
        rows = [line.split() for line in said.out.splitlines()[1:]]
        listed = [(row[0], int(row[1]), row[2] == "serves") for row in rows]
    assert listed == [("garbage", 1, False), ("gone", 1, False), ("good", 1, False), ("good", 2, True)]


def test_a_damaged_model_that_was_asked_for_is_named(
    run: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy(run, repository, "digits", ONE)
    (repository / "digits" / CONFIG_FILE).write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["deploy", "--repository", str(repository), "--list", "--name", "digits"])
    said = capsys.readouterr()
    assert (
        stop.value.code == 1 and "config.pbtxt is empty" in said.err and said.out.splitlines()[1].startswith("digits")
    )


OWN = {
    "garbage": lambda folder: (folder / CONFIG_FILE).write_text("name: of nothing"),
    "empty": lambda folder: (folder / CONFIG_FILE).write_text(""),
    "gone": lambda folder: (folder / CONFIG_FILE).unlink(),
    "model": lambda folder: (folder / "model.onnx").write_bytes(b"damaged"),
    "sums gone": lambda folder: (folder / SUMS_FILE).unlink(),
    "sums empty": lambda folder: (folder / SUMS_FILE).write_bytes(b""),
}


@pytest.mark.parametrize("damage", OWN)
def test_the_remedy_of_a_damaged_version_is_another_one(run: Path, repository: Path, damage: str) -> None:
    """Not the command that has just failed; and what is said helps."""
    for _ in range(3):
        deploy(run, repository, "digits", ONE)
    OWN[damage](repository / "digits" / "2")
    with pytest.raises(InputError) as refused:
        roll_back(repository, "digits")
    assert str(refused.value).endswith("; serve another with --version, or deploy the run once more")
    assert "--rollback" not in str(refused.value)
    assert roll_back(repository, "digits", 1).version == 1
    assert deploy(run, repository, "digits", ONE).version == 4


@pytest.mark.parametrize("damage", OWN)
def test_a_damaged_trial_is_aborted(run: Path, repository: Path, damage: str) -> None:
    """`--promote` takes no --version."""
    deploy(run, repository, "digits", ONE)
    start_canary(run, repository, "digits", ONE, 10)
    OWN[damage](repository / "digits" / "2")
    with pytest.raises(InputError, match=r"; --abort takes the tried version away; then try the run once more$"):
        promote_canary(repository, "digits")
    assert abort_canary(repository, "digits").version == 1
    start_canary(run, repository, "digits", ONE, 10)
    assert promote_canary(repository, "digits").version == 2


def test_several_served_by_hand_stop_no_abort(run: Path, repository: Path) -> None:
    for _ in range(2):
        deploy(run, repository, "digits", ONE)
    start_canary(run, repository, "digits", ONE, 10)
    config = repository / "digits" / CONFIG_FILE
    config.write_text(config.read_text().replace("versions: 2", "versions: 1\n    versions: 2"))
    assert abort_canary(repository, "digits").version == 2
    assert versions_of(repository / "digits") == (1, 2) and not (repository / "digits-canary").exists()


@pytest.mark.parametrize(("share", "kept"), [(99.99999999, "99.99999999"), (1e-7, "1e-07"), (10.0, "10"), (25, "25")])
def test_a_share_is_kept_as_it_was_given(run: Path, repository: Path, share: float, kept: str) -> None:
    deploy(run, repository, "digits", ONE)
    model = start_canary(run, repository, "digits", ONE, share).path
    said = served_config(model).parameters[CANARY_SHARE].string_value
    assert said == kept and float(said) == share


@pytest.mark.parametrize("share", ["nan", "inf", "-1", "0", "100", "100.00000001"])
def test_what_is_no_share_is_said_alone(
    run: Path, repository: Path, share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "deploy", str(run), "--repository", str(repository), "--canary", share)
    assert said == f"lowpass: --canary {share} is not between 0 and 100 percent; give a share such as 10"
    with pytest.raises(InputError, match="is not between 0 and 100"):
        start_canary(run, repository, "digits", ONE, float(share))
    assert not repository.exists()


def test_threads_are_counted(
    run: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    caplog.set_level(logging.WARNING, "lowpass")
    for instances, threads in ((None, None), (2, 4), (None, 4), (3, None), (8, 1)):
        deploy(run, repository, "digits", replace(ONE, instances=instances, threads=threads))
    assert not caplog.records
    deploy(run, repository, "digits", replace(ONE, instances=2, threads=8))
    assert "are 16 threads, more than the 8 cores" in caplog.text and "--instances 2 --threads 4" in caplog.text
    caplog.clear()
    deploy(run, repository, "digits", replace(ONE, instances=16, threads=None))
    assert "are 16 threads" in caplog.text and "--instances 8 --threads 1" in caplog.text
    for instances, threads in ((2, 1024), (1024, 1024), (1024, 2)):
        with pytest.raises(InputError, match=f"are {instances * threads} threads, and the most are 1024"):
            deploy(run, repository, "digits", replace(ONE, instances=instances, threads=threads))


def test_facts_of_another_lowpass_are_read(run: Path, repository: Path) -> None:
    """Such as of before, when they had a sum that nobody read."""
    path = deploy(run, repository, "digits", ONE).path
    facts = path / "1" / FACTS_FILE
    told = json.loads(facts.read_text())
    assert "sha256" not in told
    before = facts_of(path, 1)
    facts.write_text(json.dumps(told | {"sha256": "0" * 64}))
    assert before is not None and facts_of(path, 1) == before


def test_a_repository_is_a_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to("nothing")
    long, deep = "n" * 300, "/".join(["n" * 200] * 30)
    for repository, said in (
        ("file", "file is a file; a repository is a folder"),
        ("file/below", "file/below cannot be had (Not a directory): something else is in its place or above it"),
        ("nowhere", "nowhere cannot be had (File exists): something else is in its place"),
        (long, "longer than this file system takes; give a shorter --repository or --name"),
        (deep, "longer than this file system takes; give a shorter --repository or --name"),
    ):
        assert said in refusal(capsys, "deploy", str(run), "--repository", repository)
    for words in (
        ("deploy", "--list", "--repository"),
        ("deploy", "--name", "digits", "--rollback", "--repository"),
        ("serve",),
    ):
        assert "file is a file; a repository is a folder" in refusal(capsys, *words, "file")
        assert "longer than this file system takes" in refusal(capsys, *words, long)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "nowhere"}


FULL = """
import subprocess, sys
from lowpass.cli import main
run, repository = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", repository], check=True)
for _ in range(9):
    try:
        main(["deploy", run, "--repository", repository, "--name", "digits"])
    except SystemExit as end:
        print(end.code, flush=True)
        if end.code:
            break
subprocess.run(["find", repository, "-name", "*.part"], check=True)
main(["deploy", "--repository", repository, "--list"])
"""


def test_a_full_disk_is_a_failure_that_leaves_nothing_half_written(run: Path, repository: Path) -> None:
    repository.mkdir()
    command = [*private_mounts(), sys.executable, "-c", FULL, str(run), str(repository)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(f"{repository}/digits: version")]
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("lowpass: ")]
    versions = lines.index("1")
    assert lines[:versions] == ["0"] * versions and 1 <= versions < 9
    assert said.startswith(f"lowpass: cannot write {repository}/digits/{versions + 1}: No space left on device")
    assert [line.split()[:2] for line in lines[versions + 2 :]] == [["digits", str(n + 1)] for n in range(versions)]


def test_files_that_are_gone_from_what_serves_are_told(run: Path, repository: Path) -> None:
    """The server goes on with what it has loaded, and says nothing."""
    deploy(run, repository, "digits", PICTURES)
    for name in ("digits/1/model.onnx", "digits/1/model.py", "digits-prepare/1/model.py"):
        content = (repository / name).read_bytes()
        (repository / name).unlink()
        (line,) = unreadable_configs(repository).values()
        assert line.startswith(
            f"{repository / name} is not there, which {repository / name.split('/')[0] / CONFIG_FILE}"
        )
        (repository / name).write_bytes(content)
    assert unreadable_configs(repository) == {}
    assert f"{repository / 'away'} cannot be read" in unreadable_configs(repository / "away")[repository / "away"]


def test_pictures_are_taken_away_and_nothing_else(
    run: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lowpass")
    to = ("deploy", "--repository", str(repository), "--name", "digits", "--remove-decode")
    deploy(run, repository, "digits", ONE)
    assert f"nothing that --decode makes stands around digits in {repository}" in refusal(capsys, *to)
    assert "digits-pictures" not in caplog.text
    deploy(run, repository, "digits", PICTURES)
    deploy(run, repository, "digits", ONE)
    assert "digits-pictures stands around this version, too; --remove-decode takes it away" in caplog.text
    deploy(run, repository, "other-labels", ONE)  # somebody's
    inner = ("deploy", "--repository", str(repository), "--name", "digits-labels", "--remove-decode")
    assert "it stands around digits itself: give --name digits" in refusal(capsys, *inner)
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    names = ("digits-pictures", "digits-labels", "digits-prepare")
    assert printed(capsys, *to).splitlines() == [f"{name}: removed" for name in names]
    after = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    assert after == {path: one for path, one in before.items() if path.relative_to(repository).parts[0] not in names}
    assert served_version(repository / "digits") == 3
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"Ziffer {digit}\n" for digit in range(10)), encoding="utf-8")
    assert deploy(run, repository, "digits", replace(PICTURES, labels=labels)).version == 4  # free again
    told = json.loads(printed(capsys, *to, "--json"))
    assert told["removed"] == [{"name": name} for name in names]


def test_pictures_whose_removal_was_killed_are_taken_away_by_the_next(run: Path, repository: Path) -> None:
    deploy(run, repository, "digits", PICTURES)
    shutil.rmtree(repository / "digits-pictures")
    shutil.rmtree(repository / "digits-labels")
    assert [path.name for path in remove_decode(repository, ["digits"])] == ["digits-prepare"]
    assert {path.name for path in repository.iterdir() if path.is_dir()} == {"digits"}


def test_somebodys_own_pictures_are_not_taken_away(run: Path, repository: Path) -> None:
    for name in ("digits", "digits-pictures", "digits-prepare", "digits-labels"):
        deploy(run, repository, name, ONE)
    before = [one.name for one in list_versions(repository)]
    with pytest.raises(InputError, match="nothing that --decode makes stands around digits"):
        remove_decode(repository, ["digits"])
    assert [one.name for one in list_versions(repository)] == before


def test_labels_that_somebody_took_from_what_stands_around(run: Path, repository: Path) -> None:
    deploy(run, repository, "digits", PICTURES)
    (repository / "digits-labels" / "1" / "labels.txt").unlink()
    with pytest.raises(InputError, match=r"labels\.txt cannot be read .*--remove-decode, then deploy with --decode"):
        deploy(run, repository, "digits", ONE)
    remove_decode(repository, ["digits"])
    assert deploy(run, repository, "digits", PICTURES).version == 2
