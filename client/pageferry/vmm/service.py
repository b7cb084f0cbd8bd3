"""Serve a VMM to the sidecar of its host: implement `Vmm`, hand it to a `VmmServer`.

Never fork after importing this module: grpc's threads do not survive it.
"""

from __future__ import annotations

import abc
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

import grpc

from pageferry.channel import SERVER_OPTIONS
from pageferry.errors import FerryError, Reason
from pageferry.v1 import vmm_pb2_grpc
from pageferry.vmm.faults import FaultEndpoint
from pageferry.vmm.private_pages import PageBundle, PrivatePages
from pageferry.vmm.regions import MemoryDescription
from pageferry.vmm.servicer import VmmServicer

__all__ = ["Vmm", "VmmServer"]

_BOUND_SUFFIX = "~"

_LONGEST_PATH = 107 - len(_BOUND_SUFFIX)
"""Bytes of sun_path in unix(7), without its NUL and what is bound beside the path for a moment."""

_PROBE_SECONDS = 1.0


class Vmm(abc.ABC):
    """What a VMM does so that its guest can be moved.

    The server calls one method at a time (kill excepted), and only where it makes sense: it refuses, say, the pause of
    an incoming guest with ILLEGAL_STATE. Raise a FerryError to choose the reason that the sidecar sees; any other
    exception reaches it as VMM_FAILED.
    """

    @abc.abstractmethod
    async def describe_memory(self) -> MemoryDescription:
        """Tell the guest's regions and what the VMM is doing. Called before each other call, so answer fast."""

    async def use_fault_service(self, endpoint: FaultEndpoint) -> None:  # noqa: B027 - most VMMs have no use for it
        """Incoming: learn, just before `attach_pager`, where faults are answered that no userfaultfd sees.

        A VMM with such memory opens a FaultForwarder for it; any other leaves it alone.
        """

    @abc.abstractmethod
    async def attach_pager(self, socket_path: str) -> None:
        """Incoming: hand all memory to the pager at `socket_path`, as `PagerLink.open` does."""

    @abc.abstractmethod
    async def pause(self) -> None:
        """Stop every vCPU and device thread; on return nothing changes guest memory any more."""

    @abc.abstractmethod
    async def save_state(self) -> bytes:
        """Return the device state of the paused guest, without its memory: at most 64 MiB."""

    async def list_private_pages(self) -> PrivatePages:
        """Tell which pages of the paused guest are private to it; a VMM without such guests leaves this as it is."""
        return PrivatePages()

    async def export_guest_pages(self, guest_addresses: Sequence[int]) -> Sequence[PageBundle]:
        """Export opaque pages of the paused guest, the most urgent first: bundles that together hold them all."""
        raise FerryError(
            Reason.ILLEGAL_STATE, f"this VMM has no opaque pages: it cannot export {len(guest_addresses)} of them"
        )

    @abc.abstractmethod
    async def load_state(self, state: bytes) -> None:
        """Incoming: load what `save_state` gave elsewhere. Guest memory may be touched: faults are served by now."""

    @abc.abstractmethod
    async def resume(self) -> None:
        """Let the guest run, after a pause or after `load_state`."""

    @abc.abstractmethod
    async def detach_pager(self) -> None:
        """Every page is installed: close the userfaultfd and the pager's socket, as `PagerLink.close` does."""

    @abc.abstractmethod
    async def kill(self) -> None:
        """End the VMM without a word to the guest. It may exit before this returns. Called at any time."""


class VmmServer:
    """Serves one VMM on a Unix socket that only its own user can open."""

    def __init__(self) -> None:
        self._server: grpc.aio.Server | None = None
        self._socket_file: _SocketFile | None = None

    async def start(self, vmm: Vmm, socket_path: str) -> None:
        """Bind `socket_path` and serve `vmm` there.

        The socket file of a dead process is replaced; ADDRESS_IN_USE when somebody listens there.
        """
        if self._server is not None:
            raise FerryError(Reason.ILLEGAL_STATE, "this VMM server was started before; make a new one")
        _claim_path(socket_path)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        socket_file = _SocketFile(Path(socket_path))
        vmm_pb2_grpc.add_VmmServiceServicer_to_server(VmmServicer(vmm, before_kill=socket_file.remove), server)
        _bind(server, socket_path)
        socket_file.remember()
        await server.start()
        self._server, self._socket_file = server, socket_file

    async def stop(self, grace: float = 0.5) -> None:
        """Stop serving, cut calls that last longer than `grace` seconds, and remove the socket file."""
        if self._server is None or self._socket_file is None:
            return
        self._socket_file.remove()
        await self._server.stop(grace)

    async def wait_closed(self) -> None:
        """Wait until `stop` is done."""
        if self._server is not None:
            await self._server.wait_for_termination()


class _SocketFile:
    """The socket file, removed only while it is still ours: a successor may have bound the same path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None

    def remember(self) -> None:
        self._identity = self._look()

    def remove(self) -> None:
        if self._identity is not None and self._look() == self._identity:
            self._path.unlink(missing_ok=True)
        self._identity = None

    def _look(self) -> tuple[int, int] | None:
        try:
            found = self._path.lstat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino


def _claim_path(path: str) -> None:
    """Refuse a path that cannot be bound or that somebody serves; remove a dead process's socket file."""
    if not path.startswith("/") or len(os.fsencode(path)) > _LONGEST_PATH:
        raise FerryError(
            Reason.INVALID_ARGUMENT,
            f"the VMM's socket path {path!r} must be absolute and at most {_LONGEST_PATH} bytes long",
        )
    file = Path(path)
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FerryError(Reason.ADDRESS_IN_USE, f"{path} exists and is not a socket; choose another path for the VMM")
    if _is_served(path):
        raise FerryError(Reason.ADDRESS_IN_USE, f"another process serves {path}; choose another path for the VMM")
    file.unlink(missing_ok=True)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except (BlockingIOError, PermissionError):
            # A full backlog: somebody listens, slowly. Or it is another user's, and not ours to remove.
            return True
        return True


def _bind(server: grpc.aio.Server, path: str) -> None:
    # gRPC unlinks the path that it bound when it stops, whoever owns it by then: so it never learns the real one.
    bound = path + _BOUND_SUFFIX
    # Made with the right mode from the start: a chmod afterwards would leave a moment in which others can connect.
    old = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{bound}")
        Path(bound).rename(path)
    except (RuntimeError, OSError) as error:
        raise FerryError(
            Reason.INVALID_ARGUMENT,
            f"cannot bind the VMM's socket {path}: {error}; is its directory there and writable?",
        ) from error
    finally:
        os.umask(old)
