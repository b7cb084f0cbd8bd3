"""The VMM's own fault handler: a userfaultfd over the guest's memory, and a peer that is asked for each page."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import socket
import struct
import sys
import threading

from ch_memory import TwoRegions
from ch_wire import PAGE_FAULT, ProtocolError, expect_ok, hang, request

from pageferry.abi import userfaultfd as abi
from pageferry.userfaultfd import open_userfaultfd
from pageferry.vmm.userfault import register_missing, unregister

PAGE = 4096


class FaultHandler:
    """Asks for one page at a time: those that are touched first, all others in order when it is idle."""

    def __init__(self, memory: TwoRegions, connection: socket.socket, behave: str) -> None:
        self._memory = memory
        self._connection = connection
        self._behave = behave
        # v53.0 knew missing pages only, and woke who waited.
        self._minor = behave != "wakes"
        features = abi.UFFD_FEATURE_MISSING_SHMEM | (abi.UFFD_FEATURE_MINOR_SHMEM if self._minor else 0)
        self._uffd = open_userfaultfd(features, user_mode_only=os.geteuid() != 0)
        for index, one in enumerate(memory.mappings):
            register_missing(self._uffd, memory.address(index), one.size, minor=self._minor)
        self._left = [(index, page) for index, one in enumerate(memory.mappings) for page in range(one.size // PAGE)]
        self._left.reverse()
        self._there: set[tuple[int, int]] = set()

    def start(self) -> None:
        threading.Thread(target=self._run, name="postcopy", daemon=True).start()

    def _run(self) -> None:
        try:
            self._serve()
        except (ProtocolError, OSError) as error:
            # As the exit event of the VMM.
            print(json.dumps({"event": "faults_failed", "why": str(error)}), flush=True)
            print(error, file=sys.stderr)
            os._exit(4)

    def _serve(self) -> None:
        self._misbehave()
        poll = select.poll()
        poll.register(self._uffd, select.POLLIN)
        while self._left:
            if poll.poll(0):
                self._fault()
            else:
                index, page = self._left.pop()
                if (index, page) not in self._there:
                    self._fetch(index, page)
        for index, one in enumerate(self._memory.mappings):
            unregister(self._uffd, self._memory.address(index), one.size)
        os.close(self._uffd)
        self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        print(json.dumps({"event": "faults_done"}), flush=True)

    def _fault(self) -> None:
        event, _, address, _ = abi.MSG.unpack(os.read(self._uffd, abi.UFFD_MSG_SIZE))
        if event != 0x12:
            raise ProtocolError(f"a userfaultfd event that was not asked for: {event:#x}")
        for index, one in enumerate(self._memory.mappings):
            offset = address - self._memory.address(index)
            if 0 <= offset < one.size:
                self._fetch(index, offset // PAGE)
                return
        raise ProtocolError(f"a fault at {address:#x}, outside of the guest")

    def _fetch(self, index: int, page: int) -> None:
        gpa = self._memory.mappings[index].gpa + page * PAGE
        self._connection.sendall(request(PAGE_FAULT, 16) + struct.pack("<QQ", gpa, PAGE))
        if expect_ok(self._connection, f"the page at {gpa:#x}"):
            raise ProtocolError("a shared-backing response carried bytes")
        self._continue(self._memory.address(index) + page * PAGE)
        self._there.add((index, page))

    def _continue(self, address: int) -> None:
        if not self._minor:
            fcntl.ioctl(self._uffd, abi.UFFDIO_WAKE, bytearray(abi.RANGE.pack(address, PAGE)))
            return
        argument = bytearray(abi.CONTINUE.pack(address, PAGE, 0, 0))
        try:
            fcntl.ioctl(self._uffd, abi.UFFDIO_CONTINUE, argument)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            fcntl.ioctl(self._uffd, abi.UFFDIO_WAKE, bytearray(abi.RANGE.pack(address, PAGE)))

    def _misbehave(self) -> None:
        asked = {
            "asks-outside": request(PAGE_FAULT, 16) + struct.pack("<QQ", 1 << 40, PAGE),
            "asks-across": request(PAGE_FAULT, 16) + struct.pack("<QQ", self._memory.mappings[0].size - PAGE, 2 * PAGE),
            "asks-crooked": request(PAGE_FAULT, 16) + struct.pack("<QQ", 100, PAGE),
            "asks-nothing": request(PAGE_FAULT, 16) + struct.pack("<QQ", 0, 0),
            "asks-at-length": request(PAGE_FAULT, 1 << 40),
            "asks-something-else": request(3, 0),
        }.get(self._behave)
        if asked is not None:
            self._connection.sendall(asked)
            hang()
        if self._behave == "hangs-up":
            self._connection.close()
            hang()
