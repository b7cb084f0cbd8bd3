"""The gRPC face of a `Vmm`: checks states, translates messages and errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
from grpc_status import rpc_status

from pageferry.errors import FerryError, Reason, to_status
from pageferry.v1 import memory_pb2, vmm_pb2, vmm_pb2_grpc
from pageferry.vmm.faults import FaultEndpoint
from pageferry.vmm.private_pages import MAX_EXPORTED
from pageferry.vmm.regions import FileMemory, MemfdMemory, MemoryDescription, ProcessMemory, Region, VmmState

if TYPE_CHECKING:
    from pageferry.vmm.service import Vmm

MAX_STATE_BYTES = 64 * 1024 * 1024

_log = logging.getLogger(__name__)

_WIRE_STATES = {
    VmmState.RUNNING: vmm_pb2.VMM_STATE_RUNNING,
    VmmState.PAUSED: vmm_pb2.VMM_STATE_PAUSED,
    VmmState.INCOMING: vmm_pb2.VMM_STATE_INCOMING,
}

_Context = grpc.aio.ServicerContext[Any, Any]


class VmmServicer(vmm_pb2_grpc.VmmServiceServicer):
    """One VMM. Calls that change something go one at a time; describe and kill never wait for them."""

    def __init__(self, vmm: Vmm, before_kill: Callable[[], None]) -> None:
        self._vmm = vmm
        self._before_kill = before_kill
        self._turn = asyncio.Lock()
        self._attached = False
        self._detached = False
        self._loaded = False

    async def DescribeMemory(  # noqa: N802 - the name in the contract
        self, request: vmm_pb2.DescribeMemoryRequest, context: _Context
    ) -> vmm_pb2.DescribeMemoryResponse:
        """Answer with the layout, and with the locations unless incoming."""
        async with _errors_to(context):
            return _describe(await self._vmm.describe_memory())
        raise AssertionError  # abort has raised

    async def AttachPager(  # noqa: N802
        self, request: vmm_pb2.AttachPagerRequest, context: _Context
    ) -> vmm_pb2.AttachPagerResponse:
        """Make an incoming VMM hand its memory over, once."""
        async with _errors_to(context), self._turn:
            await self._require("attach a pager", VmmState.INCOMING)
            if self._attached:
                raise FerryError(Reason.ILLEGAL_STATE, "a pager is attached to this VMM already; start a new VMM")
            if not request.socket_path:
                raise FerryError(Reason.INVALID_ARGUMENT, "attach pager: socket_path is empty")
            if request.fault_socket_path:
                await self._vmm.use_fault_service(FaultEndpoint(request.fault_socket_path, request.fault_token))
            await self._vmm.attach_pager(request.socket_path)
            self._attached = True
        return vmm_pb2.AttachPagerResponse()

    async def Pause(  # noqa: N802
        self, request: vmm_pb2.PauseRequest, context: _Context
    ) -> vmm_pb2.PauseResponse:
        """Pause a running guest; a paused one stays so."""
        async with _errors_to(context), self._turn:
            if await self._require("pause", VmmState.RUNNING, VmmState.PAUSED) is VmmState.RUNNING:
                await self._vmm.pause()
        return vmm_pb2.PauseResponse()

    async def SaveState(  # noqa: N802
        self, request: vmm_pb2.SaveStateRequest, context: _Context
    ) -> vmm_pb2.SaveStateResponse:
        """Save the state of a paused guest."""
        state = b""
        async with _errors_to(context), self._turn:
            await self._require("save the state", VmmState.PAUSED)
            state = await self._vmm.save_state()
            if len(state) > MAX_STATE_BYTES:
                raise FerryError(
                    Reason.VMM_FAILED, f"the VMM's state has {len(state)} bytes; at most {MAX_STATE_BYTES} can be moved"
                )
        return vmm_pb2.SaveStateResponse(state=state)

    async def ListPrivatePages(  # noqa: N802
        self, request: vmm_pb2.ListPrivatePagesRequest, context: _Context
    ) -> vmm_pb2.ListPrivatePagesResponse:
        """List the ranges that are private to the paused guest."""
        async with _errors_to(context), self._turn:
            await self._require("list private pages", VmmState.PAUSED)
            return (await self._vmm.list_private_pages()).to_wire()
        raise AssertionError  # abort has raised

    async def ExportGuestPages(  # noqa: N802
        self, request: vmm_pb2.ExportGuestPagesRequest, context: _Context
    ) -> vmm_pb2.ExportGuestPagesResponse:
        """Export opaque pages of the paused guest."""
        async with _errors_to(context), self._turn:
            await self._require("export pages", VmmState.PAUSED)
            addresses = list(request.guest_addresses)
            if len(addresses) > MAX_EXPORTED:
                raise FerryError(
                    Reason.INVALID_ARGUMENT,
                    f"{len(addresses)} pages cannot be exported at once: at most {MAX_EXPORTED}",
                )
            bundles = await self._vmm.export_guest_pages(addresses)
            return vmm_pb2.ExportGuestPagesResponse(bundles=[one.to_wire() for one in bundles])
        raise AssertionError  # abort has raised

    async def LoadState(  # noqa: N802
        self, request: vmm_pb2.LoadStateRequest, context: _Context
    ) -> vmm_pb2.LoadStateResponse:
        """Load a state into an incoming VMM whose faults are served."""
        async with _errors_to(context), self._turn:
            await self._require("load a state", VmmState.INCOMING)
            if not self._attached:
                raise FerryError(
                    Reason.ILLEGAL_STATE, "cannot load a state before a pager is attached: call AttachPager"
                )
            await self._vmm.load_state(request.state)
            self._loaded = True
        return vmm_pb2.LoadStateResponse()

    async def Resume(  # noqa: N802
        self, request: vmm_pb2.ResumeRequest, context: _Context
    ) -> vmm_pb2.ResumeResponse:
        """Let the guest run; a running one is left alone."""
        async with _errors_to(context), self._turn:
            state = (await self._vmm.describe_memory()).state
            if state is VmmState.INCOMING and not self._loaded:
                raise FerryError(Reason.ILLEGAL_STATE, "cannot resume an incoming guest before its state is loaded")
            if state is not VmmState.RUNNING:
                await self._vmm.resume()
        return vmm_pb2.ResumeResponse()

    async def DetachPager(  # noqa: N802
        self, request: vmm_pb2.DetachPagerRequest, context: _Context
    ) -> vmm_pb2.DetachPagerResponse:
        """Let the userfaultfd go; a second call is harmless."""
        async with _errors_to(context), self._turn:
            if not self._attached:
                raise FerryError(Reason.ILLEGAL_STATE, "no pager was attached to this VMM: there is none to detach")
            if not self._detached:
                await self._vmm.detach_pager()
                self._detached = True
        return vmm_pb2.DetachPagerResponse()

    async def Kill(  # noqa: N802
        self, request: vmm_pb2.KillRequest, context: _Context
    ) -> vmm_pb2.KillResponse:
        """End the VMM, whatever it is doing."""
        async with _errors_to(context):
            # The VMM may exit at once, and would leave its socket file behind.
            self._before_kill()
            # Whoever asked may be gone by now, and nobody could ask once more.
            await asyncio.shield(asyncio.ensure_future(self._vmm.kill()))
        return vmm_pb2.KillResponse()

    async def _require(self, what: str, *allowed: VmmState) -> VmmState:
        state = (await self._vmm.describe_memory()).state
        if state not in allowed:
            needed = " or ".join(one.value for one in allowed)
            raise FerryError(
                Reason.ILLEGAL_STATE, f"cannot {what}: the guest is {state.value}, and would have to be {needed}"
            )
        return state


@asynccontextmanager
async def _errors_to(context: _Context) -> AsyncIterator[None]:
    """End the call with the status and ErrorInfo of whatever the body raises."""
    try:
        yield
    except FerryError as error:
        await _abort(context, error)
    except Exception as error:
        _log.exception("the VMM failed")
        await _abort(context, FerryError(Reason.VMM_FAILED, f"the VMM failed: {type(error).__name__}: {error}"))


async def _abort(context: _Context, error: FerryError) -> None:
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


def _describe(description: MemoryDescription) -> vmm_pb2.DescribeMemoryResponse:
    regions = description.regions
    layout = memory_pb2.MemoryLayout(
        regions=[
            memory_pb2.MemoryRegion(guest_address=one.guest_address, size=one.size, page_size=one.page_size)
            for one in regions
        ]
    )
    readable = description.state is not VmmState.INCOMING
    return vmm_pb2.DescribeMemoryResponse(
        layout=layout,
        locations=[_location(one) for one in regions] if readable else [],
        state=_WIRE_STATES[description.state],
    )


def _location(region: Region) -> memory_pb2.MemoryLocation:
    match region.location:
        case ProcessMemory(address):
            return memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=address))
        case MemfdMemory(fd, offset):
            return memory_pb2.MemoryLocation(memfd=memory_pb2.MemfdMemory(fd=fd, offset=offset))
        case FileMemory(path, offset):
            return memory_pb2.MemoryLocation(file=memory_pb2.FileMemory(path=path, offset=offset))
        case None:
            raise FerryError(
                Reason.VMM_FAILED,
                f"the VMM did not say where the region at guest address {region.guest_address:#x} can be read",
            )
