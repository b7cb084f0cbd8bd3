"""The guest of the doors' benchmark: threads that touch missing pages, through a userfaultfd or by forwarded exits.

Its memory is a shared memfd in any case. With `--door uffd` a userfaultfd goes to the pager, and a fault is a touch of
the mapping. With all others the memfd and a userfault bitmap go there, and a fault is what a VMM does at a vCPU's exit:
look at the bitmap, forward the fault where the page's bit is set, then read the page. With `exit` faults go to the
pager as JSON over the hand-off's connection. Both are native threads (vcpus.c), as those of VMMs are.

With `forwarder` and `grpc` the threads are Python's, and FaultForwarder forwards: over the hand-off's connection, or
through FaultService alone. Nothing in the kernel stops their loads, so these keep the GIL.

One JSON object a line on stdout, one command a line on stdin: `touch COUNT THREADS` touches COUNT random pages that are
missing, or as many as there still are, and answers with the microseconds of each and the seconds of all.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import itertools
import json
import os
import random
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

# Read when gRPC is first imported: see pageferry.vmm.faults.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

from toucher import PAGE, Toucher  # noqa: E402
from vcpus import Vcpus  # noqa: E402

from pageferry.errors import FerryError, Reason  # noqa: E402
from pageferry.vmm import (  # noqa: E402
    Access,
    Backing,
    FaultEndpoint,
    FaultForwarder,
    GuestMemory,
    HandoffRegion,
    MemoryDescription,
    PagerLink,
    Region,
    UserfaultBitmap,
    VmmServer,
    VmmState,
    send_handoff,
)

NUMBER = 8
"""Bytes of a page's number, with which it begins."""


class Threads(Protocol):
    """Threads that touch pages."""

    def touch(self, pages: Sequence[int], count: int, threads: int) -> tuple[list[float], float, int]:
        """Touch `count` of the pages that are missing, or as many as there are.

        Return the microseconds of each, the seconds of all, and how many of the pages were looked at.
        """


class PythonThreads:
    """A VMM in Python: each access looks at the bitmap first."""

    def __init__(self, memory: GuestMemory, bitmap: UserfaultBitmap, forwarder: FaultForwarder) -> None:
        self._memory = memory.address
        self._bits = bitmap.address
        self._forwarder = forwarder

    def touch(self, pages: Sequence[int], count: int, threads: int) -> tuple[list[float], float, int]:
        each = count // threads
        left = deque(pages)
        taken: list[list[float]] = [[] for _ in range(threads)]
        start = threading.Barrier(threads + 1)

        def work(vcpu: int) -> None:
            start.wait()
            self._touch_some(vcpu, left, each, taken[vcpu])

        with ThreadPoolExecutor(threads) as workers:
            done = [workers.submit(work, vcpu) for vcpu in range(threads)]
            start.wait()
            began = time.perf_counter()
            for one in done:
                one.result()
        return list(itertools.chain(*taken)), time.perf_counter() - began, len(pages) - len(left)

    def close(self) -> None:
        self._forwarder.close()

    def _touch_some(self, vcpu: int, left: deque[int], count: int, taken: list[float]) -> None:
        while len(taken) < count:
            try:
                page = left.popleft()
            except IndexError:
                return
            if not self._is_missing(page):
                continue
            began = time.perf_counter_ns()
            found = self._touch_one(vcpu, page)
            taken.append(round((time.perf_counter_ns() - began) / 1000, 1))
            if int.from_bytes(found, "little") != page + 1:
                raise ValueError(f"page {page} begins with {found!r}")

    def _is_missing(self, page: int) -> bool:
        return bool(ctypes.string_at(self._bits + (page >> 3), 1)[0] >> (page & 7) & 1)

    def _touch_one(self, vcpu: int, page: int) -> bytes:
        while self._is_missing(page):
            try:
                self._forwarder.resolve(vcpu, page * PAGE, PAGE, Access.READ)
            except FerryError as error:
                # Every page is in, and the forwarder was closed before it had this answer.
                if error.reason is not Reason.CANCELLED or self._is_missing(page):
                    raise
        return ctypes.string_at(self._memory + page * PAGE, NUMBER)


class DoorGuest(Toucher):
    """Memory behind one of the doors; of `page_size`, as far as the sidecars know."""

    def __init__(self, memory: GuestMemory, state: VmmState, kind: str, page_size: int, library: Path) -> None:
        super().__init__(memory, state)
        self._kind = kind
        self._page_size = page_size
        self._library = library
        self._endpoint: FaultEndpoint | None = None
        self.threads: Threads = Vcpus(library, memory.address)

    async def describe_memory(self) -> MemoryDescription:
        return MemoryDescription(self.state, [Region(0, self.memory.size, self._page_size, self.memory.location())])

    async def use_fault_service(self, endpoint: FaultEndpoint) -> None:
        self._endpoint = endpoint

    async def attach_pager(self, socket_path: str) -> None:
        if self._kind == "uffd":
            await super().attach_pager(socket_path)
            return
        if self._endpoint is None:
            raise FerryError(Reason.ILLEGAL_STATE, "the sidecar has no FaultService for the exit door")
        bitmap = UserfaultBitmap(self.memory.size // PAGE)
        # Aligned as a mapping of such pages is. Without a userfaultfd nothing is done at this address.
        address = self.memory.address // self._page_size * self._page_size
        regions = [HandoffRegion(address, self.memory.size, 0, self._page_size, gpa_start=0)]
        connection = await asyncio.to_thread(send_handoff, socket_path, [self.memory.memfd, bitmap.memfd], regions)
        self.link = PagerLink(None, connection, regions)
        if self._kind == "exit":
            # The bitmap is mapped as long as the process lives: it is never closed.
            self.threads = Vcpus(self._library, self.memory.address, bitmap.address, connection.fileno())
            return
        forwarder = FaultForwarder(self._endpoint)
        if self._kind == "forwarder":
            self.link.forward_through(forwarder)
        self.threads = PythonThreads(self.memory, bitmap, forwarder)

    async def detach_pager(self) -> None:
        if isinstance(self.threads, PythonThreads):
            await asyncio.to_thread(self.threads.close)
        await super().detach_pager()


def fill(memory: GuestMemory, pages: range) -> None:
    """Write these pages: number, then noise that no zero detection can skip."""
    noise = random.Random(1).randbytes(PAGE - 8)
    for page in pages:
        memory.write(page * PAGE, struct.pack("<Q", page + 1) + noise)


class Touches:
    """The pages that are still to be touched, in random order."""

    def __init__(self, pages: range) -> None:
        self._left = random.sample(pages, len(pages))

    def run(self, threads: Threads, count: int, number: int) -> dict[str, object]:
        """Touch from several threads at once; each page goes to one of them."""
        taken, seconds, used = threads.touch(self._left, count, number)
        del self._left[:used]
        return {"event": "touched", "us": taken, "seconds": seconds}


def obey(guest: DoorGuest, touches: Touches) -> None:
    """Take commands until stdin ends."""
    for line in sys.stdin:
        word, *numbers = line.split()
        if word != "touch":
            continue
        try:
            done = touches.run(guest.threads, int(numbers[0]), int(numbers[1]))
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        print(json.dumps(done), flush=True)
    os._exit(0)


async def serve(options: argparse.Namespace) -> None:
    memory = GuestMemory(options.memory << 20, Backing.SHMEM)
    pages = range(0, memory.size // PAGE, options.every)
    if not options.incoming:
        fill(memory, pages)
    server = VmmServer()
    state = VmmState.INCOMING if options.incoming else VmmState.RUNNING
    guest = DoorGuest(memory, state, options.door, options.page_size, options.library)
    await server.start(guest, str(options.socket))
    threading.Thread(target=obey, args=(guest, Touches(pages)), daemon=True).start()
    print(json.dumps({"event": "ready", "pid": os.getpid()}), flush=True)
    await server.wait_closed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--memory", type=int, required=True, help="MiB")
    parser.add_argument("--door", choices=("uffd", "exit", "forwarder", "grpc"), required=True)
    parser.add_argument("--library", type=Path, required=True, help="vcpus.c, compiled")
    parser.add_argument("--page-size", type=int, default=PAGE, help="what the memory is said to be backed with, bytes")
    parser.add_argument("--every", type=int, default=1, help="only every n-th page is written, and touched")
    parser.add_argument("--incoming", action="store_true")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
