"""Thousands of migrations under a fake clock. A failing seed replays with `python -m tests.core.simulation SEED`."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from pageferryd.core.errors import CoreError
from pageferryd.core.pager import Answer, Lane, Pager
from pageferryd.core.runs import Run

from .clock import Violation
from .journal import Journal
from .kernel import Placed
from .shell import Piece, Shell
from .world import Result, World, run

SEEDS = 10_000
BLOCK = 500
LARGE_SEEDS = 60


def run_seeds(seeds: range, *, large: bool = False) -> list[Result]:
    results = []
    for seed in seeds:
        try:
            results.append(run(seed, large=large))
        except Exception as error:
            size = " --large" if large else ""
            pytest.fail(f"python -m tests.core.simulation {seed}{size}: {type(error).__name__}: {error}")
    return results


def run_some(**broken: type[Shell | Pager]) -> None:
    for seed in range(1000):
        World(seed, **broken).run()


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_every_migration_ends_with_each_page_right(first: int) -> None:
    results = run_seeds(range(first, first + BLOCK))
    # A block in which nothing ever went wrong would prove little.
    assert sum(result.reconnects for result in results) > BLOCK // 10
    assert sum(result.killed for result in results) > BLOCK // 4
    assert sum(result.sources_killed for result in results) > BLOCK // 4
    assert sum(result.discarded for result in results) > BLOCK
    assert sum(result.poisoned for result in results) > 0
    assert sum(result.duplicates for result in results) > BLOCK // 10
    assert sum(result.demand_pages for result in results) > BLOCK
    assert sum(result.push_pages for result in results) > BLOCK
    assert sum(result.prefetch_used for result in results) > 0


def test_large_migrations_end_with_each_page_right() -> None:
    run_seeds(range(LARGE_SEEDS), large=True)


def test_a_seed_gives_the_same_migration_each_time() -> None:
    traces: list[list[str]] = [[], []]
    results = [run(7, trace=trace.append) for trace in traces]
    assert results[0] == results[1]
    assert traces[0] == traces[1]


# A simulation that finds nothing may be blind: each of these breaks one rule on purpose.


class InstallsWhatever(Shell):
    """Does not ask what of an answer is still wanted."""

    def wanted(self, run: Run) -> list[tuple[int, int]]:
        return [(run.first, run.pages)]


class IgnoresDiscards(Shell):
    """Does not tell the pager what the guest gave away."""

    def discard(self, first: int, pages: int) -> None:
        self.staging.drop(first, pages)


class AnswersDiscardedWithWake(Shell):
    """Wakes the faults on discarded pages, and leaves them missing."""

    def serve_zero(self, page: int) -> None:
        self.kernel.wake(page, 1)


class CompletesEarly(Shell):
    """Lets the source go while a few pages are missing."""

    def is_complete(self) -> bool:
        return self.pager.map.missing <= 3


class ForgetsTheBacklog(Shell):
    """Drops what the kernel could not take."""

    def defer(self, piece: Piece) -> None:
        pass


class ForgetsTheLostLane(Shell):
    """Goes on after a cut as if the demand lane's requests were still under way."""

    def lose_lanes(self) -> None:
        self.watch.lost()
        self.pager.lane_lost(Lane.PUSH)


class TakesRefusalForSuccess(Shell):
    """Counts as installed what the kernel refused."""

    def put(self, piece: Piece) -> None:
        done, how = self.kernel.install(piece.run.first, piece.contents, whole=False)
        if done < piece.run.pages and how is Placed.EXISTS:
            self.kernel.wake(piece.run.first + done, 1)
        self.settle(piece.run, piece.lane)


class NotesDiscardsLater(Shell):
    """Gives its notes of what the guest gave away a little time."""

    def discard(self, first: int, pages: int) -> None:
        self.clock.after(0.001, self._note, first, pages)
        self.drop(first, pages)

    def _note(self, first: int, pages: int) -> None:
        if not self.done:
            self.journal.note(first, pages)


class ForgetsItsDiscards(Shell):
    """Starts again without what an earlier sidecar had noted as given away."""

    def restore_discards(self) -> None:
        pass


class ForgetsThatAllWasHere(Shell):
    """Starts again without knowing that the source may have let go."""

    def note_whole(self) -> None:
        pass


class LooksAway(Shell):
    """Starts again as if nothing had arrived."""

    def look_what_is_there(self) -> None:
        pass


class WakesNobody(Shell):
    """Starts again, and leaves those asleep whose faults an earlier sidecar had read."""

    def wake_all(self) -> None:
        pass


class AppendsToTheTorn(Journal):
    """Reads past a torn record, and writes on behind it."""

    def open(self) -> list[tuple[int, int]]:
        whole = len(self.content) // 16 * 16
        return list(struct.iter_unpack("<QQ", self.content[:whole]))


class TrustsTheTorn(Journal):
    """Takes a torn record for one of what is left of it."""

    def open(self) -> list[tuple[int, int]]:
        self.content += bytes(-len(self.content) % 16)
        return [(first, max(pages, 1)) for first, pages in struct.iter_unpack("<QQ", self.content)]


class AsksTwice(Pager):
    """Does not look at what is under way."""

    def _unasked(self, first: int, pages: int, *, in_push: bool) -> Iterator[tuple[int, int]]:
        return self.map.missing_runs(first, pages)


class OverrunsTheWindow(Pager):
    """Forgets the window of the demand lane."""

    def next_fetch(self, now: float) -> tuple[tuple[int, int], ...] | None:
        self._demand.window = 1 << 20
        return super().next_fetch(now)


class LosesAFault(Pager):
    """Says of a fault that it joined another's wait, now and then, and forgets it."""

    def fault(self, page: int, now: float, raised: float | None = None) -> Answer:
        if self.counts.faults % 7 == 3:
            self.counts.faults += 1
            return Answer.JOINED
        return super().fault(page, now, raised)


class MixesUpPages(Pager):
    """Keeps no account of what was discarded."""

    def discard(self, first: int, pages: int, now: float) -> list:
        self.map.settled.add(first, pages)
        return self._ended(first, pages, now)


@pytest.mark.parametrize(
    "shell",
    [
        InstallsWhatever,
        IgnoresDiscards,
        AnswersDiscardedWithWake,
        CompletesEarly,
        ForgetsTheBacklog,
        ForgetsTheLostLane,
        TakesRefusalForSuccess,
        NotesDiscardsLater,
        ForgetsItsDiscards,
        ForgetsThatAllWasHere,
        LooksAway,
        WakesNobody,
    ],
)
def test_a_broken_shell_is_found(shell: type[Shell]) -> None:
    with pytest.raises((Violation, CoreError)):
        run_some(shell=shell)


@pytest.mark.parametrize("journal", [AppendsToTheTorn, TrustsTheTorn])
def test_a_broken_journal_is_found(journal: type[Journal]) -> None:
    with pytest.raises((Violation, CoreError)):
        run_some(journal=journal)


@pytest.mark.parametrize("pager", [AsksTwice, OverrunsTheWindow, LosesAFault, MixesUpPages])
def test_a_broken_pager_is_found(pager: type[Pager]) -> None:
    with pytest.raises((Violation, CoreError)):
        run_some(pager=pager)
