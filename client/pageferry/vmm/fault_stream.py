"""The stream of FaultService in a VMM: faults that are asked for there, until each is answered.

It is a blocking one, read by a thread of its own: grpc.aio serves the loops of two threads in one process badly, and a
VMM has one for its VmmService already.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, cast

import grpc

from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.v1 import fault_pb2 as pb
from pageferry.vmm.fault_messages import read_resolution

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferry.v1 import fault_pb2_grpc
    from pageferry.vmm.fault_messages import FaultEndpoint, Resolution

TOKEN_KEY: Final = "pageferry-fault-token-bin"  # noqa: S105 - a name, not a secret
FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 1.0

# Asking again would get the same answer.
_FINAL: Final = frozenset({
    grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED,
})  # fmt: skip

_log = logging.getLogger(__name__)

_Requests = queue.SimpleQueue[pb.ResolveFaultsRequest | None]


class FaultStream:
    """Asks for faults through `stub`, from any thread; a stream that breaks is opened again until `close`.

    What was not answered is asked for again then. Only a pager that does not know the secret or the service is final.
    `tell` is called, in this stream's own thread, with resolutions that nobody has asked for.
    """

    def __init__(
        self,
        endpoint: FaultEndpoint,
        stub: fault_pb2_grpc.FaultServiceStub,
        tell: Callable[[Resolution], None],
        most_in_flight: int,
    ) -> None:
        self._endpoint = endpoint
        self._stub = stub
        self._tell = tell
        self._metadata = ((TOKEN_KEY, endpoint.token),)
        self._tokens = itertools.count(1)
        self._slots = threading.BoundedSemaphore(most_in_flight)
        # Guards all that follows.
        self._lock = threading.Lock()
        self._unanswered: dict[int, tuple[pb.ResolveFaultsRequest, Future[Resolution]]] = {}
        self._requests: _Requests = queue.SimpleQueue()
        self._call: grpc.Call | None = None
        self._end: FerryError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-forwarder", daemon=True)
        self._thread.start()

    @property
    def end(self) -> FerryError | None:
        """Why nothing is asked for any more; None while it is."""
        with self._lock:
            return self._end

    def submit(self, request: pb.ResolveFaultsRequest) -> Future[Resolution]:
        """Ask for a fault, which gets its token here; waits only while `most_in_flight` others are under way."""
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

    def close(self) -> None:
        """End the stream, and wait for its thread. Faults that still wait end with CANCELLED. Twice does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._finish(FerryError(Reason.CANCELLED, f"the VMM closed its forwarder to {self._endpoint.socket_path}"))
        with self._lock:
            call = self._call
        if call is not None:
            call.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

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
                self._finish(explain(error))
                return
            pause = FIRST_PAUSE_SECONDS if answers else pause
            why = "the pager ended it" if error is None else explain(error)
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
            self._tell_ahead(response)
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

    def _tell_ahead(self, response: pb.ResolveFaultsResponse) -> None:
        try:
            self._tell(read_resolution(response))
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


def _until_none(requests: _Requests) -> Iterator[pb.ResolveFaultsRequest]:
    return cast("Iterator[pb.ResolveFaultsRequest]", iter(requests.get, None))


def explain(error: grpc.Call) -> FerryError:
    """Return the pager's reason, or that it cannot be reached."""
    return from_rpc(cast("grpc.aio.AioRpcError", error), Reason.SIDECAR_UNREACHABLE)
