"""Where a server listens, and whether it can: a taken port is named before anything is started."""

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from lowpass.pipeline.base.errors import InputError

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"  # noqa: S104 - said by the user, never a default


@dataclass(frozen=True)
class Address:
    """Where to listen; loopback only unless told otherwise. `dashboard` is always on loopback, None: there is none."""

    host: str = LOOPBACK
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    dashboard: int | None = None

    @property
    def url(self) -> str:
        """Of HTTP, from this machine."""
        return f"http://{self._from_here}:{self.http}"

    @property
    def metrics_url(self) -> str:
        """Of Triton's figures in Prometheus' format, from this machine."""
        return f"http://{self._from_here}:{self.metrics}/metrics"

    @property
    def _from_here(self) -> str:
        return LOOPBACK if self.host == EVERYWHERE else self.host

    def places(self) -> Iterator[tuple[str, str, str, int]]:
        """What listens, the option that says where, host and port."""
        yield "HTTP", "--http-port", self.host, self.http
        yield "gRPC", "--grpc-port", self.host, self.grpc
        yield "metrics", "--metrics-port", self.host, self.metrics
        if self.dashboard is not None:
            yield "dashboard", "--dashboard", LOOPBACK, self.dashboard


def check_free(address: Address) -> None:
    """See whether all ports can be listened on, by listening for a moment.

    Raises:
        InputError: two are the same, one is taken or not for this user, or the host is not this machine's.
    """
    try:
        if not address.host.strip():
            raise OSError
        socket.gethostbyname(address.host)
    except (OSError, UnicodeError):
        known = f"such as {LOOPBACK} or {EVERYWHERE}"
        raise InputError(f"--host {address.host!r} is no IPv4 address and no name known here; {known}") from None
    seen: dict[int, str] = {}
    for what, option, host, port in address.places():
        if port in seen:
            raise InputError(f"{seen[port]} and {what} cannot both listen on port {port}; give another {option}")
        seen[port] = what
        try:
            socket.create_server((host, port)).close()
        except OSError as error:
            raise InputError(_why_not(error.errno, what, option, host, port)) from None


def _why_not(code: int | None, what: str, option: str, host: str, port: int) -> str:
    if code == errno.EADDRINUSE:
        return f"port {port} of {host}, meant for {what}, is used by another program; give another {option}"
    if code == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine; give one of its own, such as {LOOPBACK} or {EVERYWHERE}"
    reason = "an administrator's" if code == errno.EACCES else os.strerror(code or 0).lower()
    return f"port {port} of {host}, meant for {what}, cannot be had ({reason}); give another {option}"
