"""A pager of a few lines, for tests of the VMM's side alone: it serves one region from a function, page by page."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import os
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from pageferry.abi import userfaultfd as abi

PAGE = 4096


def receive_handoff(listener: socket.socket) -> tuple[socket.socket, bytes, list[int]]:
    """Accept one connection; return it with the bytes and the descriptors of the first message."""
    listener.settimeout(20)
    connection, _ = listener.accept()
    data, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(8 * 4))
    descriptors = array.array("i")
    for _, _, payload in ancillary:
        descriptors.frombytes(payload)
    return connection, data, list(descriptors)


def copy_page(uffd: int, address: int, page: bytes) -> bool:
    """Install a page; False when one is there already."""
    source = ctypes.create_string_buffer(page, PAGE)
    argument = bytearray(abi.COPY.pack(address, ctypes.addressof(source), PAGE, 0, 0))
    try:
        fcntl.ioctl(uffd, abi.UFFDIO_COPY, argument)
    except FileExistsError:
        return False
    return True


def read_fault(uffd: int) -> int | None:
    """Return the page-aligned address of the next fault, or None when there is none now."""
    try:
        message = os.read(uffd, abi.UFFD_MSG_SIZE)
    except BlockingIOError:
        return None
    event, _, address, _ = abi.MSG.unpack(message)
    assert event == abi.UFFD_EVENT_PAGEFAULT
    return address & ~(PAGE - 1)


class TinyPager:
    """Takes one hand-off at `path`, and serves faults until `finish`, which installs whatever is missing."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.faults = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._go = threading.Event()
        self._finish = threading.Event()
        self._finished = threading.Event()
        self._read_page: Callable[[int], bytes] | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def serve(self, read_page: Callable[[int], bytes]) -> None:
        """From now on answer faults with `read_page(byte offset)`."""
        self._read_page = read_page
        self._go.set()

    def finish(self) -> None:
        """Install all pages that are still missing; return when every one is there."""
        self._finish.set()
        self._go.set()
        self._thread.join(30)
        assert self._finished.is_set(), self._failure

    def close(self) -> None:
        """End the thread, whatever it waits for."""
        self._finish.set()
        self._go.set()
        self._listener.close()
        self._thread.join(30)

    def _run(self) -> None:
        try:
            connection, data, (uffd,) = receive_handoff(self._listener)
            with connection:
                (region,) = json.loads(data)
                self._base, self._size = region["base_host_virt_addr"], region["size"]
                self._go.wait(30)
                if self._read_page is not None:
                    self._serve(uffd)
            os.close(uffd)
        except BaseException as error:
            self._failure = error

    def _serve(self, uffd: int) -> None:
        while not self._finish.is_set():
            if select.select([uffd], [], [], 0.01)[0]:
                address = read_fault(uffd)
                if address is not None:
                    self.faults += 1
                    self._install(uffd, address)
        for address in range(self._base, self._base + self._size, PAGE):
            self._install(uffd, address)
        self._finished.set()

    def _install(self, uffd: int, address: int) -> None:
        assert self._read_page is not None
        try:
            if not copy_page(uffd, address, self._read_page(address - self._base)):
                fcntl.ioctl(uffd, abi.UFFDIO_WAKE, bytearray(abi.RANGE.pack(address, PAGE)))
        except OSError as error:
            # The guest is gone: a test ended it while its pages were on their way.
            if error.errno != errno.ESRCH:
                raise
