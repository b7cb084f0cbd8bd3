"""A VMM that forwards faults to a real FaultService, and a pager of which the test plays the part."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import grpc

from pageferry.errors import Reason, from_rpc
from pageferry.v1 import fault_pb2 as pb
from pageferry.v1 import fault_pb2_grpc
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.destination.door import DoorEvents
from pageferryd.destination.exit_door import ExitDoor
from pageferryd.destination.fault_service import TOKEN_KEY
from pageferryd.vmm.driver import FaultEndpoint

DEADLINE = 10.0


class HandSession:
    """Stands where a session does: notes what a door delivers, and settles nothing by itself."""

    def __init__(self, door: ExitDoor) -> None:
        self.faults: list[int] = []
        self.failures: list[Exception] = []
        self.converted: list[tuple[int, int]] = []
        self.placer = SimpleNamespace(desk=SimpleNamespace(connect=lambda *_: None, disconnect=lambda _to: None))
        self._changed = asyncio.Event()
        door.open(self._take, self.failures.append)

    def _take(self, events: DoorEvents) -> None:
        self.faults += events.faults
        self._changed.set()

    def convert(self, first: int, pages: int) -> None:
        self.converted.append((first, pages))

    async def until(self, faults: int) -> None:
        """Wait until as many pages were faulted on."""
        async with asyncio.timeout(DEADLINE):
            while len(self.faults) < faults:
                self._changed.clear()
                await self._changed.wait()


class ForwardingVmm:
    """The VMM's end: one channel, and one stream at a time."""

    def __init__(self, endpoint: FaultEndpoint, token: bytes | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(
            f"unix:{endpoint.socket_path}",
            # No more is taken from the pager than a VMM reads.
            options=[("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)],
        )
        self.stub: Any = fault_pb2_grpc.FaultServiceStub(self._channel)
        secret = endpoint.token if token is None else token
        self.metadata = ((TOKEN_KEY, secret),) if secret else ()
        self._tokens = itertools.count(1)
        self.call: Any = None

    def open(self) -> None:
        self.call = self.stub.ResolveFaults(metadata=self.metadata)

    async def ask(self, address: int, size: int = PAGE_SIZE, token: int | None = None, **fields: Any) -> int:
        """Forward a fault; return its token."""
        if self.call is None:
            self.open()
        token = next(self._tokens) if token is None else token
        request = pb.ResolveFaultsRequest(token=token, guest_address=address, size=size, **fields)
        async with asyncio.timeout(DEADLINE):
            await self.call.write(request)
        return token

    async def answer(self) -> pb.ResolveFaultsResponse:
        async with asyncio.timeout(DEADLINE):
            response = await self.call.read()
        assert isinstance(response, pb.ResolveFaultsResponse), await self.call.details()
        return response

    async def outcome(self, address: int, size: int = PAGE_SIZE, **fields: Any) -> int:
        """Forward a fault and return how it ends."""
        token = await self.ask(address, size, **fields)
        response = await self.answer()
        assert response.token == token
        return response.outcome

    async def refusal(self, address: int, size: int = PAGE_SIZE, **fields: Any) -> str:
        """Forward a fault that is refused; return the reason."""
        token = await self.ask(address, size, **fields)
        response = await self.answer()
        assert (response.token, response.outcome) == (token, pb.OUTCOME_REFUSED)
        assert response.message
        return response.reason

    async def ended(self) -> Reason:
        """Wait for the end of the stream; return why."""
        async with asyncio.timeout(DEADLINE):
            try:
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError as error:
                return from_rpc(error, Reason.INTERNAL).reason
        raise AssertionError("the stream ended without an error")

    async def hang_up(self) -> None:
        """End the stream without a word, as a VMM that dies."""
        if self.call is not None:
            self.call.cancel()
            self.call = None

    async def close(self) -> None:
        await self.hang_up()
        await self._channel.close(None)
