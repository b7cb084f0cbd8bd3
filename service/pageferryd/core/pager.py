"""The pager: faults, arrivals and the time go in; requests, runs to install and timers come out.

A migration's destination drives one pager. It decides, and does nothing itself: the session that owns it reads the
doors, speaks on the lanes and installs. Times are seconds of any one monotonic clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from pageferryd.core.demand import DemandQueue, FaultTimes
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.pacing import FAULTS_COME_SECONDS, Pacer, PacingOptions
from pageferryd.core.page_map import PageMap, PageState
from pageferryd.core.prefetch import FaultAround
from pageferryd.core.push_order import PushOrder, PushRequest
from pageferryd.core.push_window import PushWindow
from pageferryd.core.runs import PRIVATE_ZERO, ZERO, Run, raw_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pageferryd.core.layout import Layout
    from pageferryd.core.push_share import ShareMember

MAX_PAGES_A_FETCH = 64


class Answer(Enum):
    """What a fault asks of the session at once."""

    FETCH = "fetch"
    """The page will be requested: see `next_fetch`."""
    JOINED = "joined"
    """The page is waited for already."""
    ZERO = "zero"
    """The guest discarded the page: install zeroes now."""
    WAKE = "wake"
    """The page is present: wake the waiter."""
    POISON = "poison"
    """The source could not read the page: install a memory error."""


class Lane(Enum):
    """The two streams between the sidecars."""

    DEMAND = "demand"
    PUSH = "push"


@dataclass(slots=True)
class PagerOptions:
    """Bounds of the pager."""

    demand_window: int = 16
    """Most demand requests under way."""
    demand_batch: int = 16
    """Most faulted pages in one request."""
    push_requests: int = 8
    """Most push requests under way."""
    silence: float = 10.0
    """Longest wait for an answer on either lane, in seconds."""
    fault_around: int = 64
    """Most pages fetched around a touched one; 0 turns it off."""
    pacing: PacingOptions = field(default_factory=PacingOptions)


@dataclass(slots=True)
class PagerCounts:
    """What happened so far; pages, bytes and faults."""

    faults: int = 0
    demand_pages: int = 0
    push_pages: int = 0
    zero_pages: int = 0
    duplicate_pages: int = 0
    demand_bytes: int = 0
    push_bytes: int = 0


class Pager:
    """Decides which page is next for one guest; `share` is its part of what the host's guests push together."""

    def __init__(self, layout: Layout, options: PagerOptions, now: float, share: ShareMember | None = None) -> None:
        self.layout = layout
        self.options = options
        self.map = PageMap(layout.page_count)
        self.counts = PagerCounts()
        self.pacer = Pacer(options.pacing, now)
        self.share = share
        self.around = FaultAround(max_window=min(options.fault_around, MAX_PAGES_A_FETCH))
        self._demand = DemandQueue(options.demand_window, options.demand_batch)
        self._order = PushOrder(layout, self.map.settled)
        self._push = PushWindow()
        self._faulted_at = float("-inf")
        # A piece that is dropped here only loses a prefetch.
        self._prefetch: deque[tuple[int, int]] = deque(maxlen=64)
        # The rest of pages that can only be installed whole; bounded by the faults that wait.
        self._granules: deque[tuple[int, int]] = deque()

    @property
    def complete(self) -> bool:
        """Whether every page is settled and no fault waits."""
        return self.map.missing == 0 and self._demand.waiting == 0

    @property
    def faults_waiting(self) -> int:
        """How many pages the guest waits for."""
        return self._demand.waiting

    def faults_come(self, now: float) -> bool:
        """Say whether the guest has touched a missing page lately: push is to leave room for the next."""
        return now - self._faulted_at < FAULTS_COME_SECONDS

    def waits_for(self, page: int) -> bool:
        """Say whether the guest waits for the page."""
        return self._demand.waits_for(page)

    @property
    def demand_due(self) -> bool:
        """Whether `next_fetch` may have a request."""
        return (self._demand.unsent or bool(self._granules or self._prefetch)) and self._demand.has_room

    @property
    def demand_under_way(self) -> int:
        """How many requests on the demand lane are unanswered."""
        return self._demand.under_way

    @property
    def push_under_way(self) -> int:
        """Bytes granted on the push lane and not used up yet."""
        return self._push.under_way

    def state(self, page: int) -> PageState:
        """Return where the page stands."""
        state = self.map.state(page)
        if state is PageState.MISSING and (self._demand.is_under_way(page) or self._order.is_under_way(page)):
            return PageState.REQUESTED
        return state

    # What goes in

    def found(self, first: int, pages: int) -> None:
        """Pages are in place without having come through this pager."""
        self.layout.check(first, pages)
        self.map.settle(first, pages)
        self._order.settled(first, pages)

    def fault(self, page: int, now: float, raised: float | None = None) -> Answer:
        """The guest touched a page; `raised` is when its door saw it. Raises PageRangeError outside the layout."""
        self.layout.check(page, 1)
        self.counts.faults += 1
        self._faulted_at = now
        if page in self.map.settled:
            return self._settled_answer(page)
        if self._demand.is_early(page):
            self.around.touched_early(page)
        if not self._demand.add(page, now if raised is None else raised, now):
            return Answer.JOINED
        if self.pacer.fault_raised(now) and self.share is not None:
            self.share.give_way()
        self._look_around(page)
        return Answer.FETCH

    def _settled_answer(self, page: int) -> Answer:
        if page in self.map.discarded:
            return Answer.ZERO
        return Answer.POISON if page in self.map.poisoned else Answer.WAKE

    def _look_around(self, page: int) -> None:
        if self._ask_for_granule(page):
            return
        window = 0
        if self.options.fault_around:
            window = self.around.touched(page, self.layout.end_of_region(page) - page - 1)
            if window:
                self._prefetch.append((page + 1, window))
        self._order.follow(page + 1 + window)

    def discard(self, first: int, pages: int, now: float) -> list[FaultTimes]:
        """The guest gave pages away: they are zero from now on. Returns the faults that waited for them.

        Those faults need zeroes installed: the caller serves each as if `fault` had answered ZERO.
        """
        self.layout.check(first, pages)
        self.map.discard(first, pages)
        return self._ended(first, pages, now)

    def demand_arrived(self, runs: list[Run], now: float) -> list[Run]:
        """An answer came on the demand lane; return it, or raise UnrequestedPagesError."""
        self._demand.answered(runs, now)
        self.counts.demand_bytes += raw_pages(runs) * PAGE_SIZE
        return runs

    def push_arrived(self, runs: list[Run], now: float, *, last: bool) -> list[Run]:
        """Pages came on the push lane; return them, or raise UnrequestedPagesError."""
        used, answered = self._push.arrived(runs, now, last=last)
        self.counts.push_bytes += used
        self.pacer.arrived(used, self._demand.waiting)
        if answered is not None:
            self._order.answered(*answered)
            self.pacer.unspent(answered.request.credit - answered.used)
        if self.share is not None:
            self.share.arrived(used, now)
            if answered is not None:
                self.share.unspent(answered.request.credit - answered.used)
        return runs

    def wanted(self, run: Run) -> list[tuple[int, int]]:
        """Return what of an arrived run is still to be installed, as (first, pages); the rest came twice.

        Where pages are backed by different sizes, each piece lies in one region.
        """
        if run.pages == 1:
            return [] if run.first in self.map.settled else [(run.first, 1)]
        missing = self.map.missing_runs(run.first, run.pages)
        if self.layout.uniform:
            return list(missing)
        starts = self.layout.starts
        return [(starts[at] + first, pages) for piece in missing for at, first, pages in self.layout.pieces(*piece)]

    def duplicate(self, pages: int) -> None:
        """Pages that had arrived before, or were discarded meanwhile, were dropped."""
        self.counts.duplicate_pages += pages

    def installed(self, run: Run, lane: Lane, now: float) -> list[FaultTimes]:
        """A run of missing pages is in place; return the faults that this answered."""
        new = self.map.settle(run.first, run.pages)
        if lane is Lane.DEMAND:
            self.counts.demand_pages += new
        else:
            self.counts.push_pages += new
        if run.kind in (ZERO, PRIVATE_ZERO):
            self.counts.zero_pages += new
        return self._ended(run.first, run.pages, now)

    def not_installed(self, first: int, pages: int) -> None:
        """A run that had arrived could not be put in place: its pages are asked for again, the waiting ones first."""
        self._order.settled(first, pages)
        self._demand.again(first, pages)
        if not self.layout.uniform:
            # The rest of a granule waits for it.
            self._granules.append((first, pages))

    def poisoned(self, run: Run, now: float) -> list[FaultTimes]:
        """A run of missing pages was poisoned; return the faults that this answered."""
        self.map.poison(run.first, run.pages)
        return self._ended(run.first, run.pages, now)

    def _ended(self, first: int, pages: int, now: float) -> list[FaultTimes]:
        self._order.settled(first, pages)
        ended = self._demand.settled(first, pages, now)
        for times in ended:
            if self.pacer.fault_ended(times.total) and self.share is not None:
                self.share.give_way()
        return ended

    def lane_lost(self, lane: Lane) -> None:
        """A lane is gone: what it had under way is missing again."""
        if lane is Lane.DEMAND:
            self._demand.lost()
            self._prefetch.clear()
            self._granules.clear()
            for page in self._demand.pages_waiting():
                self._ask_for_granule(page)
        else:
            self._push.lost()
            self._order.lost()
            self._rest()

    def _ask_for_granule(self, page: int) -> bool:
        """Queue all of a page that is installed whole; return False for one that is not."""
        first, granule = self.layout.granule(page)
        if granule == 1:
            return False
        # All of it is wanted now; the touched page goes first, with the next request.
        self._granules.extend(_cut(first, first + granule, page))
        self._order.follow(first + granule)
        return True

    # What comes out

    def next_fetch(self, now: float) -> tuple[tuple[int, int], ...] | None:
        """Return the runs of the next demand request, or None when there is none or the window is full."""
        if not self._demand.has_room:
            return None
        pages = self._demand.take(now)
        if pages:
            runs = tuple((page, 1) for page in pages)
            self._demand.sent(runs, now, urgent=True)
            return runs
        if not self._demand.has_room_for_more:
            return None
        return self._next_piece(self._granules, now) or self._next_piece(self._prefetch, now)

    def _next_piece(self, queue: deque[tuple[int, int]], now: float) -> tuple[tuple[int, int], ...] | None:
        """Request the first queued piece of which anything is still to be asked for."""
        while queue:
            first, pages = queue.popleft()
            runs = tuple(self._unasked(first, pages, in_push=queue is self._granules))
            if runs:
                self._demand.sent(runs, now, urgent=queue is self._granules)
                if queue is self._prefetch:
                    self.around.issued(first + pages, sum(pages for _, pages in runs))
                return runs
        return None

    def _unasked(self, first: int, pages: int, *, in_push: bool) -> Iterator[tuple[int, int]]:
        """Yield the missing runs that are not under way on the demand lane, nor on push unless `in_push`."""
        for start, length in self.map.missing_runs(first, pages):
            runs = [(start, length)] if in_push else self._order.free(start, length)
            for run in runs:
                yield from self._demand.free(*run)

    def next_push(self, now: float) -> PushRequest | None:
        """Return the next push request, or None when all is under way, the window is full, or push is held back."""
        if len(self._push) >= self.options.push_requests:
            return None
        credit = self._credit(now)
        if not credit:
            return None
        request = self._order.next(credit, now)
        if request is None:
            self._rest()
            return None
        self.pacer.granted(request.credit)
        if self.share is not None:
            self.share.granted(request.credit)
        self._push.sent(request, now)
        return request

    def _credit(self, now: float) -> int:
        """Return the bytes that the next push request may grant, by this guest's limits and by the host's."""
        under_way = self._push.under_way
        credit = self.pacer.credit(under_way, self._demand.waiting, now)
        if self.share is None:
            return credit
        if credit:
            return self.share.ask(credit, under_way, self.pacer.options.max_window, now)
        if self.pacer.gives_none:
            self._rest()
        return 0

    def _rest(self) -> None:
        """Nothing is to be asked for on the push lane now: no other guest is held back for this one."""
        if self.share is not None:
            self.share.rest()

    def set_pacing(self, pacing: PacingOptions, now: float) -> None:
        """Put new limits into force."""
        self.pacer.set_options(pacing, now)
        if self.share is not None:
            self.share.set_weight(pacing.weight)

    def push_wake_at(self, now: float) -> float | None:
        """Return when push may go on although nothing happened, or None."""
        held_until = self.pacer.wake_at(self._demand.waiting, now)
        if held_until is not None or self.share is None:
            return held_until
        return self.share.wake_at(now)

    def next_timer(self, now: float) -> float | None:
        """Return when to ask again although nothing happened, or None."""
        times = [time for time in (self._silent_at(Lane.DEMAND), self._silent_at(Lane.PUSH)) if time is not None]
        held_until = self.push_wake_at(now)
        if held_until is not None:
            times.append(held_until)
        return min(times) if times else None

    def silent_lane(self, now: float) -> Lane | None:
        """Return a lane that owes an answer for too long, or None."""
        for lane in Lane:
            due = self._silent_at(lane)
            if due is not None and now >= due:
                return lane
        return None

    def _silent_at(self, lane: Lane) -> float | None:
        since = self._demand.owed_since if lane is Lane.DEMAND else self._push.owed_since
        return None if since is None else since + self.options.silence


def _cut(first: int, stop: int, page: int) -> list[tuple[int, int]]:
    """Cut [first, stop) into pieces of at most MAX_PAGES_A_FETCH, the one with the page first."""
    pieces = [(at, min(MAX_PAGES_A_FETCH, stop - at)) for at in range(first, stop, MAX_PAGES_A_FETCH)]
    pieces.sort(key=lambda piece: not piece[0] <= page < piece[0] + piece[1])
    return pieces
