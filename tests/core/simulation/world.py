"""One seed's world: a scenario drawn from the seed, run to its end, and held against the invariants."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from pageferryd.core.layout import PAGE_SIZE, Layout, Region
from pageferryd.core.pacing import PacingOptions
from pageferryd.core.pager import Lane, Pager, PagerOptions

from .clock import START, Clock, Violation
from .guest import Guest
from .journal import Journal
from .kernel import Kernel
from .shell import Shell
from .sidecars import Hands, Sidecars
from .source import Source
from .watch import Watch
from .wire import Wire

LONGEST = 900.0
GRANULE = 64 << 10


@dataclass(frozen=True, slots=True)
class Result:
    """What a seed's migration came to."""

    seconds: float
    pages: int
    reconnects: int
    killed: int
    sources_killed: int
    faults: int
    discarded: int
    poisoned: int
    duplicates: int
    demand_pages: int
    push_pages: int
    prefetch_used: int


class World:
    def __init__(
        self,
        seed: int,
        *,
        large: bool = False,
        shell: type[Shell] = Shell,
        pager: type[Pager] = Pager,
        journal: type[Journal] = Journal,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.rng = rng = random.Random(seed)
        self.clock = Clock(trace)
        self.layout = self._layout(large)
        self.source = Source(rng, self.layout, rng.choice((0.1, 0.6, 1.0)), rng.choice((0, 0, 0.02)))
        refusal = rng.choice((0, 0, 0.1, 0.3))
        self.kernel = Kernel(rng, self.clock, self.source, refusal)
        slow = rng.choice((0.0002, 0.001, 0.02))
        self.wire = Wire(rng, self.clock, self.source, {Lane.DEMAND: slow, Lane.PUSH: slow * rng.choice((1, 1, 10))})
        self.pacing = self._pacing()
        self.options = self._options()
        self._kinds = pager, shell
        self.pagers: list[Pager] = []
        self.sources_killed = 0
        self.kills = kills = rng.choice((0, 0, 0, 1, 1, 2, 5))
        self.sidecars = Sidecars(rng, self.clock, self.kernel, self.wire, journal(), self._sidecar, kills)
        steps = rng.choice((5, 30, 80)) * (10 if large else 1)
        self.guest = Guest(
            rng, self.clock, self.kernel, self.layout, rng.choice((1, 2, 4)), steps, rng.choice((0, 0.05, 0.2))
        )
        self._plan_trouble()
        self._plan_limits()

    def _sidecar(self, hands: Hands) -> Shell:
        """Make one life of the destination's sidecar."""
        make_pager, make_shell = self._kinds
        pager = make_pager(self.layout, self.options, self.clock.now)
        self.pagers.append(pager)
        self.watch = Watch(pager)
        shell = make_shell(self.rng, self.clock, pager, hands, self.wire, self.watch)
        self.kernel.readable = shell.readable
        return shell

    @property
    def pager(self) -> Pager:
        return self.pagers[-1]

    def _layout(self, large: bool) -> Layout:
        rng = self.rng
        regions, address = [], 0
        for _ in range(rng.choice((1, 1, 2, 3))):
            huge = rng.random() < 0.2
            pages = rng.randint(1, 3) * 16 if huge else rng.choice((1, 7, 30, 60))
            if large:
                pages *= 32
            address += rng.choice((0, 1, 5)) * GRANULE
            regions.append(Region(address, pages * PAGE_SIZE, GRANULE if huge else PAGE_SIZE))
            address += -(-pages * PAGE_SIZE // GRANULE) * GRANULE
        return Layout(regions)

    def _pacing(self) -> PacingOptions:
        rng = self.rng
        return PacingOptions(
            max_window=rng.choice((4096, 64 << 10, 256 << 10, 1 << 20)),
            max_credit=rng.choice((4096, 20 << 10, 64 << 10, 256 << 10)),
            max_hold=rng.choice((0, 0.001, 0.01)),
            bytes_per_second=rng.choice((0, 0, 0, 200_000, 5_000_000)),
            disabled=rng.random() < 0.1,
        )

    def _options(self) -> PagerOptions:
        rng = self.rng
        return PagerOptions(
            demand_window=rng.choice((1, 2, 16)),
            demand_batch=rng.choice((1, 4, 16)),
            push_requests=rng.choice((1, 2, 8)),
            silence=0.5,
            fault_around=rng.choice((0, 2, 64)),
            pacing=self.pacing,
        )

    def _plan_trouble(self) -> None:
        rng = self.rng
        for _ in range(rng.choice((0, 0, 1, 3))):
            self.clock.after(rng.random() * 0.1, self.wire.cut)
        if rng.random() < 0.1:
            self.clock.after(rng.random() * 0.05, self.wire.silence, rng.choice(list(Lane)))
        if rng.random() < 0.1:
            start = rng.random() * 0.1
            self.clock.after(start, self._reach, False)
            self.clock.after(start + 1.0, self._reach, True)
        for _ in range(rng.choice((0, 0, 0, 0, 1, 3))):
            self.clock.after(rng.random() * 0.1, self._kill_source)
        self.wire.source_dies = self._dies_at_complete

    def _reach(self, reachable: bool) -> None:
        self.wire.obstacles += -1 if reachable else 1
        if not reachable:
            self.wire.cut()

    def _kill_source(self) -> None:
        """It serves again later, with its memory and its notes: all else is gone."""
        self.clock.note("the source's sidecar is killed")
        self.sources_killed += 1
        self._reach(False)
        self.clock.after(self.rng.random(), self._reach, True)
        if self.rng.random() < 0.2:
            self.sidecars.kill()

    def _dies_at_complete(self) -> bool:
        """The source has let go of the memory: nothing may be missing, and it may be killed before it says so."""
        self.kernel.check_all_was_here()
        dies = self.rng.random() < 0.1
        if dies:
            self._kill_source()
        return dies

    def _plan_limits(self) -> None:
        """Push that is off is put on; and in some seeds the window changes on the way."""
        rng = self.rng
        if self.pacing.disabled:
            self.clock.after(rng.random(), self._limit, self.pacing.max_window)
        elif rng.random() < 0.1:
            self.clock.after(rng.random() * 0.05, self._limit, rng.choice((64 << 10, 1 << 20)))

    def _limit(self, window: int) -> None:
        self.clock.note(f"push window {window}")
        pacing = PacingOptions(
            max_window=max(window, self.pager.push_under_way),
            max_credit=self.pacing.max_credit,
            bytes_per_second=self.pacing.bytes_per_second,
        )
        self.options = replace(self.options, pacing=pacing)
        self.pager.pacer.set_options(pacing, self.clock.now)
        if self.sidecars.up:
            self.sidecars.shell.pump()

    def run(self) -> Result:
        events = 2000 + 300 * self.layout.page_count + 200 * sum(thread.left for thread in self.guest.threads)
        events *= 1 + self.kills
        self.clock.run(lambda: self.sidecars.done and self.guest.done, LONGEST, events)
        self._check_end()
        page_map = self.pager.map

        def total(name: str) -> int:
            return sum(getattr(pager.counts, name) for pager in self.pagers)

        return Result(
            seconds=self.clock.now - START,
            pages=self.layout.page_count,
            reconnects=self.sidecars.reconnects + self.sidecars.shell.reconnects,
            killed=self.sidecars.killed,
            sources_killed=self.sources_killed,
            faults=total("faults"),
            discarded=page_map.discarded.count,
            poisoned=page_map.poisoned.count,
            duplicates=total("duplicate_pages"),
            demand_pages=total("demand_pages"),
            push_pages=total("push_pages"),
            prefetch_used=sum(pager.around.counts.used for pager in self.pagers),
        )

    def _check_end(self) -> None:
        if self.kernel.asleep:
            raise Violation(f"{self.kernel.asleep} threads of the guest were never woken")
        if not self.source.released or not self.pager.complete:
            raise Violation("the migration is over and the source holds the guest's memory")
        rate = self.pacing.bytes_per_second
        # A change of limits begins a new account, so two bursts may come.
        burst = rate / 10 + self.pacing.max_credit
        elapsed = self.clock.now - START
        self.watch.check_end(rate_bound=elapsed * rate + 2 * burst if rate else float("inf"))


def run(seed: int, **choices: object) -> Result:
    """Run one seed; raises Violation, or whatever the pager raises."""
    return World(seed, **choices).run()  # type: ignore[arg-type]
