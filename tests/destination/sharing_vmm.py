"""A VMM in a process of its own, of the three-descriptor form: hands its userfaultfd, memory file and bitmap over.

Run as `sharing_vmm.py SOCKET PAGES`: connects when told to, says "ready", then answers a page number a line with the
first bytes of that page in hex. This file is also the test's end of that.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import sys

from waiting_vmm import WaitingVmm

from pageferry.abi import userfaultfd as abi
from pageferry.vmm.bitmap import UserfaultBitmap
from pageferry.vmm.mapping import MappedMemory
from pageferryd.linux.userfaultfd import Userfaultfd

PAGE = 4096
FEATURES = abi.UFFD_FEATURE_EVENT_REMOVE | abi.UFFD_FEATURE_MISSING_SHMEM | abi.UFFD_FEATURE_MINOR_SHMEM


class SharingVmm(WaitingVmm):
    """The child; `pid` is its process id."""

    @classmethod
    async def start(cls, socket_path: object, pages: int) -> SharingVmm:
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, __file__, str(socket_path), str(pages)]
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))


def main() -> None:
    path, pages = sys.argv[1], int(sys.argv[2])
    memfd = os.memfd_create("guest")
    os.ftruncate(memfd, pages * PAGE)
    memory = MappedMemory(pages * PAGE, memfd)
    bits = UserfaultBitmap(pages)
    uffd = Userfaultfd.open(FEATURES)
    uffd.register(memory.address, memory.size, missing=True, minor=True)
    table = [
        {
            "base_host_virt_addr": memory.address,
            "size": memory.size,
            "offset": 0,
            "page_size": PAGE,
            "gpa_start": 0,
            "is_guest_memfd": False,
        }
    ]
    sys.stdin.readline()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    fds = array.array("i", [uffd.fileno(), memfd, bits.memfd])
    connection.sendmsg([json.dumps(table).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    print("ready", flush=True)
    for line in sys.stdin:
        print(memory.read(int(line) * PAGE, 8).hex(), flush=True)


if __name__ == "__main__":
    main()
