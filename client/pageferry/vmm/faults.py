"""Forward faults that no userfaultfd sees to the pager, from any thread, and wait for their pages.

The stream is a blocking one, read by a thread of its own: grpc.aio serves the loops of two threads in one process
badly, and a VMM has one for its VmmService already. A fault waits for this way, so set
`GRPC_EXPERIMENTS=-event_engine_client,-event_engine_listener` in the environment before grpc is first imported.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, cast

import grpc

from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.v1 import fault_pb2 as pb
from pageferry.v1 import fault_pb2_grpc
from pageferry.vmm.fault_messages import (
    Access,
    FaultEndpoint,
    Import,
    ImportResult,
    Outcome,
    Resolution,
    read_resolution,
    sharing,
)
from pageferry.vmm.json_faults import JsonFaults
from pageferry.vmm.regions import PAGE_SIZE

if TYPE_CHECKING:
    import socket
    from types import TracebackType
    from typing import Self

    from pageferry.vmm.handoff import HandoffRegion

__all__ = ["Access", "FaultEndpoint", "FaultForwarder", "Import", "ImportResult", "Outcome", "Resolution"]

TOKEN_KEY: Final = "pageferry-fault-token-bin"  # noqa: S105 - a name, not a secret
MOST_IN_FLIGHT: Final = 1024
MOST_IMPORTS: Final = 4096
CALL_SECONDS: Final = 30.0
FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 1.0

_OPTIONS: Final = (
    # Above a bundle of 4 MiB with 1 MiB of metadata.
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
# Asking again would get the same answer.
_FINAL: Final = frozenset({
    grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED,
})  # fmt: skip

_log = logging.getLogger(__name__)

_Requests = queue.SimpleQueue[pb.ResolveFaultsRequest | None]


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
        self._endpoint = endpoint
        self._on_resolved = on_resolved
        self._metadata = ((TOKEN_KEY, endpoint.token),)
        self._channel = grpc.insecure_channel(f"unix:{endpoint.socket_path}", options=_OPTIONS)
        self._stub = fault_pb2_grpc.FaultServiceStub(self._channel)
        self._tokens = itertools.count(1)
        self._most_in_flight = most_in_flight
        self._slots = threading.BoundedSemaphore(most_in_flight)
        # Guards all that follows.
        self._lock = threading.Lock()
        self._unanswered: dict[int, tuple[pb.ResolveFaultsRequest, Future[Resolution]]] = {}
        self._requests: _Requests = queue.SimpleQueue()
        self._call: grpc.Call | None = None
        self._end: FerryError | None = None
        self._handoff: JsonFaults | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-forwarder", daemon=True)
        self._thread.start()

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
            ended = self._end is not None
        if before is not None:
            before.close()
        if ended:
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
        future: Future[Resolution] = Future()
        # Nobody can take a fault back: whoever waits can only give up waiting.
        future.set_running_or_notify_cancel()
        self._slots.acquire()
        with self._lock:
            if self._end is None:
                request.token = next(self._tokens)
                self._unanswered[request.token] = (request, future)
                self._requests.put(request)
                return future
            end = self._end
        self._slots.release()
        future.set_exception(end)
        return future

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
        if self._closed.is_set():
            return
        self._closed.set()
        self._finish(FerryError(Reason.CANCELLED, f"the VMM closed its forwarder to {self._endpoint.socket_path}"))
        with self._lock:
            call, handoff = self._call, self._handoff
        if handoff is not None:
            handoff.close()
        if call is not None:
            call.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._channel.close()

    def _run(self) -> None:
        try:
            self._keep_streaming()
        except Exception as error:
            _log.exception("the forwarder to %s failed", self._endpoint.socket_path)
            self._finish(FerryError(Reason.INTERNAL, f"the fault forwarder failed: {type(error).__name__}: {error}"))

    def _keep_streaming(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._closed.is_set():
            answers, error = self._stream_once()
            if self._closed.is_set():
                return
            if error is not None and error.code() in _FINAL:
                self._finish(_explain(error))
                return
            pause = FIRST_PAUSE_SECONDS if answers else pause
            why = "the pager ended it" if error is None else _explain(error)
            # With nothing to ask for, it may just be the end of the migration.
            level = logging.WARNING if self._unanswered else logging.INFO
            _log.log(level, "the fault stream to %s broke (%s): asking again", self._endpoint.socket_path, why)
            self._closed.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _stream_once(self) -> tuple[int, grpc.Call | None]:
        """Carry faults and resolutions until the stream ends; return how many came, and the error if there was one."""
        answers = 0
        requests = self._renew_requests()
        call = self._stub.ResolveFaults(_until_none(requests), metadata=self._metadata, wait_for_ready=True)
        with self._lock:
            self._call = call
            if self._end is not None:
                call.cancel()
        try:
            for response in call:
                answers += 1
                self._take(response)
        except grpc.RpcError as error:
            return answers, cast("grpc.Call", error)
        finally:
            # grpc's thread that sends waits for the next request, whatever became of the stream.
            requests.put(None)
        return answers, None

    def _renew_requests(self) -> _Requests:
        """Return the queue of a new stream: it begins with all that was not answered."""
        with self._lock:
            self._requests = queue.SimpleQueue()
            for request, _ in self._unanswered.values():
                self._requests.put(request)
            return self._requests

    def _take(self, response: pb.ResolveFaultsResponse) -> None:
        if response.token == 0:
            self._tell(response)
            return
        with self._lock:
            _, future = self._unanswered.pop(response.token, (None, None))
        if future is None:
            # Answered twice: it was asked for again while its answer was on the way.
            return
        self._slots.release()
        try:
            future.set_result(read_resolution(response))
        except FerryError as error:
            future.set_exception(error)

    def _tell(self, response: pb.ResolveFaultsResponse) -> None:
        try:
            resolution = read_resolution(response)
            if self._handoff is not None and self._handoff.deliver(resolution):
                return
            if self._on_resolved is not None:
                self._on_resolved(resolution)
        except Exception:
            _log.exception("a resolution ahead of its fault was not taken")

    def _finish(self, end: FerryError) -> None:
        """Take no more faults, and end those that wait."""
        with self._lock:
            self._end = self._end or end
            waiting = list(self._unanswered.values())
            self._unanswered.clear()
        for _, future in waiting:
            self._slots.release()
            future.set_exception(end)

    def _ask(self, call: Callable[..., object], request: object) -> None:
        with self._lock:
            end = self._end
        if end is not None:
            raise end
        try:
            call(request, metadata=self._metadata, timeout=CALL_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            raise _explain(cast("grpc.Call", error)) from error


def _until_none(requests: _Requests) -> Iterator[pb.ResolveFaultsRequest]:
    return cast("Iterator[pb.ResolveFaultsRequest]", iter(requests.get, None))


def _explain(error: grpc.Call) -> FerryError:
    return from_rpc(cast("grpc.aio.AioRpcError", error), Reason.SIDECAR_UNREACHABLE)
