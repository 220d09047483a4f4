"""A Triton server as a child process: found, started, watched, started again when it dies, stopped cleanly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from lowpass.pipeline.base.errors import InputError, RunError

VENV = Path(".venv-triton")
POLL_S = 1  # how often the server looks for new versions
STOP_S, START_S = 20.0, 60.0  # seconds to finish what it has; to load all models
PAUSE_S, LONGEST_PAUSE_S, STEADY_S = 0.2, 30.0, 60.0
TAIL = 12  # lines of the log that a failure quotes
# The server must never outlive who supervises it: PR_SET_PDEATHSIG (1) holds across exec.
NEVER_OUTLIVE = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.execv(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True)
class Server:
    """A `tritonserver` and what it needs. `bundle`: of the wheel; None for one that is installed whole."""

    binary: Path
    bundle: Path | None


@dataclass(frozen=True)
class Address:
    """Where to listen; loopback only unless told otherwise."""

    host: str = "127.0.0.1"
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @property
    def url(self) -> str:
        """Of HTTP, from this machine."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.http}"  # noqa: S104


def find_server(venv: Path | None = None) -> Server:
    """The wheel's server in `venv` (None: `.venv-triton` here), else `tritonserver` on the PATH.

    Raises:
        InputError: neither is there.
    """
    place = venv or VENV
    for bundle in place.glob("lib/python3.*/site-packages/pytriton/tritonserver"):
        if (bundle / "bin" / "tritonserver").is_file():
            return Server((bundle / "bin" / "tritonserver").absolute(), bundle.absolute())
    found = shutil.which("tritonserver")
    if found is None or venv is not None:
        raise InputError(f"there is no Triton server in {place} or on the PATH; `make triton` sets one up")
    return Server(Path(found), None)


@dataclass
class Supervisor:
    """Keeps one server alive on a repository; a context manager that ends with the server stopped."""

    server: Server
    repository: Path
    address: Address
    log: Path
    told: Callable[[str], None] = print
    restarts: int = 0
    process: subprocess.Popen[bytes] | None = None
    _folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="lowpass-triton-")))
    _output: IO[bytes] | None = None
    _stopping: bool = False

    def __enter__(self) -> Self:
        """Start, and wait until it is ready.

        Raises:
            RunError: it died or did not become ready; the end of its log is quoted.
        """
        try:
            self._start()
            self._wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let it finish its requests, then stop it and everything it started."""
        self._stopping = True
        self._stop()
        if self._output is not None:
            self._output.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def watch(self) -> None:
        """Start the server again whenever it dies; returns once `stop` was called."""
        pause = PAUSE_S
        while not self._stopping:
            assert self.process is not None
            began = time.monotonic()
            code = self.process.wait()
            if self._stopping:
                return
            # Longer and longer pauses, unless it had been well: a server that cannot start must not eat the machine.
            pause = PAUSE_S if time.monotonic() - began > STEADY_S else min(2 * pause, LONGEST_PAUSE_S)
            self.told(f"the server ended with {code}; starting it again (log: {self.log})")
            self._kill_group()
            time.sleep(pause)
            if not self._stopping:
                self.restarts += 1
                self._start()

    def stop(self) -> None:
        """End `watch`, from a signal handler or another thread."""
        self._stopping = True
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def _start(self) -> None:
        if self._output is None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._output = self.log.open("ab")
        self.process = subprocess.Popen(  # noqa: S603 - a list, no shell
            # By a process of its own: `preexec_fn` would fork this one, whose other threads may hold locks.
            [sys.executable, "-I", "-c", NEVER_OUTLIVE, *self._command()],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _command(self) -> list[str]:
        address = self.address
        command = [
            str(self.server.binary),
            f"--model-repository={self.repository.absolute()}",
            "--model-control-mode=poll",
            f"--repository-poll-secs={POLL_S}",
            "--exit-on-error=false",
            "--strict-readiness=true",
            "--disable-auto-complete-config",
            f"--http-address={address.host}",
            f"--http-port={address.http}",
            f"--grpc-address={address.host}",
            f"--grpc-port={address.grpc}",
            f"--metrics-address={address.host}",
            f"--metrics-port={address.metrics}",
            f"--exit-timeout-secs={int(STOP_S) // 2}",
        ]
        if self.server.bundle is not None:
            command.append(f"--backend-directory={self._backends(self.server.bundle)}")
        return command

    def _backends(self, bundle: Path) -> Path:
        """The wheel's Python backend with the stub of its virtual environment's Python, as links."""
        folder = self._folder / "backends"
        python = folder / "python"
        if not python.exists():
            version = bundle.parents[2].name.removeprefix("python")
            stub = bundle / "python_backend_stubs" / version / "triton_python_backend_stub"
            if not stub.is_file():
                raise InputError(f"the Triton wheel has no stub for Python {version}; make triton PYTHON=python3.11")
            python.mkdir(parents=True)
            for file in (*(bundle / "backends" / "python").glob("*.*"), stub):
                (python / file.name).symlink_to(file)
        return folder

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        if self.server.bundle is not None:
            packages = self.server.bundle.parents[1]
            environment["LD_LIBRARY_PATH"] = str(packages / "nvidia_pytriton.libs")
            # The stub's embedded Python finds its packages by the python3 that comes first on the PATH.
            environment["PATH"] = f"{packages.parents[2] / 'bin'}{os.pathsep}{environment.get('PATH', '')}"
            environment["VIRTUAL_ENV"] = str(packages.parents[2])
            environment["PYTHONPATH"] = str(packages)
        return environment

    def _wait_ready(self) -> None:
        assert self.process is not None
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RunError(f"the Triton server ended with {self.process.returncode}: {self._tail()}")
            if is_ready(self.address):
                return
            if broken := broken_models(self.address):
                named = "; ".join(f"{model}: {reason}" for model, reason in broken.items())
                raise RunError(
                    f"the Triton server cannot load {named}. `lowpass deploy DIR --repository {self.repository} "
                    f"--name {next(iter(broken))} --rollback` serves the version before (log: {self.log})"
                )
            time.sleep(0.1)
        raise RunError(f"not every model in {self.repository} is ready after {START_S:.0f} s: {self._tail()}")

    def _tail(self) -> str:
        return " / ".join(self.log.read_text(errors="replace").splitlines()[-TAIL:]) + f" (log: {self.log})"

    def _stop(self) -> None:
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        self._kill_group()
        self.process.wait()

    def _kill_group(self) -> None:
        """The backends' processes too: a killed server leaves them."""
        assert self.process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def is_ready(address: Address) -> bool:
    """Whether every model can be asked."""
    try:
        with urllib.request.urlopen(f"{address.url}/v2/health/ready", timeout=2) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def broken_models(address: Address) -> dict[str, str]:
    """The models that the server gave up loading, and why; empty while it still loads some or cannot be asked."""
    request = urllib.request.Request(f"{address.url}/v2/repository/index", data=b"{}", method="POST")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310
            models = json.loads(answer.read())
    except (OSError, ValueError):
        return {}
    if any(model.get("state") not in ("READY", "UNAVAILABLE") for model in models):
        return {}
    ready = {model["name"] for model in models if model["state"] == "READY"}
    first_line = {model["name"]: (model.get("reason") or "no reason given").splitlines()[0] for model in models}
    return {name: reason for name, reason in first_line.items() if name not in ready}
