"""A pager of a few lines for memory that no userfaultfd watches: it answers faults that a VMM forwards, both ways."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
        self.by_handoff = 0
        """Faults that came on the hand-off's connection."""
        self.unanswered: queue.SimpleQueue[int] | None = None
        """Where offsets of faults on the connection go instead of being answered, when there is such a place."""
        self._waiting: list[Callable[[], None]] = []
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
        for answer in waiting:
            answer()

    def push(self, first: int, end: int) -> None:
        """Install pages that nobody asked for."""
        for page in range(first, end):
            self._install(page)

    def finish(self) -> None:
        """Install all pages that are still missing."""
        self.push(0, self.pages)

    def close(self) -> None:
        self._listener.close()
        if self._attached.is_set():
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
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
        # Reset when the VMM ends with an answer unread.
        with contextlib.suppress(OSError):
            self._take_faults()

    def _take_faults(self) -> None:
        decoder, text = json.JSONDecoder(), ""
        while data := self._connection.recv(65536):
            text += data.decode()
            while text:
                fault, end = decoder.raw_decode(text)
                text = text[end:]
                self.by_handoff += 1
                if self.unanswered is not None:
                    self.unanswered.put(fault["offset"])
                    continue
                answer = partial(self._reply, fault)
                if self._may_answer(answer):
                    answer()

    def _reply(self, fault: dict[str, Any]) -> None:
        page = fault["offset"] // PAGE
        outcome = self._settle(page, page + 1)
        if outcome == pb.OUTCOME_REFUSED:
            # No word for it here: the service has it.
            self._connection.shutdown(socket.SHUT_WR)
            return
        reply = {"vcpu": fault["vcpu"], "token": fault["token"], "offset": fault["offset"], "len": PAGE}
        reply |= {"flags": fault["flags"], "zero": outcome == pb.OUTCOME_ZERO}
        if outcome == pb.OUTCOME_POISONED:
            assert fault["poison"]
            reply["poisoned"] = True
        with contextlib.suppress(OSError):
            # The VMM may have ended, or asked the service meanwhile.
            self._connection.send(json.dumps(reply).encode())

    def _may_answer(self, answer: Callable[[], None]) -> bool:
        """Keep the answer for later where it is not known yet."""
        with self._lock:
            known = self._read_page is not None or self.outcome is not None
            if not known:
                self._waiting.append(answer)
        return known

    def _answer(self, request: pb.ResolveFaultsRequest) -> pb.ResolveFaultsResponse | None:
        if not self._may_answer(lambda: self.service.send(self._resolve(request))):
            return None
        return self._resolve(request)

    def _resolve(self, request: pb.ResolveFaultsRequest) -> pb.ResolveFaultsResponse:
        first = request.guest_address // PAGE
        return installed(request, self._settle(first, first + request.size // PAGE))

    def _settle(self, first: int, end: int) -> int:
        """Install the pages, unless all faults get one outcome; return the outcome."""
        self.faulted.extend(range(first, end))
        if self.outcome is not None:
            return self.outcome
        self.push(first, end)
        return pb.OUTCOME_INSTALLED

    def _install(self, page: int) -> None:
        assert self._attached.wait(20)
        assert self._read_page is not None
        with self._lock:
            if not self._bitmap[page // 8] >> page % 8 & 1:
                return
            self._memory[page * PAGE : (page + 1) * PAGE] = self._read_page(page * PAGE)
            self._bitmap[page // 8] &= ~(1 << page % 8) & 0xFF
