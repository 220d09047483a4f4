"""A Triton repository says what it serves, its versions are whole, and what is none is refused; no server here."""

import inspect
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import printed, refusal
from mounts import private_mounts
from served import ONE, ROOT, exported

import lowpass.export.triton.repository
from lowpass.cli import main
from lowpass.commands.deploy import deploy as deploy_command
from lowpass.export.onnx.file import current_onnx
from lowpass.export.tensorrt.plan import build, manifest_path
from lowpass.export.triton.canary import abort_canary, promote_canary, start_canary
from lowpass.export.triton.config import GRAPH_SIZES, parse_config
from lowpass.export.triton.decode import DecodeLimits
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import (
    deploy,
    deploy_models,
    list_versions,
    prune_versions,
    roll_back,
    roll_back_models,
)
from lowpass.export.triton.server import find_server
from lowpass.export.triton.version import (
    CONFIG_FILE,
    SUMS_FILE,
    served_version,
    versions_of,
)
from lowpass.export.triton.writers import LOCK_FILE
from lowpass.pipeline.base.errors import InputError


@pytest.fixture(scope="module")
def run(run: Path) -> Path:
    exported(run, "fp32", dense=True)
    return run


def served_config(model: Path):  # type: ignore[no-untyped-def]
    return parse_config((model / CONFIG_FILE).read_text(), "config")


def snapshot(model: Path) -> dict[str, bytes]:
    return {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}


def test_a_repository_says_what_it_serves(run: Path, repository: Path) -> None:
    for backend in ("python", "onnxruntime"):
        done = deploy(run, repository, backend, DeployOptions(backend=backend))  # type: ignore[arg-type]
        config = served_config(done.path)
        assert config.backend == backend and config.max_batch_size == 8
        assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
        assert config.dynamic_batching.max_queue_delay_microseconds > 0
        queue = config.dynamic_batching.default_queue_policy
        assert queue.max_queue_size == 256 and queue.default_timeout_microseconds == 5_000_000
        assert list(config.version_policy.specific.versions) == [1]
        assert len(config.model_warmup) == 3 and config.instance_group[0].count >= 1
        assert not config.optimization.HasField("graph")  # unset: all of ONNX Runtime's optimisations
        labels = done.path / config.output[0].label_filename
        assert labels.read_text().split() == [str(digit) for digit in range(10)]
        assert (done.path / "1" / "model.onnx").read_bytes() == current_onnx(run, "fp32").read_bytes()
        assert (done.path / "1" / CONFIG_FILE).read_bytes() == (done.path / CONFIG_FILE).read_bytes()
    with pytest.raises(InputError, match="already holds version 1"):
        deploy(run, repository, "python", DeployOptions(version=1))
    with pytest.raises(InputError, match="no version before 1"):
        roll_back(repository, "python")
    assert versions_of(repository / "python") == (1,)
    assert not list(repository.parent.rglob("*.part"))


def test_a_version_comes_back_with_all_that_belongs_to_it(run: Path, repository: Path, tmp_path: Path) -> None:
    """Another batch limit, input, labels, queue and backend: what belongs to a version is in its own folder."""
    deploy(run, repository, "digits", ONE)
    model = repository / "digits"
    first = snapshot(model)
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"Ziffer {digit}\n" for digit in range(10)), encoding="utf-8")
    exported(run, "fp32", input="uint8")
    try:
        deploy(run, repository, "digits", DeployOptions(backend="onnxruntime", labels=labels, queue_limit=3))
    finally:
        exported(run, "fp32")
    second = served_config(model)
    assert second.backend == "onnxruntime" and list(second.input[0].dims) == [32, 32, 3]
    assert (model / second.output[0].label_filename).read_text().startswith("Ziffer 0\n")
    assert roll_back(repository, "digits").version == 1
    assert {name: content for name, content in snapshot(model).items() if not name.startswith("2/")} == first
    assert roll_back(repository, "digits", 2).backend == "onnxruntime" and served_config(model) == second


def test_versions_are_listed_and_pruned(run: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(4):
        deploy(run, repository, "digits", ONE)
    deploy(run, repository, "digits-dense", ONE, dense=True)
    roll_back(repository, "digits", 1)
    listed = list_versions(repository)
    assert [(one.name, one.version, one.serves) for one in listed] == [
        *(("digits", version, version == 1) for version in (1, 2, 3, 4)),
        ("digits-dense", 1, True),
    ]
    slim, dense = listed[0].facts, listed[-1].facts
    assert slim and dense and slim.macs < dense.macs and slim.kind == "slim" and dense.kind == "dense"
    assert slim.top1 is not None and slim.max_batch == 8
    start_canary(run, repository, "digits", ONE, 10)  # version 5
    roll_back(repository, "digits", 2)
    assert [one.version for one in prune_versions(repository, ["digits"], 1)] == [3, 4]
    assert versions_of(repository / "digits") == (1, 2, 5)  # the way back; served; tried and newest
    deploy(run, repository, "digits", ONE)
    assert [one.version for one in prune_versions(repository, ["digits"], 1)] == [1, 2]
    assert versions_of(repository / "digits") == (5, 6)
    table = printed(capsys, "deploy", "--repository", str(repository), "--list")
    assert [line.split()[:3] for line in table.splitlines()[1:3]] == [
        ["digits", "5", "slim"],
        ["digits", "6", "serves"],
    ]
    removed = printed(capsys, "deploy", "--repository", str(repository), "--name", "digits", "--prune", "9", "--json")
    assert json.loads(removed)["removed"] == []
    assert not list(repository.rglob("*.part"))


def test_a_canary_is_promoted_or_taken_away(run: Path, repository: Path) -> None:
    with pytest.raises(InputError, match="there is no model digits"):
        start_canary(run, repository, "digits", ONE, 10)
    deploy(run, repository, "digits", ONE)
    before = snapshot(repository / "digits")
    done = start_canary(run, repository, "digits", ONE, 12.5)
    assert (done.name, done.version, done.path) == ("digits-canary", 2, repository / "digits-canary")
    assert served_config(done.path).parameters["canary_share"].string_value == "12.5"
    assert served_version(repository / "digits") == 1  # as before
    with pytest.raises(InputError, match="has a canary, version 2"):
        start_canary(run, repository, "digits", ONE, 10)
    with pytest.raises(InputError, match="digits-canary is a model on trial"):
        deploy(run, repository, "digits-canary", ONE)
    tried = snapshot(done.path / "2")
    assert promote_canary(repository, "digits").version == 2 and not done.path.exists()
    promoted = snapshot(repository / "digits" / "2")
    no_name = {CONFIG_FILE: b"", SUMS_FILE: b""}
    assert tried | no_name == promoted | no_name  # they differ in the name alone
    roll_back(repository, "digits")
    start_canary(run, repository, "digits", ONE, 10)
    written = (repository / "digits" / CONFIG_FILE).stat().st_mtime_ns
    assert abort_canary(repository, "digits").version == 1
    assert (repository / "digits" / CONFIG_FILE).stat().st_mtime_ns == written  # nothing for a server to load anew
    assert versions_of(repository / "digits") == (1, 2) and not (repository / "digits-canary").exists()
    after = snapshot(repository / "digits")
    assert {name: content for name, content in after.items() if not name.startswith("2/")} == before
    with pytest.raises(InputError, match="has no canary"):
        promote_canary(repository, "digits")
    exported(run, "fp32", input="uint8")
    try:
        with pytest.raises(InputError, match="takes other inputs"):
            start_canary(run, repository, "digits", ONE, 10)
    finally:
        exported(run, "fp32")
    assert not list(repository.rglob("*.part"))


def test_what_stands_around_a_model_goes_with_all_its_versions(
    run: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy(run, repository, "digits", ONE)
    with_pictures = replace(ONE, decode=DecodeLimits(bytes=1000))
    done = deploy_models(run, repository, {"digits": False}, with_pictures)
    assert [(one.name, one.version) for one in done] == [
        (name, 2) for name in ("digits", "digits-prepare", "digits-labels", "digits-pictures")
    ]
    prepare = served_config(repository / "digits-prepare")
    assert prepare.parameters["decode_bytes"].string_value == "1000"
    ensemble = served_config(repository / "digits-pictures")
    assert list(ensemble.version_policy.specific.versions) == [2] and len(ensemble.ensemble_scheduling.step) == 3
    assert roll_back(repository, "digits").version == 1  # it takes the same pictures
    assert roll_back(repository, "digits-prepare", 2).version == 2
    assert deploy(run, repository, "digits", ONE).version == 3
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"Ziffer {digit}\n" for digit in range(10)), encoding="utf-8")
    before = snapshot(repository)
    for other in (replace(ONE, labels=labels), replace(with_pictures, labels=labels)):
        with pytest.raises(InputError, match=r"digits-pictures stands around digits.* differs in labels"):
            deploy(run, repository, "digits", other)
    exported(run, "fp32", input="uint8")
    try:
        with pytest.raises(InputError, match="differs in input; deploy it under another --name"):
            deploy(run, repository, "digits", ONE)
    finally:
        exported(run, "fp32")
    start_canary(run, repository, "digits", ONE, 10)
    abort_canary(repository, "digits")
    assert snapshot(repository) == before
    assert deploy(run, repository, "digits", with_pictures).version == 4
    removed = prune_versions(repository, ["digits"], 1)
    assert [(one.name, one.version) for one in removed] == [
        ("digits", 1),
        ("digits", 2),
    ]  # the way back is kept, of those around it too
    assert "digits-pictures" in printed(capsys, "deploy", "--repository", str(repository), "--list")


def test_a_deploy_that_was_killed_is_made_good_by_the_next(run: Path, repository: Path) -> None:
    deploy(run, repository, "digits", ONE)
    (repository / "digits" / CONFIG_FILE).unlink()  # as if killed before it served the first
    (repository / "digits" / ".2.abc.part").mkdir()
    assert deploy(run, repository, "digits", ONE).versions == (1, 2)
    assert not list(repository.rglob("*.part"))
    (repository / "other").mkdir()
    (repository / "other" / "notes.txt").touch()
    with pytest.raises(InputError, match=r"other is there and holds no config\.pbtxt"):
        deploy(run, repository, "other", ONE)


def test_dense_and_slim_come_both_or_not_at_all(run: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy_models(run, repository, {"digits": False, "digits-dense": True}, ONE)
    (repository / "digits-dense" / "2").mkdir()  # of somebody else: the second model cannot become version 2
    before = snapshot(repository)
    with pytest.raises(InputError, match="digits-dense already holds version 2"):
        deploy_models(run, repository, {"digits": False, "digits-dense": True}, replace(ONE, version=2))
    assert snapshot(repository) == before and versions_of(repository / "digits") == (1,)
    (repository / "digits-dense" / "2").rmdir()
    real, calls = lowpass.export.triton.repository.write_version, []

    def full(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lowpass.export.triton.repository, "write_version", full)
    with pytest.raises(OSError, match="No space left"):
        deploy_models(run, repository, {"digits": False, "digits-dense": True}, ONE)
    assert snapshot(repository) == before and not list(repository.rglob("*.part"))
    with pytest.raises(InputError, match="there is no model nothing"):
        roll_back_models(repository, ["digits", "nothing"], 1)


def test_names_stay_in_the_repository(run: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deploy(run, repository, "digits", ONE)
    before = snapshot(repository.parent)
    for name in ("n" * 201, "../up", "..", ".", "/abs", "a/b", ".hidden", "", "a b", "a\n"):
        for options in ([str(run)], ["--rollback"], ["--list"], ["--prune", "1"], ["--promote"], ["--abort"]):
            said = refusal(capsys, "deploy", "--repository", str(repository), "--name", name, *options)
            assert "--name" in said
    assert snapshot(repository.parent) == before


def test_options_that_do_not_go_together(run: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ("deploy", "--repository", str(repository))
    assert "--rollback and --list: one at a time" in " ".join(refusal(capsys, *to, "--list", "--rollback").split())
    assert "DIR is missing" in refusal(capsys, *to, "--name", "digits")
    assert "--name is missing" in refusal(capsys, *to, "--rollback")
    assert "--version 3 is for" in refusal(capsys, *to, "--list", "--version", "3")
    for share in ("0", "100", "nan", "-3"):
        assert "not between 0 and 100" in refusal(capsys, *to, str(run), "--canary", share)
    assert "--accelerator tensorrt is for" in refusal(capsys, *to, str(run), "--accelerator", "tensorrt")
    assert "is not one of 1 to" in refusal(capsys, *to, str(run), "--version", str(2**70))
    assert "there is no repository" in refusal(capsys, *to, "--list")
    defaults = {name: one.default for name, one in inspect.signature(deploy_command).parameters.items()}
    assert (defaults["queue_limit"], defaults["queue_timeout_ms"]) == (
        DeployOptions().queue_limit,
        DeployOptions().queue_timeout_ms,
    )


def test_labels_are_one_line_each(run: Path, repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    for text, said in (
        ("a\n" * 9, "9 lines"),
        ("a\n" * 4 + "\n" + "a\n" * 5, "class 4 is called ''"),
        ("a\n" * 9 + "  \n", "class 9 is called '  '"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            deploy(run, repository, "digits", replace(ONE, labels=file))
    file.write_bytes("größer\r\n".encode() * 10)
    done = deploy(run, repository, "digits", replace(ONE, labels=file))
    assert (done.path / "1" / "labels.txt").read_text(encoding="utf-8") == "größer\n" * 10


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_server_is_another_user(run: Path, repository: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        deploy(run, repository, "digits", ONE)
        deploy(run, repository, "digits", ONE)
        start_canary(run, repository, "digits", ONE, 10)
    finally:
        os.umask(before)
    for path in (repository, *repository.rglob("*")):
        if path.name != LOCK_FILE:
            assert path.stat().st_mode & 0o055 == (0o055 if path.is_dir() else 0o044), path


def test_deploys_at_once_both_end_well(run: Path, repository: Path) -> None:
    """Eight at once, of the same name: eight versions, the newest serves."""
    done, failures = list[int](), list[BaseException]()

    def work() -> None:
        try:
            done.append(deploy(run, repository, "digits", ONE).version)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and sorted(done) == list(range(1, 9))
    assert served_version(repository / "digits") == 8


MOUNTED = """
import subprocess, sys
from pathlib import Path
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy, roll_back
from lowpass.pipeline.base.errors import InputError

run, repository = Path(sys.argv[1]), Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(repository)], check=True)
(repository / "lost+found").mkdir()
one = DeployOptions(instances=1, threads=1)
deploy(run, repository, "digits", one)
print(deploy(run, repository, "digits", one).versions)
subprocess.run(["mount", "-o", "remount,ro", str(repository)], check=True)
for work in (lambda: deploy(run, repository, "digits", one), lambda: roll_back(repository, "digits")):
    try:
        work()
    except InputError as error:
        print(error)
"""


def test_onto_a_mount_of_its_own_and_a_disk_that_is_read_only(run: Path, repository: Path) -> None:
    repository.mkdir()
    command = [*private_mounts(), sys.executable, "-c", MOUNTED, str(run), str(repository)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    versions, *said = done.stdout.splitlines()
    assert versions == "(1, 2)"
    remedy = "mount it to be written, or give another --repository"
    assert said == 2 * [f"cannot write to the repository {repository}: Read-only file system; {remedy}"]


@pytest.mark.slow
def test_an_engine_is_served_at_the_sizes_it_is_fast_at(run: Path, repository: Path) -> None:
    exported(run, "fp16")
    plan = build(run, "fp16", "tensorrt-rtx")
    manifest = json.loads(manifest_path(plan).read_text()) | {"runtime": "tensorrt"}
    manifest_path(plan).write_text(json.dumps(manifest))
    config = served_config(deploy(run, repository, "engine", DeployOptions(backend="tensorrt")).path)
    assert config.max_batch_size == 8 and list(config.instance_group[0].profile) == ["0", "1", "2", "3"]
    cuda = config.optimization.cuda
    assert cuda.graphs and cuda.output_copy_stream
    caught = dict[int, int]()  # every batch that can come -> the graph that runs it
    for spec in cuda.graph_spec:
        least = spec.graph_lower_bound.batch_size or spec.batch_size
        caught |= dict.fromkeys(range(least, spec.batch_size + 1), spec.batch_size)
    assert list(caught) == list(range(1, 9)) and set(caught.values()) == {size for size in GRAPH_SIZES if size <= 8}
    manifest_path(plan).write_text(json.dumps(manifest | {"profile": {"least": 4, "best": 4, "most": 8}}))
    with pytest.raises(InputError, match=r"takes no batch below 4.*--batch 1:4:8"):
        deploy(run, repository, "engine", DeployOptions(backend="tensorrt"))
    accelerated = DeployOptions(backend="onnxruntime", accelerator="tensorrt", precision="fp16")
    (accelerator,) = served_config(
        deploy(run, repository, "onnx", accelerated).path
    ).optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt" and accelerator.parameters["precision_mode"] == "FP16"
    assert accelerator.parameters["trt_profile_max_shapes"] == "images:8x3x32x32"


def test_serve_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(tmp_path)])
    assert stop.value.code == 2 and "holds no model" in capsys.readouterr().err
    with pytest.raises(InputError, match="make triton"):
        find_server(tmp_path)
