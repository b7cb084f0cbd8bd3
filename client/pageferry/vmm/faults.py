"""Forward faults that no userfaultfd sees to the pager, from any thread, and wait for their pages.

A fault waits for gRPC on this way, so set `GRPC_EXPERIMENTS=-event_engine_client,-event_engine_listener` in the
environment before grpc is first imported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, cast

import grpc

from pageferry.v1 import fault_pb2 as pb
from pageferry.v1 import fault_pb2_grpc
from pageferry.vmm.fault_messages import (
    Access,
    FaultEndpoint,
    Import,
    ImportResult,
    Outcome,
    Resolution,
    sharing,
)
from pageferry.vmm.fault_stream import TOKEN_KEY, FaultStream, explain
from pageferry.vmm.json_faults import JsonFaults
from pageferry.vmm.regions import PAGE_SIZE

if TYPE_CHECKING:
    import socket
    from types import TracebackType
    from typing import Self

    from pageferry.vmm.handoff import HandoffRegion

__all__ = ["Access", "FaultEndpoint", "FaultForwarder", "Import", "ImportResult", "Outcome", "Resolution"]

MOST_IN_FLIGHT: Final = 1024
MOST_IMPORTS: Final = 4096
CALL_SECONDS: Final = 30.0

_OPTIONS: Final = (
    # Above a bundle of 4 MiB with 1 MiB of metadata.
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class FaultForwarder:
    """The VMM's end of the FaultService of its guest. All methods block, and may be called from any thread.

    A stream that breaks is opened again, and what was not answered is asked for again, until `close`: a guest without
    its pager waits. Only a pager that does not know the secret or the service is final. `on_resolved` is called, in the
    forwarder's own thread, with pages that came ahead of their faults; it must not block.

    A fault costs much less over the hand-off's connection than over gRPC: `PagerLink.forward_through` gives it here.
    """

    def __init__(
        self,
        endpoint: FaultEndpoint,
        on_resolved: Callable[[Resolution], None] | None = None,
        *,
        most_in_flight: int = MOST_IN_FLIGHT,
    ) -> None:
        self._on_resolved = on_resolved
        self._metadata = ((TOKEN_KEY, endpoint.token),)
        self._channel = grpc.insecure_channel(f"unix:{endpoint.socket_path}", options=_OPTIONS)
        self._stub = fault_pb2_grpc.FaultServiceStub(self._channel)
        self._most_in_flight = most_in_flight
        # Guards what follows.
        self._lock = threading.Lock()
        self._handoff: JsonFaults | None = None
        # Its thread runs from here on.
        self._stream = FaultStream(endpoint, self._stub, self._tell, most_in_flight)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def use_handoff(self, connection: socket.socket, regions: Sequence[HandoffRegion]) -> None:
        """Let `resolve` forward faults on shared single pages over a hand-off's connection from now on.

        The connection stays its owner's, who closes it after the forwarder. Once it breaks, FaultService does it all
        again, and is asked for what was not answered.
        """
        handoff = JsonFaults(connection, regions, self._most_in_flight)
        with self._lock:
            before, self._handoff = self._handoff, handoff
        if before is not None:
            before.close()
        if self._stream.end is not None:
            handoff.close()

    def resolve(
        self,
        vcpu: int,
        guest_address: int,
        size: int = PAGE_SIZE,
        access: Access = Access.UNKNOWN,
        *,
        private: bool = False,
        exit_flags: int = 0,
    ) -> Resolution:
        """Forward one fault and wait until it is resolved. Raises what the future of `submit` holds."""
        handoff = self._handoff
        if handoff is not None and size == PAGE_SIZE and not private:
            resolution = handoff.resolve(vcpu, guest_address, exit_flags)
            if resolution is not None:
                return resolution
        return self.submit(vcpu, guest_address, size, access, private=private, exit_flags=exit_flags).result()

    def submit(
        self,
        vcpu: int,
        guest_address: int,
        size: int = PAGE_SIZE,
        access: Access = Access.UNKNOWN,
        *,
        private: bool = False,
        exit_flags: int = 0,
    ) -> Future[Resolution]:
        """Forward one fault to FaultService; waits only while `most_in_flight` others are under way there.

        `size` is in bytes, a multiple of 4096, at most 2 MiB. The future may hold a FerryError: the pager's reason
        where it refused the fault, CANCELLED after `close`.
        """
        request = pb.ResolveFaultsRequest(
            vcpu=vcpu,
            guest_address=guest_address,
            size=size,
            access=access.value,
            sharing=sharing(private=private),
            exit_flags=exit_flags,
        )
        return self._stream.submit(request)

    def convert(self, guest_address: int, size: int, *, private: bool) -> None:
        """Say that the guest makes pages private or shared; on return nothing old will be installed there any more."""
        self._ask(
            self._stub.ConvertRange,
            pb.ConvertRangeRequest(guest_address=guest_address, size=size, sharing=sharing(private=private)),
        )

    def report_imports(self, imports: Sequence[Import]) -> None:
        """Tell how the imports of delivered pages ended."""
        for first in range(0, len(imports), MOST_IMPORTS):
            some = [
                pb.Import(guest_address=one.guest_address, size=one.size, result=one.result.value)
                for one in imports[first : first + MOST_IMPORTS]
            ]
            self._ask(self._stub.ReportImports, pb.ReportImportsRequest(imports=some))

    def close(self) -> None:
        """End the stream. Faults that still wait end with CANCELLED. A second call does nothing."""
        self._stream.close()
        with self._lock:
            handoff = self._handoff
        if handoff is not None:
            # Whoever waits there asks the stream next, which says that it has ended.
            handoff.close()
        self._channel.close()

    def _tell(self, resolution: Resolution) -> None:
        if self._handoff is not None and self._handoff.deliver(resolution):
            return
        if self._on_resolved is not None:
            self._on_resolved(resolution)

    def _ask(self, call: Callable[..., object], request: object) -> None:
        if (end := self._stream.end) is not None:
            raise end
        try:
            call(request, metadata=self._metadata, timeout=CALL_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            raise explain(cast("grpc.Call", error)) from error
