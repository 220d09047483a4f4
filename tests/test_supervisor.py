"""`lowpass serve` on a real Triton server: used ports, deaths, what killed servers leave, readiness and news."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from children import ended
from command_line import refusal
from served import ONE, ROOT, TRITON, Running, exported, free_address, serve_damaged, served, until

from lowpass.export.triton.address import EVERYWHERE, Address, check_free
from lowpass.export.triton.leftovers import SHARED_MEMORY, Belongings, orphans, sweep
from lowpass.export.triton.repository import deploy
from lowpass.export.triton.server import Supervisor, find_server
from lowpass.export.triton.state import News, VersionState, ask, broken_models, is_ready, serving_versions, versions_in
from lowpass.pipeline.base.errors import InputError, RunError

# A supervisor in a process of its own, which says its token and its server's process, and then watches.
SUPERVISE = """
import sys
from pathlib import Path
from lowpass.export.triton.address import Address
from lowpass.export.triton.server import Supervisor, find_server
triton, repository, log, *ports = sys.argv[1:]
address = Address("127.0.0.1", *map(int, ports))
with Supervisor(find_server(Path(triton)), Path(repository), address, Path(log)) as supervisor:
    print(supervisor.identity.removeprefix("lowpass-"), supervisor.process.pid, flush=True)
    supervisor.watch()
"""


@pytest.fixture(scope="module")
def running(slim_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that lives beside those that the tests kill."""
    exported(slim_run, "fp32")
    repository = tmp_path_factory.mktemp("beside") / "repository"
    deploy(slim_run, repository, "beside", ONE)
    with served(slim_run, repository, np.zeros((1, 3, 32, 32), np.float32)) as server:
        yield server


@pytest.fixture
def repository(running: Running, tmp_path: Path) -> Path:
    """One model, `a`, and what a mounted disk has at its root."""
    place = tmp_path / "repository"
    deploy(running.run, place, "a", ONE)
    (place / "lost+found").mkdir()
    return place


def left_of(token: str) -> list[Path]:
    """Regions, lock and folder of a supervisor."""
    return [*SHARED_MEMORY.glob(f"*{token}*"), *Belongings.place_of(token).parent.glob(f"*{token}*")]


def ask_for(address: Address) -> list[str]:
    named = (("http", address.http), ("grpc", address.grpc), ("metrics", address.metrics))
    return [word for kind, port in named for word in (f"--{kind}-port", str(port))]


@pytest.mark.parametrize("kind", ["HTTP", "gRPC", "metrics", "dashboard"])
def test_a_used_port_is_named_before_anything_starts(
    running: Running, repository: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    address = free_address()
    options = ask_for(address)
    theirs = {"HTTP": running.address.http, "gRPC": running.address.grpc, "metrics": running.address.metrics}
    taken = theirs.get(kind, running.address.http)
    option = "--dashboard" if kind == "dashboard" else f"--{kind.lower()}-port"
    line = refusal(capsys, "serve", str(repository), "--triton", str(TRITON), *options, option, str(taken))
    assert f"port {taken} of 127.0.0.1, meant for {kind}, is used" in line and f"another {option}" in line
    assert not list(repository.parent.glob("repository*.log"))
    assert is_ready(running.address)


def test_a_port_for_two_and_a_host_of_another_machine() -> None:
    free = free_address()
    with pytest.raises(InputError, match=rf"HTTP and metrics cannot both listen on port {free.http}.*--metrics-port"):
        check_free(Address(http=free.http, grpc=free.grpc, metrics=free.http))
    with pytest.raises(InputError, match=rf"gRPC and dashboard cannot both.*{free.grpc}.*--dashboard"):
        check_free(Address("127.0.0.1", free.http, free.grpc, free.metrics, free.grpc))
    with pytest.raises(InputError, match=r"--host 192\.0\.2\.1 is no address of this machine"):
        check_free(Address("192.0.2.1", free.http, free.grpc, free.metrics))
    for nonsense in ("nowhere.invalid", "::1", "a..b"):
        with pytest.raises(InputError, match=f"--host '{re.escape(nonsense)}' is no IPv4 address and no name"):
            check_free(Address(nonsense, free.http, free.grpc, free.metrics))
    # A port that somebody has on another address is taken for all addresses, too.
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(InputError, match="is used by another"):
        check_free(Address(EVERYWHERE, other.getsockname()[1], free.grpc, free.metrics))
    check_free(free)


def test_another_server_is_not_taken_for_ours(running: Running) -> None:
    name = json.loads(ask(f"{running.address.url}/v2"))["name"]
    assert name.startswith("lowpass-") and is_ready(running.address, name)
    assert not is_ready(running.address, "lowpass-0000000000000000")


@pytest.mark.slow
def test_a_server_that_dies_and_dies_is_given_up(repository: Path, tmp_path: Path) -> None:
    told: list[str] = []
    errors: list[BaseException] = []
    with Supervisor(find_server(TRITON), repository, free_address(), tmp_path / "log", told.append) as supervisor:
        assert supervisor.process is not None

        def watch() -> None:
            try:
                supervisor.watch()
            except RunError as error:
                errors.append(error)

        watcher = threading.Thread(target=watch)
        watcher.start()
        while watcher.is_alive():
            if supervisor.process.poll() is None:
                supervisor.process.kill()
            time.sleep(0.05)
    assert supervisor.restarts == 4 and len([line for line in told if "ended with -9; starting" in line]) == 4
    assert "died 5 times in a row, at last with -9" in str(errors[0]) and "(log: " in str(errors[0])


def regions_of(token: str) -> set[Path]:
    """Of one supervisor: there may be others, which come and go."""
    return {path for path in SHARED_MEMORY.glob(f"lowpass-triton-{token}*") if path.suffix != ".lock"}


def token_of(address: Address) -> str:
    return str(json.loads(ask(f"{address.url}/v2"))["name"]).removeprefix("lowpass-")


def test_killed_servers_leave_nothing(running: Running, repository: Path, tmp_path: Path) -> None:
    address, their_token, log = free_address(), token_of(running.address), tmp_path / "log"
    theirs = regions_of(their_token)
    with Supervisor(find_server(TRITON), repository, address, log, lambda _: None) as supervisor:
        threading.Thread(target=supervisor.watch, daemon=True).start()
        token = token_of(address)
        assert supervisor.identity == f"lowpass-{token}"
        before = regions_of(token)
        assert before and supervisor.process is not None
        log.rename(tmp_path / "log.1")  # as who rotates logs does
        supervisor.process.kill()
        until(lambda: supervisor.restarts == 1 and is_ready(address, supervisor.identity))
        assert "loading" in log.read_text()
        assert regions_of(token) and not before & regions_of(token)
        sweep()  # as another supervisor does when it starts
        assert is_ready(address) and regions_of(token)
    assert not left_of(token)
    assert theirs and theirs == regions_of(their_token) and is_ready(running.address)


def test_a_killed_supervisor_leaves_nothing_for_long(running: Running, repository: Path, tmp_path: Path) -> None:
    address, their_token = free_address(), token_of(running.address)
    theirs = regions_of(their_token)
    ports = [str(port) for port in (address.http, address.grpc, address.metrics)]
    command = [sys.executable, "-c", SUPERVISE, str(TRITON), str(repository), str(tmp_path / "log"), *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process, ended(process):
        assert process.stdout is not None
        token, server = process.stdout.readline().split()
        os.kill(int(server), signal.SIGSTOP)
        process.kill()
    sweep()
    assert regions_of(token) and left_of(token)  # its server still lives
    os.kill(int(server), signal.SIGCONT)

    def swept() -> bool:
        sweep()
        return not left_of(token)

    until(swept)  # once the server has ended, as it was told to
    assert not is_ready(address)
    assert theirs and theirs == regions_of(their_token) and is_ready(running.address)


def test_a_new_supervisor_waits_for_the_server_of_a_killed_one(repository: Path, tmp_path: Path) -> None:
    address, told = free_address(), list[str]()
    ports = [str(port) for port in (address.http, address.grpc, address.metrics)]
    command = [sys.executable, "-c", SUPERVISE, str(TRITON), str(repository), str(tmp_path / "log"), *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process, ended(process):
        assert process.stdout is not None
        _, server = process.stdout.readline().split()
        assert orphans([address.http]) == []
        os.kill(int(server), signal.SIGSTOP)
        process.kill()
    until(lambda: orphans([address.http]) == [int(server)])

    def tell(line: str) -> None:
        told.append(line)
        os.kill(int(server), signal.SIGCONT)

    with Supervisor(find_server(TRITON), repository, address, tmp_path / "log", tell) as supervisor:
        assert is_ready(address, supervisor.identity)
    assert len(told) == 1 and "killed" in told[0]


def test_a_log_that_cannot_be_written_is_refused(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--triton", str(TRITON), *ask_for(free_address()), "--log", str(tmp_path)]
    assert f"cannot write the server's log {tmp_path}: " in refusal(capsys, "serve", str(repository), *options)


def test_a_stranger_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowpass.export.triton.leftovers.SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, alive = "0" * 16, Belongings()
    kept = ["lowpass-triton-.lock", "lowpass-triton-..%2f.lock", "triton_python_backend_shm_region_1", "target"]
    for name in (*kept, f"lowpass-triton-{dead}.lock", f"lowpass-triton-{dead}-1", f"lowpass-triton-{alive.token}-1"):
        (tmp_path / name).touch()
    (tmp_path / f"lowpass-triton-{'1' * 16}.lock").symlink_to(tmp_path / "target")
    sweep()
    left = {path.name for path in tmp_path.iterdir()}
    assert left >= {*kept, f"lowpass-triton-{alive.token}-1", f"lowpass-triton-{alive.token}.lock", alive.folder.name}
    assert not [name for name in left if dead in name]
    alive.give_up()
    assert not list(tmp_path.glob(f"*{alive.token}*"))


def test_readiness_and_news(
    running: Running, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that does not load neither hides that the others serve, nor stays unsaid."""
    address, told, log = free_address(), list[str](), tmp_path / "log"
    monkeypatch.setattr("lowpass.export.triton.server.LARGEST_LOG", 10_000)
    model = repository / "a"
    early: list[object] = []

    def first_ready() -> None:
        while not early:
            try:
                ask(f"{address.url}/v2/health/ready")
            except OSError:
                time.sleep(0.02)
                continue
            early.append(versions_in(address))

    asking = threading.Thread(target=first_ready)
    asking.start()
    with Supervisor(find_server(TRITON), repository, address, log, told.append) as supervisor:
        threading.Thread(target=supervisor.watch, daemon=True).start()
        asking.join()
        assert early == [[VersionState("a", 1, "READY")]]  # not a moment before
        assert serve_damaged(model) == 2
        until(lambda: bool(told))
        assert told[0].startswith("version 2 of a does not load: Internal: ")
        assert told[0].endswith("; version 1 serves on") and "\n" not in told[0]
        for _ in range(20):  # the server tries it again and again
            assert is_ready(address) and not broken_models(address)
            ask(f"{address.url}/v2/health/ready")
            time.sleep(0.1)
        until(lambda: (tmp_path / "log.1").exists() and log.stat().st_size < 10_000)
        deploy(running.run, repository, "a", ONE)
        until(lambda: len(told) == 2)
        deploy(running.run, repository, "b", ONE)
        until(lambda: len(told) == 3)
        assert is_ready(address)
        shutil.rmtree(repository / "b")
        until(lambda: len(told) == 4)
        assert is_ready(address)
        (repository / "c").mkdir()
        (repository / "c" / "config.pbtxt").write_text("name: of nothing")
        until(lambda: len(told) == 5)
        assert f"{repository / 'c' / 'config.pbtxt'} is not a Triton configuration" in told.pop()
    assert told[1:] == ["a serves version 3", "b serves version 1", "b is served no longer"]


def test_a_broken_model_beside_a_sound_one(running: Running, repository: Path, tmp_path: Path) -> None:
    deploy(running.run, repository, "b", ONE)
    (repository / "a" / "1" / "model.onnx").write_bytes(b"damaged")
    address, told = free_address(), list[str]()
    with Supervisor(find_server(TRITON), repository, address, tmp_path / "log", told.append):
        assert told[0].startswith("the server cannot load a: Internal: ") and "It serves b (log: " in told[0]
        assert not is_ready(address) and serving_versions(versions_in(address) or []) == {"b": 1}


def test_a_broken_model_beside_a_folder_that_is_none(repository: Path, tmp_path: Path) -> None:
    (repository / "a" / "1" / "model.onnx").write_bytes(b"damaged")
    with (
        pytest.raises(RunError, match=r"cannot load a: Internal: .*--name a --rollback"),
        Supervisor(find_server(TRITON), repository, free_address(), tmp_path / "log"),
    ):
        pass


def test_each_change_is_told_once() -> None:
    ready, loading, away = VersionState("a", 1, "READY"), VersionState("a", 2, "LOADING"), "unloaded"
    failed = VersionState("a", 2, "UNAVAILABLE", "no")
    news = News()
    assert news.of([ready, failed]) == ["version 2 of a does not load: no; version 1 serves on"]
    for states in ([ready, loading], [ready, failed], [loading], [ready, loading], [ready, failed]):
        assert not news.of(states), states
    assert news.of([failed]) == ["a is served no longer"]
    assert news.of([ready]) == ["a serves version 1"]
    assert news.of([VersionState("a", 1, "UNAVAILABLE", away), VersionState("a", 2, "READY")]) == ["a serves version 2"]
    assert news.of([VersionState("a", 2, "READY"), failed, VersionState("b", 2, "UNAVAILABLE", "no")])[1:] == [
        "version 2 of b does not load: no; no other version serves"
    ]


@pytest.mark.parametrize("when", ["starting", "served"])
def test_signals_end_it_cleanly(repository: Path, tmp_path: Path, when: str) -> None:
    address, log = free_address(), tmp_path / "log"
    page = free_address().http
    command = [sys.executable, "-m", "lowpass.cli", "serve", str(repository), "--triton", str(TRITON), "--json"]
    command += ["--log", str(log), "--dashboard", str(page), *ask_for(address)]
    # What runs in the background of a script ignores Ctrl-C, and hands that on: these tests may.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    signal.signal(signal.SIGINT, before)
    with process, ended(process):
        assert process.stdout is not None and process.stderr is not None
        if when == "served":
            ready = json.loads(process.stdout.readline())
            assert ready["ready"] and ready["dashboard"] == page and ready["metrics"] == address.metrics
            assert json.loads(ask(f"http://127.0.0.1:{page}/data"))["up"]
            process.send_signal(signal.SIGINT)
        else:
            until(lambda: log.exists() and b"loading" in log.read_bytes())
            process.terminate()
        assert process.wait(60) == 0, process.stderr.read()
        assert process.stdout.read() == ""
    assert not is_ready(address)
