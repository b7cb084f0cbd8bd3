"""The guest of the doors' benchmark: threads that touch missing pages, through a userfaultfd or by forwarded exits.

Its memory is a shared memfd in either case. With `--door uffd` a userfaultfd goes to the pager, and a fault is a touch
of the mapping. With `--door exit` the memfd and a userfault bitmap go there, and a fault is what a VMM does at a vCPU's
exit: look at the bitmap, forward the fault where the page's bit is set, then read the page. Nothing in the kernel stops
these loads, so they keep the GIL, where a touch that may be a userfault lets go of it. Faults go to the pager as JSON
over the hand-off's connection, as FaultForwarder does where it can; with `--door grpc` to FaultService.

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
from pathlib import Path
from typing import Protocol

# Read when gRPC is first imported: see pageferry.vmm.faults.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

from toucher import PAGE, Toucher  # noqa: E402

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

_PRESENT = 1 << 63
NUMBER = 8
"""Bytes of a page's number, with which it begins."""


class Door(Protocol):
    """How a thread gets at a page."""

    def is_missing(self, page: int) -> bool:
        """Tell whether a touch would fault; not part of the time that is measured."""

    def touch(self, vcpu: int, page: int) -> bytes:
        """Return the first bytes of a page, once it is there."""


class UffdDoor:
    """The touch is all."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._first = memory.address // PAGE
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)

    def is_missing(self, page: int) -> bool:
        return not int.from_bytes(os.pread(self._pagemap, 8, (self._first + page) * 8), "little") & _PRESENT

    def touch(self, vcpu: int, page: int) -> bytes:
        return self._memory.read(page * PAGE, NUMBER)


class ExitDoor:
    """Each access looks at the bitmap first."""

    def __init__(self, memory: GuestMemory, bitmap: UserfaultBitmap, forwarder: FaultForwarder) -> None:
        self._memory = memory.address
        self._bits = bitmap.address
        self._forwarder = forwarder

    def is_missing(self, page: int) -> bool:
        return bool(ctypes.string_at(self._bits + (page >> 3), 1)[0] >> (page & 7) & 1)

    def touch(self, vcpu: int, page: int) -> bytes:
        while self.is_missing(page):
            try:
                self._forwarder.resolve(vcpu, page * PAGE, PAGE, Access.READ)
            except FerryError as error:
                # Every page is in, and the forwarder was closed before it had this answer.
                if error.reason is not Reason.CANCELLED or self.is_missing(page):
                    raise
        return ctypes.string_at(self._memory + page * PAGE, NUMBER)

    def close(self) -> None:
        self._forwarder.close()


class DoorGuest(Toucher):
    """Memory behind one of the doors; of `page_size`, as far as the sidecars know."""

    def __init__(self, memory: GuestMemory, state: VmmState, kind: str, page_size: int) -> None:
        super().__init__(memory, state)
        self._kind = kind
        self._page_size = page_size
        self._endpoint: FaultEndpoint | None = None
        self.door: UffdDoor | ExitDoor = UffdDoor(memory)

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
        forwarder = FaultForwarder(self._endpoint)
        if self._kind == "exit":
            self.link.forward_through(forwarder)
        self.door = ExitDoor(self.memory, bitmap, forwarder)

    async def detach_pager(self) -> None:
        if isinstance(self.door, ExitDoor):
            await asyncio.to_thread(self.door.close)
        await super().detach_pager()


def fill(memory: GuestMemory, pages: range) -> None:
    """Write these pages: number, then noise that no zero detection can skip."""
    noise = random.Random(1).randbytes(PAGE - 8)
    for page in pages:
        memory.write(page * PAGE, struct.pack("<Q", page + 1) + noise)


class Touches:
    """The pages that are still to be touched, in random order."""

    def __init__(self, memory: GuestMemory, pages: range) -> None:
        self._memory = memory
        self._left = deque(random.sample(pages, len(pages)))

    def run(self, door: Door, count: int, threads: int) -> dict[str, object]:
        """Touch from several threads at once; each page goes to one of them."""
        taken: list[list[float]] = [[] for _ in range(threads)]
        failures: list[Exception] = []
        start = threading.Barrier(threads + 1)

        def work(vcpu: int) -> None:
            start.wait()
            try:
                self._touch(door, vcpu, count // threads, taken[vcpu])
            except Exception as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(vcpu,)) for vcpu in range(threads)]
        for worker in workers:
            worker.start()
        start.wait()
        began = time.perf_counter()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - began
        if failures:
            raise failures[0]
        return {"event": "touched", "us": list(itertools.chain(*taken)), "seconds": seconds}

    def _touch(self, door: Door, vcpu: int, count: int, taken: list[float]) -> None:
        while len(taken) < count:
            try:
                page = self._left.popleft()
            except IndexError:
                return
            if not door.is_missing(page):
                continue
            began = time.perf_counter_ns()
            found = door.touch(vcpu, page)
            taken.append(round((time.perf_counter_ns() - began) / 1000, 1))
            if int.from_bytes(found, "little") != page + 1:
                raise ValueError(f"page {page} begins with {found!r}")


def obey(guest: DoorGuest, touches: Touches) -> None:
    """Take commands until stdin ends."""
    for line in sys.stdin:
        word, *numbers = line.split()
        if word != "touch":
            continue
        try:
            done = touches.run(guest.door, int(numbers[0]), int(numbers[1]))
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
    guest = DoorGuest(memory, state, options.door, options.page_size)
    await server.start(guest, str(options.socket))
    threading.Thread(target=obey, args=(guest, Touches(memory, pages)), daemon=True).start()
    print(json.dumps({"event": "ready", "pid": os.getpid()}), flush=True)
    await server.wait_closed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--memory", type=int, required=True, help="MiB")
    parser.add_argument("--door", choices=("uffd", "exit", "grpc"), required=True)
    parser.add_argument("--page-size", type=int, default=PAGE, help="what the memory is said to be backed with, bytes")
    parser.add_argument("--every", type=int, default=1, help="only every n-th page is written, and touched")
    parser.add_argument("--incoming", action="store_true")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
