"""A FaultService for tests of the VMM's side: it does what the test says, on a real Unix socket."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from pageferry.v1 import fault_pb2 as pb
from pageferry.v1 import fault_pb2_grpc
from pageferry.vmm import FaultEndpoint

TOKEN = b"\x00secret\xff"
Answer = Callable[[pb.ResolveFaultsRequest], pb.ResolveFaultsResponse | None]


def installed(request: pb.ResolveFaultsRequest, outcome: int = pb.OUTCOME_INSTALLED) -> pb.ResolveFaultsResponse:
    return pb.ResolveFaultsResponse(
        token=request.token, guest_address=request.guest_address, size=request.size, outcome=outcome
    )


class FaultService(fault_pb2_grpc.FaultServiceServicer):
    """Answers each fault with what `answer` returns; None leaves it open, for `send` to answer later."""

    def __init__(self, path: Path, answer: Answer = installed) -> None:
        self.endpoint = FaultEndpoint(str(path), TOKEN)
        self.answer = answer
        self.faults: queue.SimpleQueue[pb.ResolveFaultsRequest] = queue.SimpleQueue()
        self.calls: list[Any] = []
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.streams = 0
        self._answers: queue.SimpleQueue[pb.ResolveFaultsResponse | None] = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._server: grpc.Server | None = None
        self.start()

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        fault_pb2_grpc.add_FaultServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self.endpoint.socket_path}")
        self._server.start()

    def stop(self) -> None:
        """End, as a sidecar that dies: streams break."""
        if self._server is not None:
            stopped = self._server.stop(0)
            self._answers.put(None)
            stopped.wait(20)
            self._server = None
        # What `answer` uses may go once this returns.
        for reader in self._readers:
            reader.join(20)

    def send(self, response: pb.ResolveFaultsResponse) -> None:
        self._answers.put(response)

    def end_stream(self) -> None:
        self._answers.put(None)

    def fault(self) -> pb.ResolveFaultsRequest:
        """Return the next fault that was forwarded."""
        return self.faults.get(timeout=20)

    def ResolveFaults(
        self, request_iterator: Iterator[pb.ResolveFaultsRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ResolveFaultsResponse]:
        self._check(context)
        self.streams += 1
        self._answers = answers = queue.SimpleQueue()
        reader = threading.Thread(target=self._read, args=(request_iterator, answers), daemon=True)
        self._readers.append(reader)
        reader.start()
        yield from iter(answers.get, None)

    def ConvertRange(self, request: pb.ConvertRangeRequest, context: grpc.ServicerContext) -> pb.ConvertRangeResponse:
        self._check(context)
        self.calls.append(request)
        return pb.ConvertRangeResponse()

    def ReportImports(
        self, request: pb.ReportImportsRequest, context: grpc.ServicerContext
    ) -> pb.ReportImportsResponse:
        self._check(context)
        self.calls.append(request)
        return pb.ReportImportsResponse()

    def _read(self, requests: Iterator[pb.ResolveFaultsRequest], answers: queue.SimpleQueue[Any]) -> None:
        try:
            for request in requests:
                self.faults.put(request)
                answer = self.answer(request)
                if answer is not None:
                    answers.put(answer)
        except grpc.RpcError:
            # The VMM has gone, or closed its forwarder.
            pass
        finally:
            answers.put(None)

    def _check(self, context: grpc.ServicerContext) -> None:
        if self.refusal is not None:
            context.abort(*self.refusal)
        assert dict(context.invocation_metadata())["pageferry-fault-token-bin"] == TOKEN
