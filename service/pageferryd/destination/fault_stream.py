"""One stream of FaultService: faults that wait on it, and resolutions that were not sent yet."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import grpc

from pageferry.errors import FerryError, Reason
from pageferry.v1 import fault_pb2
from pageferryd.core.errors import CoreError
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.destination.door import Settled

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferryd.destination.exit_door import ExitDoor
    from pageferryd.destination.imports import Delivery

_Context = grpc.aio.ServicerContext[Any, Any]

_OUTCOMES = {
    Settled.INSTALLED: fault_pb2.OUTCOME_INSTALLED,
    Settled.ZERO: fault_pb2.OUTCOME_ZERO,
    Settled.POISONED: fault_pb2.OUTCOME_POISONED,
    Settled.PRESENT: fault_pb2.OUTCOME_SPURIOUS,
}
_IN_PAGE = PAGE_SIZE - 1
_KNOWN_ACCESS = frozenset(fault_pb2.Access.values())
_KNOWN_SHARING = frozenset(fault_pb2.Sharing.values())


class FaultStream:
    """One stream of one VMM."""

    def __init__(self, door: ExitDoor) -> None:
        self._door = door
        self._unsent: deque[fault_pb2.ResolveFaultsResponse] = deque()
        self._work = asyncio.Event()
        self._sent = asyncio.Event()
        self._waiting: dict[int, Callable[[], None]] = {}
        # Single pages that are waited for, by the token of the first fault on each.
        self._tokens: dict[int, int] = {}

    def unread(self) -> int:
        """Return how many resolutions wait to be sent."""
        return len(self._unsent)

    async def room(self, most: int) -> None:
        """Wait until no more than `most` resolutions wait to be sent."""
        while len(self._unsent) > most:
            self._sent.clear()
            await self._sent.wait()

    def take(self, request: fault_pb2.ResolveFaultsRequest) -> None:
        """Take a fault. One that cannot be is refused by itself; the stream goes on."""
        try:
            self._begin(request)
        except (FerryError, CoreError) as error:
            refused = self._resolution(request, fault_pb2.OUTCOME_REFUSED)
            refused.reason = error.reason.value if isinstance(error, FerryError) else error.reason
            refused.message = str(error)[:512]
            self._put(refused)

    def _begin(self, request: fault_pb2.ResolveFaultsRequest) -> None:
        token = request.token
        _check(request)
        if not token or token in self._waiting:
            raise FerryError(Reason.INVALID_ARGUMENT, f"token {token} is zero, or in use by another fault")
        first, pages = self._door.layout.run_at(request.guest_address & ~_IN_PAGE, request.size)
        if pages == 1:
            self._tokens.setdefault(first, token)
        answered = False

        def answer(how: Settled) -> None:
            nonlocal answered
            answered = True
            self._forget(token, first)
            self._put(self._resolution(request, _OUTCOMES[how]))

        try:
            forget = self._door.fault(first, pages, answer)
        except BaseException:
            self._forget(token, first)
            raise
        if not answered:
            self._waiting[token] = forget

    def _forget(self, token: int, page: int) -> None:
        self._waiting.pop(token, None)
        if self._tokens.get(page) == token:
            del self._tokens[page]

    def deliver(self, delivery: Delivery) -> None:
        """Give a private page to the VMM: as the answer of the fault that waits for it, if there is one."""
        page = next((page for page in delivery.pages if page in self._tokens), delivery.pages[0])
        token = self._tokens.get(page, 0)
        if token:
            # Answered with the page; others that wait for it are when it was imported.
            self._waiting.pop(token, _nothing)()
            self._forget(token, page)
        addresses = [self._door.layout.guest_address_of(one) for one in delivery.pages]
        self._put(
            fault_pb2.ResolveFaultsResponse(
                token=token,
                guest_address=addresses[0],
                size=PAGE_SIZE,
                outcome=fault_pb2.OUTCOME_DELIVERED,
                sharing=fault_pb2.SHARING_PRIVATE,
                payload=delivery.payload,
                metadata=delivery.metadata,
                bundle_addresses=addresses if len(addresses) > 1 or delivery.metadata else (),
                stream=delivery.stream,
                epoch=delivery.epoch,
            )
        )

    @staticmethod
    def _resolution(
        request: fault_pb2.ResolveFaultsRequest, outcome: fault_pb2.Outcome.ValueType
    ) -> fault_pb2.ResolveFaultsResponse:
        return fault_pb2.ResolveFaultsResponse(
            token=request.token, guest_address=request.guest_address & ~_IN_PAGE, size=request.size, outcome=outcome
        )

    def _put(self, response: fault_pb2.ResolveFaultsResponse) -> None:
        self._unsent.append(response)
        self._work.set()

    async def write_to(self, context: _Context) -> None:
        """Send resolutions as they come."""
        while True:
            while self._unsent:
                await context.write(self._unsent.popleft())
                self._sent.set()
            self._work.clear()
            await self._work.wait()

    def close(self) -> None:
        """Nobody reads any more: what waits is forgotten here, and asked for again on another stream."""
        for forget in self._waiting.values():
            forget()
        self._waiting.clear()
        self._tokens.clear()


def _nothing() -> None:
    pass


def _check(request: fault_pb2.ResolveFaultsRequest) -> None:
    if request.access not in _KNOWN_ACCESS or request.sharing not in _KNOWN_SHARING:
        raise FerryError(
            Reason.INVALID_ARGUMENT, f"a fault has access {request.access} and sharing {request.sharing}: unknown"
        )
