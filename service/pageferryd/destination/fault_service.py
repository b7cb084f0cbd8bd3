"""FaultService: one guest's VMM forwards its vCPUs' exits, and is told as each is resolved."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING, Any

import grpc

from pageferry.errors import FerryError, Reason
from pageferry.v1 import fault_pb2, fault_pb2_grpc
from pageferryd.destination.fault_stream import FaultStream
from pageferryd.destination.imports import ImportEnd

if TYPE_CHECKING:
    from pageferryd.destination.exit_door import ExitDoor
    from pageferryd.destination.session import Session

TOKEN_KEY = "pageferry-fault-token-bin"  # noqa: S105 - the name of a metadata key
TOKEN_BYTES = 32
MAX_UNSENT = 8192
"""Resolutions that a VMM may leave unread before no more of its faults are taken."""

_Context = grpc.aio.ServicerContext[Any, Any]

_ENDS = {
    fault_pb2.IMPORT_RESULT_DONE: ImportEnd.DONE,
    fault_pb2.IMPORT_RESULT_STALE: ImportEnd.STALE,
    fault_pb2.IMPORT_RESULT_DUPLICATE: ImportEnd.DUPLICATE,
    fault_pb2.IMPORT_RESULT_FAILED: ImportEnd.FAILED,
}
MAX_IMPORTS = 4096


class FaultServicer(fault_pb2_grpc.FaultServiceServicer):
    """One guest's, which shows `token` with every call."""

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._served: tuple[ExitDoor, Session] | None = None

    def connect(self, door: ExitDoor, session: Session) -> None:
        """Serve from now on."""
        self._served = door, session

    async def ResolveFaults(  # type: ignore[override]  # noqa: N802 - the name in the contract
        self, _requests: Any, context: _Context
    ) -> None:
        """Take faults as they come; answer each as it is settled. No generator: that is a hop more a message."""
        door, session = self._authorised(context)
        await context.send_initial_metadata(())
        stream = FaultStream(door)
        writer = asyncio.create_task(stream.write_to(context))
        desk = session.placer.desk
        desk.connect(stream.deliver, stream.unread)
        try:
            while isinstance(request := await context.read(), fault_pb2.ResolveFaultsRequest):
                stream.take(request)
                # A VMM that does not read is not listened to: gRPC cannot even tell it that its stream has ended.
                await stream.room(MAX_UNSENT)
        finally:
            desk.disconnect(stream.deliver)
            stream.close()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def ConvertRange(  # noqa: N802
        self, request: fault_pb2.ConvertRangeRequest, context: _Context
    ) -> fault_pb2.ConvertRangeResponse:
        """Drop what is under way for the pages."""
        door, session = self._authorised(context)
        if request.sharing not in (fault_pb2.SHARING_SHARED, fault_pb2.SHARING_PRIVATE):
            raise FerryError(Reason.INVALID_ARGUMENT, "sharing must say what the pages become: shared or private")
        session.convert(*door.layout.run_at(request.guest_address, request.size))
        return fault_pb2.ConvertRangeResponse()

    async def ReportImports(  # noqa: N802
        self, request: fault_pb2.ReportImportsRequest, context: _Context
    ) -> fault_pb2.ReportImportsResponse:
        """Note how imports of delivered pages ended."""
        door, session = self._authorised(context)
        if len(request.imports) > MAX_IMPORTS:
            raise FerryError(Reason.INVALID_ARGUMENT, f"{len(request.imports)} imports at once; at most {MAX_IMPORTS}")
        ends = []
        for imported in request.imports:
            end = _ENDS.get(imported.result)
            if end is None:
                raise FerryError(Reason.INVALID_ARGUMENT, f"an import ended with {imported.result}: unknown")
            ends.append((*door.layout.run_at(imported.guest_address, imported.size), end))
        for first, pages, end in ends:
            session.report_import(first, pages, end)
        return fault_pb2.ReportImportsResponse()

    def _authorised(self, context: _Context) -> tuple[ExitDoor, Session]:
        metadata = dict(context.invocation_metadata() or ())
        token = metadata.get(TOKEN_KEY, b"")
        if not isinstance(token, bytes) or not hmac.compare_digest(token, self._token):
            raise FerryError(
                Reason.TOKEN_INVALID, f"{TOKEN_KEY} is not the secret that AttachPager gave for this guest"
            )
        if self._served is None:
            raise FerryError(Reason.ILLEGAL_STATE, "faults are served after the hand-off of the guest's memory")
        return self._served
