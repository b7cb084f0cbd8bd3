"""A pager of a few lines for memory that no userfaultfd watches: it answers the faults that a VMM forwards."""

from __future__ import annotations

import json
import mmap
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from fault_service import FaultService, installed
from tiny_pager import PAGE, receive_handoff

from pageferry.v1 import fault_pb2 as pb
from pageferry.v1 import vmm_pb2


class GuestMemfdPager:
    """Takes one hand-off; once `serve` has told where pages come from, it answers faults, and pushes when asked to."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "exit-pager.sock")
        self.service = FaultService(directory / "faults.sock", self._answer)
        self.faulted: list[int] = []
        self.outcome: int | None = None
        """Answer every fault so, and install nothing."""
        self._read_page: Callable[[int], bytes] | None = None
        self._waiting: list[pb.ResolveFaultsRequest] = []
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._attached = threading.Event()
        self._thread = threading.Thread(target=self._take_handoff)
        self._thread.start()

    @property
    def attach_request(self) -> vmm_pb2.AttachPagerRequest:
        endpoint = self.service.endpoint
        return vmm_pb2.AttachPagerRequest(
            socket_path=self.path, fault_socket_path=endpoint.socket_path, fault_token=endpoint.token
        )

    def serve(self, read_page: Callable[[int], bytes]) -> None:
        """From now on answer faults with `read_page(byte offset)`."""
        with self._lock:
            self._read_page = read_page
            waiting, self._waiting = self._waiting, []
        for request in waiting:
            self.service.send(self._resolve(request))

    def push(self, first: int, end: int) -> None:
        """Install pages that nobody asked for."""
        for page in range(first, end):
            self._install(page)

    def finish(self) -> None:
        """Install all pages that are still missing."""
        self.push(0, self.pages)

    def close(self) -> None:
        self._listener.close()
        self._thread.join(30)
        self.service.stop()
        if self._attached.is_set():
            self._memory.close()
            self._bitmap.close()
            self._connection.close()

    def _take_handoff(self) -> None:
        try:
            self._connection, data, descriptors = receive_handoff(self._listener)
        except OSError:
            # Closed without a hand-off.
            return
        (region,) = json.loads(data)
        assert region["is_guest_memfd"]
        memory, bitmap = descriptors
        self.pages = region["size"] // PAGE
        self._memory = mmap.mmap(memory, region["size"])
        self._bitmap = mmap.mmap(bitmap, os.fstat(bitmap).st_size)
        for fd in descriptors:
            os.close(fd)
        self._attached.set()

    def _answer(self, request: pb.ResolveFaultsRequest) -> pb.ResolveFaultsResponse | None:
        with self._lock:
            if self._read_page is None and self.outcome is None:
                self._waiting.append(request)
                return None
        return self._resolve(request)

    def _resolve(self, request: pb.ResolveFaultsRequest) -> pb.ResolveFaultsResponse:
        first = request.guest_address // PAGE
        self.faulted.extend(range(first, first + request.size // PAGE))
        if self.outcome is not None:
            return installed(request, self.outcome)
        self.push(first, first + request.size // PAGE)
        return installed(request)

    def _install(self, page: int) -> None:
        assert self._attached.wait(20)
        assert self._read_page is not None
        with self._lock:
            if not self._bitmap[page // 8] >> page % 8 & 1:
                return
            self._memory[page * PAGE : (page + 1) * PAGE] = self._read_page(page * PAGE)
            self._bitmap[page // 8] &= ~(1 << page % 8) & 0xFF
