"""How private pages leave a confidential VMM and come into one: sealed bundles, imports, and reports of them."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import queue
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from confidential_guest import ZERO, ZEROES, Book, Sides

from pageferry.errors import FerryError, Reason
from pageferry.vmm import FaultEndpoint, FaultForwarder, Import, ImportResult, Outcome, PageBundle, Resolution
from pageferry.vmm.regions import PAGE_SIZE

_KEY = b"known to both VMMs, and to no host between them"
_BLOCK = 24
_STREAMS = 3
RETRY_SECONDS = 0.02


def _crypt(page: int, epoch: int, body: bytes) -> bytes:
    stream = hashlib.shake_256(_KEY + struct.pack("<QQ", page, epoch)).digest(PAGE_SIZE)
    return (int.from_bytes(body, "little") ^ int.from_bytes(stream, "little")).to_bytes(PAGE_SIZE, "little")


def _seal(addresses: Sequence[int], payload: bytes, stream: int, epoch: int) -> bytes:
    head = struct.pack(f"<IQ{len(addresses)}Q", stream, epoch, *addresses)
    return hmac.new(_KEY, head + payload, hashlib.sha256).digest()


class Exporter:
    """Makes bundles: the pages of a block that are private, those without content in one that has no payload."""

    def __init__(self, book: Book, sides: Sides) -> None:
        self._book = book
        self._sides = sides
        self._epochs = itertools.count(1)

    def export(self, addresses: Iterable[int]) -> list[PageBundle]:
        bundles: list[PageBundle] = []
        covered: set[int] = set()
        for address in addresses:
            if address // PAGE_SIZE not in covered:
                pages = self._beside(address // PAGE_SIZE)
                covered.update(pages)
                bundles.append(self._bundle(pages))
        return bundles

    def _beside(self, page: int) -> list[int]:
        book, first = self._book, page - page % _BLOCK
        block = range(first, min(first + _BLOCK, len(book.private)))
        pending = book.versions[page] == ZERO
        return [one for one in block if book.private[one] and (book.versions[one] == ZERO) is pending]

    def _bundle(self, pages: list[int]) -> PageBundle:
        stream, epoch = pages[0] // _BLOCK % _STREAMS, next(self._epochs)
        addresses = [page * PAGE_SIZE for page in pages]
        payload = b""
        if self._book.versions[pages[0]] != ZERO:
            payload = b"".join(_crypt(page, epoch, self._sides.read(page, private=True)) for page in pages)
        return PageBundle(addresses, payload, _seal(addresses, payload, stream, epoch), stream, epoch)


class Arrival:
    """The destination's end: forwards private accesses, imports what is delivered, and reports it.

    The import of `refused` fails the first `refusals` times, and all that is in a bundle with it; for ever where that
    is negative.
    """

    def __init__(self, endpoint: FaultEndpoint, sides: Sides, *, opaque: bool, refused: int, refusals: int) -> None:
        self._sides = sides
        self._opaque = opaque
        self._refused, self._refusals = refused, refusals
        self._over = threading.Event()
        self._came: queue.SimpleQueue[Resolution | None] = queue.SimpleQueue()
        self._epochs: Counter[tuple[int, bool]] = Counter()
        self.in_order = True
        """Whether the guest has not run yet, so that bundles of a stream must come in the order of their export."""
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self.faults = FaultForwarder(endpoint, self._came.put)
        sides.fetch, sides.announce = self.fetch, self.announce
        self._importer = threading.Thread(target=self._import_all, name="importer", daemon=True)
        self._importer.start()

    def fetch(self, page: int) -> None:
        """Forward a private access, and import what it is answered with."""
        try:
            resolution = self.faults.resolve(0, page * PAGE_SIZE, private=True)
        except FerryError as error:
            if error.reason is Reason.CANCELLED:
                return
            raise
        self.counts["private faults"] += 1
        if resolution.outcome is Outcome.DELIVERED:
            self._report(self._import(resolution, ahead=False))
        elif resolution.outcome is Outcome.POISONED:
            raise FerryError(Reason.INTERNAL, f"private page {page} is poisoned")

    def announce(self, page: int, private: bool) -> None:
        """Tell the pager of a conversion."""
        self._until_known(lambda: self.faults.convert(page * PAGE_SIZE, PAGE_SIZE, private=private))
        self.counts["conversions to private" if private else "conversions to shared"] += 1

    def _until_known(self, call: Callable[[], None]) -> None:
        """Tell the pager something, however often it is away: until it knows, or the migration is over."""
        while not self._over.is_set():
            try:
                call()
            except FerryError as error:
                if error.reason not in (Reason.SIDECAR_UNREACHABLE, Reason.CANCELLED):
                    raise
                self._over.wait(RETRY_SECONDS)
            else:
                return

    def close(self) -> None:
        """The migration is over: all that is private is here."""
        self._over.set()
        with self._sides.lock:
            self._sides.fetch = self._sides.announce = None
        self._came.put(None)
        self._importer.join()
        self.faults.close()

    def _import_all(self) -> None:
        while (resolution := self._came.get()) is not None:
            if resolution.outcome is Outcome.DELIVERED:
                self.counts["ahead of faults"] += 1
                self._report(self._import(resolution, ahead=True))

    def _report(self, imports: list[Import]) -> None:
        try:
            self._until_known(lambda: self.faults.report_imports(imports))
        except FerryError as error:
            # That the migration has failed is told to whoever reports; the guest waits where it is.
            if error.reason is not Reason.VMM_FAILED:
                raise
            self.counts["told of failure"] += 1

    def _import(self, resolution: Resolution, *, ahead: bool) -> list[Import]:
        addresses = resolution.bundle_addresses or (resolution.guest_address,)
        pages = [address // PAGE_SIZE for address in addresses]
        self._check(resolution, addresses, ahead=ahead)
        self.counts["bundles" if len(pages) > 1 else "alone"] += 1
        with self._sides.lock:
            if self._refused in pages and self._refusals:
                self._refusals -= 1
                self.counts["refused"] += 1
                return [Import(address, PAGE_SIZE, ImportResult.FAILED) for address in addresses]
            results = [self._import_page(page, index, resolution) for index, page in enumerate(pages)]
        return [Import(address, PAGE_SIZE, result) for address, result in zip(addresses, results, strict=True)]

    def _import_page(self, page: int, index: int, resolution: Resolution) -> ImportResult:
        body = resolution.payload[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] or ZEROES
        result = ImportResult.DONE
        if page in self._sides.converted:
            result = ImportResult.STALE
        elif page in self._sides.private:
            result = ImportResult.DUPLICATE
        else:
            if self._opaque and resolution.payload:
                body = _crypt(page, resolution.epoch, body)
            self._sides.private[page] = bytearray(body)
        self.counts[result.name] += 1
        self.counts["pending"] += not resolution.payload
        return result

    def _check(self, resolution: Resolution, addresses: Sequence[int], *, ahead: bool) -> None:
        if not self._opaque:
            return
        stream, epoch = resolution.stream, resolution.epoch
        if resolution.metadata != _seal(addresses, resolution.payload, stream, epoch):
            self.findings.append(f"the seal of epoch {epoch} is broken")
        # Answers are imported by who asked, others by the importer: each of the two sees its own in their order.
        before = self._epochs[stream, ahead]
        if self.in_order and epoch <= before:
            self.findings.append(f"epoch {epoch} of stream {stream} came after {before}")
        self._epochs[stream, ahead] = epoch
        self.counts[f"stream {stream}"] += 1
