"""Thousands of migrations under a fake clock. A failing seed replays with `python -m tests.core.simulation SEED`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pageferryd.core.errors import CoreError
from pageferryd.core.pager import Answer, Lane, Pager
from pageferryd.core.runs import Run

from .clock import Violation
from .kernel import Placed
from .shell import Piece, Shell
from .world import Result, World, run

SEEDS = 4000
BLOCK = 250
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
    for seed in range(100):
        World(seed, **broken).run()


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_every_migration_ends_with_each_page_right(first: int) -> None:
    results = run_seeds(range(first, first + BLOCK))
    # A block in which nothing ever went wrong would prove little.
    assert sum(result.reconnects for result in results) > BLOCK // 10
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
    ],
)
def test_a_broken_shell_is_found(shell: type[Shell]) -> None:
    with pytest.raises((Violation, CoreError)):
        run_some(shell=shell)


@pytest.mark.parametrize("pager", [AsksTwice, OverrunsTheWindow, LosesAFault, MixesUpPages])
def test_a_broken_pager_is_found(pager: type[Pager]) -> None:
    with pytest.raises((Violation, CoreError)):
        run_some(pager=pager)
