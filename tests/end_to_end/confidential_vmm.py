"""A VMM with a confidential guest, as a process of its own, run by path.

Shared pages lie in memory under a real userfaultfd; private ones are imported, and their faults forwarded. With
`--opaque` nobody but the VMM can read these, and they cross in bundles. Let go by the pager it says `arrived`, with
what it counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence

from confidential_guest import Book, ConfidentialWorker, Sides, check
from confidential_imports import Arrival, Exporter

from pageferry.errors import FerryError, Reason
from pageferry.guests.control import Verification, run_control
from pageferry.guests.process.guest import ProcessGuest
from pageferry.vmm import Backing, FaultEndpoint, GuestMemory, PageBundle, PrivatePages, VmmServer, VmmState
from pageferry.vmm.regions import PAGE_SIZE

MIB = 1 << 20
FORBIDDEN = b"\xee" * PAGE_SIZE
"""What the host would read of an opaque page: it must never arrive."""
BOOT_PAGES = 8
"""Private pages of the lower half that are touched before the guest runs."""


class ConfidentialVmm(ProcessGuest):
    """Running a fresh guest, or incoming."""

    def __init__(self, memory: GuestMemory, options: argparse.Namespace) -> None:
        super().__init__(memory)
        self._options = options
        self._sides = Sides(memory)
        self._arrival: Arrival | None = None

    def start(self) -> None:
        """Make a guest and let it run."""
        book = Book.fresh(7, self._memory.size // PAGE_SIZE)
        for page, private in enumerate(book.private):
            if private:
                self._sides.private[page] = bytearray(book.content(page))
            elif any(book.content(page)):
                self._memory.write(page * PAGE_SIZE, book.content(page))
        self._worker = ConfidentialWorker(self._sides, book, 0)
        self._worker.let_go("sidecar")
        self._state = VmmState.RUNNING

    async def use_fault_service(self, endpoint: FaultEndpoint) -> None:
        options = self._options
        self._arrival = Arrival(
            endpoint, self._sides, opaque=options.opaque, refused=options.refuse, refusals=options.refusals
        )

    async def pause(self) -> None:
        await super().pause()
        # Nothing may change from here on, so what the host may read of private pages is put there now.
        for page, body in self._sides.private.items():
            self._memory.write(page * PAGE_SIZE, FORBIDDEN if self._options.opaque else bytes(body))
        self._exporter = Exporter(self._running.book, self._sides)

    async def resume(self) -> None:
        if self._arrival is not None:
            self._arrival.in_order = False
        elif self._state is VmmState.PAUSED:
            for page in self._sides.private:
                self._sides.drop_shared(page)
        await super().resume()

    async def save_state(self) -> bytes:
        return self._running.book.pack()

    async def list_private_pages(self) -> PrivatePages:
        ranges: list[tuple[int, int]] = []
        for page in sorted(self._sides.private):
            if ranges and sum(ranges[-1]) == page * PAGE_SIZE:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + PAGE_SIZE)
            else:
                ranges.append((page * PAGE_SIZE, PAGE_SIZE))
        return PrivatePages(ranges, opaque=self._options.opaque)

    async def export_guest_pages(self, guest_addresses: Sequence[int]) -> Sequence[PageBundle]:
        return await asyncio.to_thread(self._exporter.export, guest_addresses)

    async def load_state(self, state: bytes) -> None:
        book = Book.unpack(state)
        if len(book.versions) * PAGE_SIZE != self._memory.size:
            raise FerryError(Reason.LAYOUT_MISMATCH, "the guests have memory of different sizes")
        self._worker = ConfidentialWorker(self._sides, book, 0)
        await asyncio.to_thread(self._boot, book)

    def _boot(self, book: Book) -> None:
        half = book.private[: len(book.private) // 2]
        private = [page for page, is_private in enumerate(half) if is_private]
        for page in private[:: max(1, len(private) // BOOT_PAGES)]:
            if page != self._options.refuse:
                self._sides.read(page, private=True)

    async def detach_pager(self) -> None:
        if self._arrival is not None:
            await asyncio.to_thread(self._arrival.close)
            line = json.dumps({"event": "arrived", **self._arrival.counts}).encode() + b"\n"
            os.write(sys.stdout.fileno(), line)
        await super().detach_pager()

    async def verify(self) -> Verification:
        worker = self._running
        await worker.hold("verifier")
        try:
            return await asyncio.to_thread(check, self._sides, worker.book)
        finally:
            worker.let_go("verifier")

    def take_findings(self) -> list[str]:
        findings = super().take_findings()
        if self._arrival is not None:
            findings += self._arrival.findings[:]
            self._arrival.findings.clear()
        return findings

    @property
    def _running(self) -> ConfidentialWorker:
        worker = self._required()
        assert isinstance(worker, ConfidentialWorker)
        return worker


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--incoming", action="store_true")
    parser.add_argument("--opaque", action="store_true")
    parser.add_argument("--backing", type=Backing, default=Backing.SHMEM)
    parser.add_argument("--refuse", type=int, default=-1)
    parser.add_argument("--refusals", type=int, default=0)
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)
    vmm = ConfidentialVmm(GuestMemory(int(options.memory.removesuffix("M")) * MIB, options.backing), options)
    if not options.incoming:
        vmm.start()
    server = VmmServer()
    await server.start(vmm, options.socket)
    await run_control(vmm, server)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
