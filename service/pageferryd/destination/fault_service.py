"""FaultService: one guest's VMM forwards its vCPUs' exits, and is told as each is resolved."""

from __future__ import annotations

import asyncio
import hmac
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from pageferry.errors import FerryError, Reason
from pageferry.v1 import fault_pb2, fault_pb2_grpc
from pageferryd.destination.door import Settled

if TYPE_CHECKING:
    from pageferryd.destination.exit_door import ExitDoor

TOKEN_KEY = "pageferry-fault-token-bin"  # noqa: S105 - the name of a metadata key
TOKEN_BYTES = 32
MAX_UNSENT = 8192
"""Resolutions that a VMM may leave unread before its stream is ended; it may open another and ask again."""

_Context = grpc.aio.ServicerContext[Any, Any]

_OUTCOMES = {
    Settled.INSTALLED: fault_pb2.OUTCOME_INSTALLED,
    Settled.ZERO: fault_pb2.OUTCOME_ZERO,
    Settled.POISONED: fault_pb2.OUTCOME_POISONED,
    Settled.PRESENT: fault_pb2.OUTCOME_SPURIOUS,
}
_KNOWN_ACCESS = frozenset(fault_pb2.Access.values())
_KNOWN_SHARING = frozenset(fault_pb2.Sharing.values())


class FaultServicer(fault_pb2_grpc.FaultServiceServicer):
    """One guest's, which shows `token` with every call."""

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._door: ExitDoor | None = None
        self._convert: Callable[[int, int], None] = lambda _first, _pages: None

    def connect(self, door: ExitDoor, convert: Callable[[int, int], None]) -> None:
        """Serve from now on. `convert` takes runs of (first, pages) that the guest converts."""
        self._door, self._convert = door, convert

    async def ResolveFaults(  # type: ignore[override]  # noqa: N802 - the name in the contract
        self, _requests: Any, context: _Context
    ) -> None:
        """Take faults as they come; answer each as it is settled. A coroutine, not a generator: one hop less a message."""
        door = self._authorised(context)
        await context.send_initial_metadata(())
        stream = _Stream(door)
        writer = asyncio.create_task(stream.write_to(context))
        try:
            while isinstance(request := await context.read(), fault_pb2.ResolveFaultsRequest):
                stream.take(request)
                if stream.unread > MAX_UNSENT:
                    raise FerryError(Reason.INVALID_ARGUMENT, f"{stream.unread} resolutions were left unread")
        finally:
            stream.close()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def ConvertRange(  # noqa: N802
        self, request: fault_pb2.ConvertRangeRequest, context: _Context
    ) -> fault_pb2.ConvertRangeResponse:
        """Drop what is under way for the pages."""
        door = self._authorised(context)
        if request.sharing not in (fault_pb2.SHARING_SHARED, fault_pb2.SHARING_PRIVATE):
            raise FerryError(Reason.INVALID_ARGUMENT, "sharing must say what the pages become: shared or private")
        self._convert(*door.run_at(request.guest_address, request.size))
        return fault_pb2.ConvertRangeResponse()

    async def ReportImports(  # noqa: N802
        self, request: fault_pb2.ReportImportsRequest, context: _Context
    ) -> fault_pb2.ReportImportsResponse:
        """Note how imports of delivered pages ended."""
        self._authorised(context)
        raise FerryError(Reason.ILLEGAL_STATE, "no page was delivered to this VMM: there is no import to report")

    def _authorised(self, context: _Context) -> ExitDoor:
        metadata = dict(context.invocation_metadata() or ())
        token = metadata.get(TOKEN_KEY, b"")
        if not isinstance(token, bytes) or not hmac.compare_digest(token, self._token):
            raise FerryError(
                Reason.TOKEN_INVALID, f"{TOKEN_KEY} is not the secret that AttachPager gave for this guest"
            )
        if self._door is None:
            raise FerryError(Reason.ILLEGAL_STATE, "faults are served after the hand-off of the guest's memory")
        return self._door


class _Stream:
    """One stream: faults that wait on it, and resolutions that were not sent yet."""

    def __init__(self, door: ExitDoor) -> None:
        self._door = door
        self._unsent: deque[fault_pb2.ResolveFaultsResponse] = deque()
        self._work = asyncio.Event()
        self._waiting: dict[int, Callable[[], None]] = {}

    @property
    def unread(self) -> int:
        """How many resolutions wait to be sent."""
        return len(self._unsent)

    def take(self, request: fault_pb2.ResolveFaultsRequest) -> None:
        """Take a fault. One that cannot be is refused by itself; the stream goes on."""
        token = request.token
        try:
            _check(request)
            if not token or token in self._waiting:
                raise FerryError(Reason.INVALID_ARGUMENT, f"token {token} is zero or in use by another fault")
            first, pages = self._door.run_at(request.guest_address & ~0xFFF, request.size)
            self._waiting[token] = _nothing
            forget = self._door.fault(first, pages, lambda how: self._answer(request, how))
            if token in self._waiting:
                self._waiting[token] = forget
        except FerryError as error:
            if self._waiting.get(token) is _nothing:
                del self._waiting[token]
            self._put(
                fault_pb2.ResolveFaultsResponse(
                    token=token,
                    guest_address=request.guest_address,
                    size=request.size,
                    outcome=fault_pb2.OUTCOME_REFUSED,
                    reason=error.reason.value,
                    message=error.message[:512],
                )
            )

    def _answer(self, request: fault_pb2.ResolveFaultsRequest, how: Settled) -> None:
        self._waiting.pop(request.token, None)
        self._put(
            fault_pb2.ResolveFaultsResponse(
                token=request.token,
                guest_address=request.guest_address & ~0xFFF,
                size=request.size,
                outcome=_OUTCOMES[how],
            )
        )

    def _put(self, response: fault_pb2.ResolveFaultsResponse) -> None:
        self._unsent.append(response)
        self._work.set()

    async def write_to(self, context: _Context) -> None:
        """Send resolutions as they come."""
        while True:
            while self._unsent:
                await context.write(self._unsent.popleft())
            self._work.clear()
            await self._work.wait()

    def close(self) -> None:
        """Nobody reads any more: what waits is forgotten here, and asked for again on another stream."""
        for forget in self._waiting.values():
            forget()
        self._waiting.clear()


def _nothing() -> None:
    pass


def _check(request: fault_pb2.ResolveFaultsRequest) -> None:
    if request.access not in _KNOWN_ACCESS or request.sharing not in _KNOWN_SHARING:
        raise FerryError(
            Reason.INVALID_ARGUMENT, f"a fault has access {request.access} and sharing {request.sharing}: unknown"
        )
