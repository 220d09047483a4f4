"""A Triton server as a child process: found, started, watched, started again when it dies, stopped cleanly."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from lowpass.export.triton import backends
from lowpass.export.triton.address import Address, check_free
from lowpass.export.triton.leftovers import SUPERVISOR, Belongings, orphans
from lowpass.export.triton.state import PATIENCE_S, News, broken_models, is_ready, serving_versions, versions_in
from lowpass.export.triton.version import unreadable_configs
from lowpass.pipeline.base.errors import InputError, RunError

VENV = Path(".venv-triton")
POLL_S = 1  # how often the server looks for new versions
STOP_S, START_S = 20.0, 60.0  # seconds to finish what it has; to load all models
PAUSE_S, LONGEST_PAUSE_S, STEADY_S = 0.2, 30.0, 60.0
QUICK_DEATHS = 5  # so many in a row, each before STEADY_S, and it is not started again
NEWS_S, NAP_S = 2.0, 0.1  # how often it is asked what changed; how late an order to stop may be noticed
LARGEST_LOG = 32 * 2**20  # bytes; then it becomes LOG.1 and begins anew
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
        where = f"{place} or on the PATH" if venv is None else f"{place}"
        raise InputError(f"there is no Triton server in {where}; `make triton` sets one up")
    return Server(Path(found), None)


class Supervisor:
    """Keeps one server alive on a repository; a context manager that ends with the server stopped and nothing left."""

    def __init__(
        self, server: Server, repository: Path, address: Address, log: Path, told: Callable[[str], None] = print
    ) -> None:
        self.server, self.repository, self.address, self.log, self.told = server, repository, address, log, told
        self.restarts = 0
        self.stopping = False
        self.process: subprocess.Popen[bytes] | None = None
        self._belongings: Belongings | None = None
        self._began = 0.0

    @property
    def identity(self) -> str:
        """What the server calls itself: another one on the same port does not."""
        assert self._belongings is not None
        return f"lowpass-{self._belongings.token}"

    def __enter__(self) -> Self:
        """Start, and wait until it is ready, or told to stop.

        Raises:
            InputError: a port is used, the host is not this machine's, or the log cannot be written.
            RunError: it died or did not become ready; the end of its log is quoted.
        """
        self._wait_for_orphans()
        check_free(self.address)
        self._check_log()
        self._belongings = Belongings()
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
        self.stopping = True
        self._stop()
        if self._belongings is not None:
            self._belongings.give_up()
            self._belongings = None

    def watch(self) -> None:
        """Start the server again whenever it dies, and tell what changes; returns once `stop` was called.

        Raises:
            RunError: it died again and again, each time soon; the end of its log is quoted.
        """
        threading.Thread(target=self._tell_news, daemon=True).start()
        pause, quick = PAUSE_S, 0
        while not self.stopping:
            assert self.process is not None
            code = self.process.wait()
            if self.stopping:
                return
            steady = time.monotonic() - self._began > STEADY_S
            quick = 0 if steady else quick + 1
            if quick == QUICK_DEATHS:
                raise RunError(f"the Triton server died {quick} times in a row, at last with {code}: {self._tail()}")
            # Longer and longer pauses, unless it had been well: a server that cannot start must not eat the machine.
            pause = PAUSE_S if steady else min(2 * pause, LONGEST_PAUSE_S)
            self.told(f"the server ended with {code}; starting it again (log: {self.log})")
            self._kill_group()
            self._sleep(pause)
            if not self.stopping:
                self.restarts += 1
                self._start()

    def stop(self) -> None:
        """End `watch`, from a signal handler or another thread."""
        self.stopping = True
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def _check_log(self) -> None:
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.open("ab").close()
        except OSError as error:
            raise InputError(
                f"cannot write the server's log {self.log}: {error.strerror}; give another --log"
            ) from None

    def _wait_for_orphans(self) -> None:
        """A supervisor that was killed cannot wait for its server, which gives its ports up once it has ended."""
        ports = [port for *_, port in self.address.places()]
        until, told = time.monotonic() + STOP_S + PATIENCE_S, False
        while not self.stopping and orphans(ports) and time.monotonic() < until:
            if not told:
                self.told("waiting for the server of a `serve` that was killed: it finishes what it has")
                told = True
            time.sleep(NAP_S)

    def _tell_news(self) -> None:
        news, unreadable = News(), dict[Path, str]()
        while not self.stopping:
            states = versions_in(self.address)
            for line in [] if states is None else news.of(states):
                self.told(line)
            before, unreadable = unreadable, unreadable_configs(self.repository)
            for path, line in unreadable.items():
                if before.get(path) != line:
                    self.told(line)
            _keep_short(self.log)
            self._sleep(NEWS_S)

    def _sleep(self, seconds: float) -> None:
        """In short naps: `stop` comes from a signal handler, which may not touch what this thread would wait for."""
        until = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < until:
            time.sleep(NAP_S)

    def _start(self) -> None:
        assert self._belongings is not None
        self._belongings.remove_regions()
        self._began = time.monotonic()
        # Opened anew each time, and not kept: a log that was moved away is let go.
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(  # noqa: S603 - a list, no shell
                # By a process of its own: `preexec_fn` would fork this one, whose other threads may hold locks.
                [sys.executable, "-I", "-c", NEVER_OUTLIVE, *self._command(self._belongings)],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._belongings.lock,),
            )

    def _command(self, belongings: Belongings) -> list[str]:
        address = self.address
        command = [
            str(self.server.binary),
            f"--id={self.identity}",
            f"--model-repository={self.repository.absolute()}",
            "--model-control-mode=poll",
            f"--repository-poll-secs={POLL_S}",
            "--exit-on-error=false",
            # Strict readiness is lost for good when any version fails to load, also when others serve.
            "--strict-readiness=false",
            "--disable-auto-complete-config",
            f"--http-address={address.host}",
            f"--http-port={address.http}",
            f"--grpc-address={address.host}",
            f"--grpc-port={address.grpc}",
            f"--metrics-address={address.host}",
            f"--metrics-port={address.metrics}",
            "--metrics-config=summary_latencies=true",
            f"--backend-config=python,shm-region-prefix-name={belongings.region_prefix}",
            f"--exit-timeout-secs={int(STOP_S) // 2}",
        ]
        if self.server.bundle is not None:
            command.append(f"--backend-directory={backends.set_up(belongings.folder, self.server.bundle)}")
        return command

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ) | {SUPERVISOR: str(os.getpid())}
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
            code = self.process.poll()
            if self.stopping:
                return
            if code is not None:
                raise RunError(f"the Triton server ended with {code}: {self._tail()}")
            if is_ready(self.address, self.identity):
                return
            if broken := broken_models(self.address):
                named = "; ".join(f"{model}: {reason}" for model, reason in broken.items())
                if serving := serving_versions(versions_in(self.address) or []):
                    self.told(f"the server cannot load {named}. It serves {', '.join(serving)} (log: {self.log})")
                    return
                raise RunError(
                    f"the Triton server cannot load {named}. `lowpass deploy --repository {self.repository} --name "
                    f"{next(iter(broken))} --rollback` serves the version before; where there is none, deploy the run "
                    f"once more (log: {self.log})"
                )
            time.sleep(NAP_S)
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


def _keep_short(log: Path) -> None:
    """A version that does not load is tried again every second, with some lines each time: no disk holds that for good.
    The server goes on writing to the same file, at its end, so that is emptied and not moved."""
    with suppress(OSError):  # it was moved away, or the disk is full: the server matters more
        if log.stat().st_size > LARGEST_LOG:
            shutil.copyfile(log, log.with_name(log.name + ".1"))
            os.truncate(log, 0)
