"""The demand queue: which pages the guest waits for, and which of them are under way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pageferryd.core.errors import UnrequestedPagesError
from pageferryd.core.runs import Run

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(slots=True)
class Waiter:
    """A page that the guest waits for. Times are seconds of the caller's clock; 0.0 means not yet."""

    page: int
    raised: float
    """When its first fault was seen by the door."""
    queued: float
    """When that fault reached the pager."""
    sent: float = 0.0
    arrived: float = 0.0
    faults: int = 1


class FaultTimes(NamedTuple):
    """How long a fault spent in each stage, in seconds, and how many faults the page answered."""

    page: int
    read: float
    queued: float
    fetched: float
    installed: float
    total: float
    faults: int


class Fetch(NamedTuple):
    """One request on the demand lane: runs of (first, pages), and whether the guest waits for them."""

    runs: tuple[tuple[int, int], ...]
    urgent: bool
    sent: float


class DemandQueue:
    """Faulted pages, first come first served; several faults on one page are one request; a bounded window.

    `window` bounds the requests under way. Answers come in the order of the requests.
    """

    def __init__(self, window: int, batch: int) -> None:
        self.window = window
        self._batch = batch
        self._waiters: dict[int, Waiter] = {}
        self._unsent: deque[int] = deque()
        self._under_way: deque[Fetch] = deque()
        # Until they are installed; the value says whether the guest waited when they were asked for.
        self._pages_under_way: dict[int, bool] = {}
        self._heard = float("-inf")

    @property
    def waiting(self) -> int:
        """How many pages the guest waits for."""
        return len(self._waiters)

    @property
    def unsent(self) -> bool:
        """Whether a page is waited for that was not requested yet."""
        return bool(self._unsent)

    @property
    def under_way(self) -> int:
        """How many requests are unanswered."""
        return len(self._under_way)

    @property
    def owed_since(self) -> float | None:
        """Since when the lane owes an answer: the oldest request's time, or the last answer's where that is later."""
        return max(self._under_way[0].sent, self._heard) if self._under_way else None

    @property
    def has_room(self) -> bool:
        """Whether another request fits into the window."""
        return len(self._under_way) < self.window

    @property
    def has_room_for_more(self) -> bool:
        """Whether a request that no fault made fits; half the window is kept for those that faults make."""
        return len(self._under_way) < (self.window + 1) // 2

    def is_under_way(self, page: int) -> bool:
        """Say whether a demand request for the page is unanswered or not installed yet."""
        return page in self._pages_under_way

    def is_early(self, page: int) -> bool:
        """Say whether a request for the page is under way that nothing waited for until now."""
        return not self._pages_under_way.get(page, True) and page not in self._waiters

    def waits_for(self, page: int) -> bool:
        """Say whether the guest waits for the page."""
        return page in self._waiters

    def pages_waiting(self) -> list[int]:
        """Return the pages that the guest waits for."""
        return list(self._waiters)

    def free(self, first: int, pages: int) -> list[tuple[int, int]]:
        """Return the runs inside the run that are not under way yet, as (first, pages)."""
        runs: list[tuple[int, int]] = []
        for page in range(first, first + pages):
            if page in self._pages_under_way:
                continue
            if runs and sum(runs[-1]) == page:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((page, 1))
        return runs

    def add(self, page: int, raised: float, now: float) -> bool:
        """Add a fault; return False when the page was waited for already."""
        waiter = self._waiters.get(page)
        if waiter is not None:
            waiter.faults += 1
            return False
        waiter = self._waiters[page] = Waiter(page, raised, now)
        if page in self._pages_under_way:
            waiter.sent = now
            return True
        self._unsent.append(page)
        if len(self._unsent) > 2 * len(self._waiters) + 64:
            # Most have come by push while nothing could be asked for.
            self._unsent = deque(page for page in self._unsent if page in self._waiters)
        return True

    def take(self, now: float) -> list[int]:
        """Take the pages of the next request, at most a batch of them."""
        pages: list[int] = []
        unsent, waiters = self._unsent, self._waiters
        while unsent and len(pages) < self._batch:
            page = unsent.popleft()
            waiter = waiters.get(page)
            # A page that was settled and faulted on again is queued twice.
            if waiter is not None and not waiter.sent:
                waiter.sent = now
                pages.append(page)
        return pages

    def sent(self, runs: tuple[tuple[int, int], ...], now: float, *, urgent: bool) -> None:
        """Record a request as under way."""
        self._under_way.append(Fetch(runs, urgent, now))
        for first, pages in runs:
            for page in range(first, first + pages):
                self._pages_under_way[page] = urgent

    def answered(self, runs: list[Run], now: float) -> Fetch:
        """Match an answer with the oldest request; raise UnrequestedPagesError unless it covers exactly that."""
        if not self._under_way:
            raise UnrequestedPagesError("pages came on the demand lane that nobody asked for")
        fetch = self._under_way[0]
        self._match(fetch, runs)
        self._under_way.popleft()
        self._heard = now
        waiters = self._waiters
        if waiters:
            for first, pages, _ in runs:
                for page in range(first, first + pages):
                    waiter = waiters.get(page)
                    if waiter is not None and not waiter.arrived:
                        waiter.arrived = now
        return fetch

    @staticmethod
    def _match(fetch: Fetch, runs: list[Run]) -> None:
        rest = iter(runs)
        for first, pages in fetch.runs:
            while pages:
                run = next(rest, None)
                if run is None or run.first != first or run.pages > pages:
                    got = "nothing more" if run is None else f"pages {run.first} to {run.first + run.pages}"
                    raise UnrequestedPagesError(f"page {first} was asked for on the demand lane and {got} came")
                first += run.pages
                pages -= run.pages
        surplus = next(rest, None)
        if surplus is not None:
            raise UnrequestedPagesError(f"page {surplus.first} came on the demand lane and nobody asked for it")

    def settled(self, first: int, pages: int, now: float) -> list[FaultTimes]:
        """Forget pages that need no fetching any more; return the times of the faults that this ended."""
        waiters, under_way = self._waiters, self._pages_under_way
        known = len(waiters) + len(under_way)
        if not known:
            return []
        members: Iterable[int] = range(first, first + pages)
        if pages > known:
            members = [page for page in {*waiters, *under_way} if first <= page < first + pages]
        ended: list[FaultTimes] = []
        for page in members:
            under_way.pop(page, None)
            waiter = waiters.pop(page, None)
            if waiter is not None:
                ended.append(_times(waiter, now))
        return ended

    def again(self, first: int, pages: int) -> None:
        """Pages that had arrived are worthless: those that are waited for have to be requested once more."""
        for page in range(first, first + pages):
            self._pages_under_way.pop(page, None)
            waiter = self._waiters.get(page)
            if waiter is not None and page not in self._unsent:
                waiter.sent = waiter.arrived = 0.0
                self._unsent.append(page)

    def lost(self) -> None:
        """The lane is gone: every unanswered request has to be made again, the waiting pages first."""
        self._under_way.clear()
        self._pages_under_way.clear()
        self._unsent.clear()
        for waiter in self._waiters.values():
            waiter.sent = waiter.arrived = 0.0
            self._unsent.append(waiter.page)


def _times(waiter: Waiter, now: float) -> FaultTimes:
    # A page may come by the push lane before its request was sent or answered.
    sent = waiter.sent or now
    arrived = max(waiter.arrived or now, sent)
    return FaultTimes(
        waiter.page,
        waiter.queued - waiter.raised,
        sent - waiter.queued,
        arrived - sent,
        now - arrived,
        now - waiter.raised,
        waiter.faults,
    )
