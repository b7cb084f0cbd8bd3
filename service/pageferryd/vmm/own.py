"""The driver for VMMs that serve VmmService on a Unix socket of their own (vmm.proto)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.v1 import vmm_pb2, vmm_pb2_grpc
from pageferryd.core.errors import LayoutError
from pageferryd.core.layout import Layout, Region
from pageferryd.linux.pidfd import PidFd
from pageferryd.linux.unix_peer import listener_pid
from pageferryd.vmm.driver import Activity, Description, Memory, PrivatePages, Saved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pageferryd.vmm.driver import PagerSeat

DRIVER = "vmm"
_QUICK_SECONDS = 5.0
_STATE_SECONDS = 60.0
_EXPORT_SECONDS = 30.0
_EXIT_SECONDS = 5.0
_MAX_PRIVATE_RANGES = 1 << 20

_ACTIVITIES = {
    vmm_pb2.VMM_STATE_RUNNING: Activity.RUNNING,
    vmm_pb2.VMM_STATE_PAUSED: Activity.PAUSED,
    vmm_pb2.VMM_STATE_INCOMING: Activity.INCOMING,
}


class _Link(NamedTuple):
    channel: grpc.aio.Channel
    stub: vmm_pb2_grpc.VmmServiceAsyncStub


class VmmServiceDriver:
    """One VMM behind its socket."""

    memory_comes_with_state = False

    def __init__(self, socket_path: str) -> None:
        """Raise FerryError(INVALID_ARGUMENT) unless the path is absolute and fits a socket address."""
        self._path = socket_path
        channel = open_channel(f"unix:{socket_path}", None)
        self._link: _Link | None = _Link(channel, vmm_pb2_grpc.VmmServiceStub(channel))
        self._pid = 0

    async def describe(self) -> Description:
        """Ask for layout, locations and state; the process id is the listener's, as the kernel knows it."""
        self._pid = await asyncio.to_thread(listener_pid, self._path, _QUICK_SECONDS)
        answer = await self._call(self._stub.DescribeMemory, vmm_pb2.DescribeMemoryRequest())
        activity = _ACTIVITIES.get(answer.state)
        if activity is None:
            raise FerryError(Reason.VMM_FAILED, f"the VMM at {self._path} is in a state that cannot be: {answer.state}")
        regions = [Region(region.guest_address, region.size, region.page_size) for region in answer.layout.regions]
        try:
            layout = Layout(regions)
        except LayoutError as error:
            raise FerryError(
                Reason.LAYOUT_INVALID, f"the VMM at {self._path} describes its memory wrongly: {error}"
            ) from error
        if activity is not Activity.INCOMING and len(answer.locations) != len(regions):
            raise FerryError(
                Reason.LAYOUT_INVALID,
                f"the VMM at {self._path} gives {len(answer.locations)} locations for {len(regions)} regions",
            )
        memory = None
        if activity is not Activity.INCOMING:
            memory = Memory(layout, tuple(answer.locations), self._pid)
        return Description(activity, self._pid, layout, memory)

    async def attach_pager(self, seat: PagerSeat) -> None:
        """Have the memory handed over."""
        request = vmm_pb2.AttachPagerRequest(
            socket_path=seat.socket_path,
            fault_socket_path=seat.faults.socket_path,
            fault_token=seat.faults.token,
        )
        await self._call(self._stub.AttachPager, request, _STATE_SECONDS)

    async def ready_to_pause(self) -> None:
        """Nothing can be done before."""

    async def pause(self) -> None:
        """Stop the guest."""
        await self._call(self._stub.Pause, vmm_pb2.PauseRequest(), _STATE_SECONDS)

    async def save_state(self) -> Saved:
        """Save the state."""
        answer = await self._call(self._stub.SaveState, vmm_pb2.SaveStateRequest(), _STATE_SECONDS)
        return Saved(answer.state)

    async def private_pages(self) -> PrivatePages:
        """Ask for them; a VMM that does not know the call has none."""
        try:
            answer = await self._stub.ListPrivatePages(vmm_pb2.ListPrivatePagesRequest(), timeout=_STATE_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return PrivatePages()
            raise self._explain(error) from error
        if len(answer.guest_addresses) != len(answer.sizes) or len(answer.sizes) > _MAX_PRIVATE_RANGES:
            raise FerryError(Reason.VMM_FAILED, f"the VMM at {self._path} lists its private pages in uneven columns")
        return PrivatePages(list(zip(answer.guest_addresses, answer.sizes, strict=True)), answer.opaque)

    async def export_pages(self, guest_addresses: Sequence[int]) -> Sequence[vmm_pb2.GuestPageBundle]:
        """Have opaque pages exported."""
        request = vmm_pb2.ExportGuestPagesRequest(guest_addresses=guest_addresses)
        answer = await self._call(self._stub.ExportGuestPages, request, _EXPORT_SECONDS)
        bundles: Sequence[vmm_pb2.GuestPageBundle] = answer.bundles
        return bundles

    async def load_state(self, state: bytes) -> None:
        """Load a state."""
        await self._call(self._stub.LoadState, vmm_pb2.LoadStateRequest(state=state), _STATE_SECONDS)

    async def resume(self) -> None:
        """Let the guest run."""
        await self._call(self._stub.Resume, vmm_pb2.ResumeRequest(), _STATE_SECONDS)

    async def detach_pager(self) -> None:
        """Say that every page is in."""
        await self._call(self._stub.DetachPager, vmm_pb2.DetachPagerRequest())

    async def kill(self) -> None:
        """Ask the VMM to end, and wait until it has."""
        pid = self._pid
        try:
            await self._call(self._stub.Kill, vmm_pb2.KillRequest())
        except FerryError as error:
            # The VMM may be gone before it answers; that is for the wait to tell.
            if error.reason is not Reason.VMM_UNREACHABLE:
                raise
        await asyncio.to_thread(_wait_for_exit, pid, self._path)

    async def close(self) -> None:
        """Close the channel. It is not kept: what gRPC holds of a closed one is more than all else of a migration."""
        link, self._link = self._link, None
        if link is not None:
            await link.channel.close()

    @property
    def _stub(self) -> vmm_pb2_grpc.VmmServiceAsyncStub:
        if self._link is None:
            raise FerryError(Reason.VMM_UNREACHABLE, f"the connection to the VMM at {self._path} was closed")
        return self._link.stub

    async def _call(self, method: Any, request: Any, timeout: float = _QUICK_SECONDS) -> Any:  # noqa: ASYNC109
        try:
            return await method(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise self._explain(error) from error

    def _explain(self, error: grpc.aio.AioRpcError) -> FerryError:
        lost = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        told = from_rpc(error, Reason.VMM_UNREACHABLE if lost else Reason.VMM_FAILED)
        return FerryError(told.reason, f"the VMM at {self._path}: {told.message}")


def _wait_for_exit(pid: int, path: str) -> None:
    if pid <= 0 or not Path(f"/proc/{pid}").exists():
        return
    try:
        with PidFd(pid) as process:
            ended = process.wait(_EXIT_SECONDS)
    except FerryError:
        return
    if not ended:
        raise FerryError(Reason.VMM_FAILED, f"the VMM at {path} (process {pid}) was asked to end, and has not")
