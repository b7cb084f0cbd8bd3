"""One migration of the model VMM's guest: everything that happens is drawn from the seed, when it happens is not."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any
from unittest.mock import patch

from guarded import Guarded

from pageferry.errors import FerryError
from pageferry.vmm.memory import Backing
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import PagerOptions
from pageferryd.destination import imports
from pageferryd.destination.door import FaultDoor
from pageferryd.destination.exit_door import ExitDoor
from pageferryd.destination.fault_service import FaultServicer
from pageferryd.destination.installer import Installer
from pageferryd.destination.session import Session, SessionOptions
from pageferryd.destination.uffd_door import UffdDoor
from pageferryd.destination.uffd_installer import UffdInstaller

from .fault_client import SECRET, FaultClient
from .oracle import WORD, Violation
from .slow_source import SlowSource
from .vmm import ModelVmm

DEADLINE = 20.0

Trace = Callable[[str], None]


def silent(_line: str) -> None:
    pass


def stamp(page: int, kind: int) -> bytes:
    """Return what fills a page at the source: no two alike, none zero."""
    return (page + 1 << 8 | kind).to_bytes(WORD, "little") * (PAGE_SIZE // WORD)


def session_options(rng: random.Random) -> SessionOptions:
    window, credit = rng.choice([4, 16, 256]), rng.choice([1, 2, 8])
    pacing = PacingOptions(max_window=window * PAGE_SIZE, max_credit=credit * PAGE_SIZE)
    pager = PagerOptions(
        demand_window=rng.choice([1, 2, 16]),
        demand_batch=rng.choice([1, 4, 16]),
        push_requests=rng.choice([1, 2, 8]),
        silence=DEADLINE,
        fault_around=rng.choice([0, 4, 64]),
        pacing=pacing,
    )
    return SessionOptions(pager, backoff_initial=0.0002, backoff_max=0.002)


class Memory(Guarded):
    """Memory that a userfaultfd guards."""

    def let_go(self) -> None:
        """Let go of who waits in a fault."""
        self.uffd.close()


class World:
    """The guest at its destination, its source, and whoever disturbs them."""

    def __init__(self, seed: int, trace: Trace = silent) -> None:
        self.rng = rng = random.Random(seed)
        self.trace = trace
        self.guarded = self.make_memory([rng.randint(8, 32) for _ in range(rng.randint(1, 2))])
        layout = self.guarded.layout
        zero_share, private_share = rng.choice([0.0, 0.3, 0.8]), rng.choice([0.0, 0.3, 0.7, 1.0])
        self.zeroes = {page for page in range(layout.page_count) if rng.random() < zero_share}
        self.private = {page for page in range(layout.page_count) if rng.random() < private_share}
        self.source = SlowSource(layout, self._fill, self.private, rng, rng.choice([1, 8, 60]))
        door = ExitDoor(layout)
        self.installer = self.make_installer()
        doors = self.make_doors(door)
        self.session = Session(layout, doors, self.installer, self.source, session_options(rng))
        servicer = FaultServicer(SECRET)
        servicer.connect(door, self.session)
        self.vmm = self.kind_of_vmm(self.guarded, self.content, self.private, rng, trace, rng.random() < 0.5)
        self.vmm.client = FaultClient(servicer, layout, self.vmm.take)
        self.unreported = rng.choice([1, 4, imports.MAX_UNREPORTED_PAGES])
        self._words = itertools.count(1)
        self._left = 0
        self._push_at = 0
        self._pushing = False

    kind_of_vmm = ModelVmm

    def make_memory(self, sizes: list[int]) -> Any:
        return Memory(*sizes, backing=self.rng.choice([Backing.ANONYMOUS, Backing.SHMEM]))

    def make_installer(self) -> Installer:
        return UffdInstaller(self.guarded.uffd, self.guarded.addresses)

    def make_doors(self, door: ExitDoor) -> list[FaultDoor]:
        return [UffdDoor(self.guarded.uffd, self.guarded.addresses), door]

    def _fill(self, page: int) -> bytes | None:
        return None if page in self.zeroes else stamp(page, page in self.private)

    def content(self, page: int) -> bytes:
        """What a page holds for those who may read it."""
        return self._fill(page) or bytes(PAGE_SIZE)

    # What happens

    def _actors(self) -> list[Coroutine[Any, Any, None]]:
        rng = self.rng
        plans = [(self._vcpu, rng.randint(5, 20)) for _ in range(rng.randint(1, 4))]
        plans += [(self._device, rng.randint(2, 10)) for _ in range(rng.randint(0, 2))]
        plans += [(self._converter, rng.randint(1, 5)) for _ in range(rng.randint(0, 2))]
        plans += [(self._balloon, rng.randint(1, 4)) for _ in range(rng.randint(0, 1))]
        plans += [(self._cutter, rng.randint(1, 3)) for _ in range(rng.randint(0, 1))]
        plans += [(self._reconnecter, rng.randint(1, 4)) for _ in range(rng.randint(0, 1))]
        self._left = sum(count for _, count in plans)
        self._push_at = int(self._left * rng.random())
        return [self._act(step, count) for step, count in plans]

    async def _act(self, step: Callable[[], Coroutine[Any, Any, None]], count: int) -> None:
        for _ in range(count):
            for _ in range(self.rng.choice([0, 0, 1, 5, 20])):
                await asyncio.sleep(0)
            await step()
            self._left -= 1
            if self._left <= self._push_at:
                self._start_push()

    def _start_push(self) -> None:
        if not self._pushing:
            self._pushing = True
            self.trace("push begins")
            self.session.start_push()

    def _page(self) -> int:
        # Few pages are wanted by many.
        count = self.guarded.layout.page_count
        return self.rng.randrange(min(6, count)) if self.rng.random() < 0.4 else self.rng.randrange(count)

    def _word(self) -> bytes | None:
        return (next(self._words) << 16 | 0xBEEF).to_bytes(WORD, "little") if self.rng.random() < 0.4 else None

    async def _vcpu(self) -> None:
        await self.vmm.access(self._page(), self._word())

    async def _device(self) -> None:
        await self.vmm.device_access(self._page(), self._word())

    def _run(self, *, of_one_kind: bool) -> tuple[int, int] | None:
        """Choose pages that nobody converts or discards."""
        first, vmm = self._page(), self.vmm
        stop = min(first + self.rng.randint(1, 4), self.guarded.layout.end_of_region(first))
        pages = 0
        while first + pages < stop and first + pages not in vmm.busy:
            if of_one_kind and vmm.is_private[first + pages] != vmm.is_private[first]:
                break
            pages += 1
        return (first, pages) if pages else None

    async def _converter(self) -> None:
        run = self._run(of_one_kind=True)
        if run is not None:
            await self.vmm.convert(*run)

    async def _balloon(self) -> None:
        run = self._run(of_one_kind=False)
        if run is not None:
            await self.vmm.discard(*run)

    async def _cutter(self) -> None:
        self.trace("lanes are cut")
        self.source.cut()

    async def _reconnecter(self) -> None:
        self.trace("the VMM opens its stream again")
        await self.vmm.client.reconnect(in_order=self.rng.random() < 0.5)

    # From beginning to end

    async def run(self, deadline: float = DEADLINE) -> Counter[str]:
        """Return counts of what happened. Raises Violation."""
        try:
            with patch.object(imports, "MAX_UNREPORTED_PAGES", self.unreported):
                async with asyncio.timeout(deadline):
                    await self._live()
        except TimeoutError:
            raise Violation(f"somebody waits for ever: {self._waiting()}") from None
        finally:
            await self._close()
        self.vmm.check_all()
        return self._counts()

    async def _live(self) -> None:
        self.session.open_doors()
        self.vmm.client.connect()
        actors = [asyncio.create_task(actor) for actor in self._actors()]
        arriving = asyncio.create_task(self._arrive())
        tasks = {*actors, arriving}
        try:
            while tasks:
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                errors = [error for task in done if (error := task.exception()) is not None]
                if errors:
                    raise errors[0]
                if not tasks - {arriving}:
                    self._start_push()
            await self.vmm.reported()
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                # Who waits in a fault is let go with its userfaultfd.
                await self.session.close()
                self.guarded.let_go()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _arrive(self) -> None:
        running = asyncio.create_task(self.session.run())
        try:
            while not running.done():
                await asyncio.wait([running], timeout=0.05)
                failure = self.vmm.client.failure()
                if failure is not None:
                    raise failure
            running.result()
        except FerryError as error:
            raise Violation(f"the session failed: {error}") from error
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        if self.session.pager.map.missing:
            raise Violation(f"the session ended with {self.session.pager.map.missing} pages missing")
        self.trace("the migration is over")
        await self.vmm.client.stop()
        await self.session.close()
        self.installer.release()
        self.vmm.released = True

    async def _close(self) -> None:
        if not self.vmm.client.over:
            # The failure that led here is reported; others are its echo.
            await asyncio.gather(self.vmm.client.stop(), return_exceptions=True)
            await self.session.close()
            self.guarded.let_go()
        self.source.close()

    def close(self) -> None:
        self.guarded.close()

    def _waiting(self) -> str:
        pager = self.session.pager
        missing = list(pager.map.missing_runs(0, self.guarded.layout.page_count))
        return f"missing {missing}, {pager.faults_waiting} faults wait, busy {sorted(self.vmm.busy)}"

    def _counts(self) -> Counter[str]:
        placer = self.session.placer
        return Counter(
            self.vmm.counts,
            pages=self.guarded.layout.page_count,
            reconnects=self.session.reconnects,
            shared_accesses=placer.shared_accesses,
            streams=self.vmm.client.streams,
            **{f"{lane}_pages": count for (lane, _), count in placer.pages.items()},
        )


def run(seed: int, trace: Trace = silent, *, deadline: float = DEADLINE, kind: type[World] = World) -> Counter[str]:
    """Run one seed; return counts of what happened."""

    async def live() -> Counter[str]:
        world = kind(seed, trace)
        try:
            return await world.run(deadline)
        finally:
            world.close()

    return asyncio.run(live())
