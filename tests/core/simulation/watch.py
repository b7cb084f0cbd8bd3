"""The watch: what the pager may ask for, and what it must account for."""

from __future__ import annotations

from collections import deque
from dataclasses import fields

from pageferryd.core.demand import FaultTimes
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.pager import MAX_PAGES_A_FETCH, Answer, Pager, PagerCounts
from pageferryd.core.push_order import PushRequest

from .clock import Violation
from .source import Message

Runs = tuple[tuple[int, int], ...]


class Watch:
    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        self._demand: deque[Runs] = deque()
        self._demand_pages: set[int] = set()
        self._push: deque[PushRequest] = deque()
        self._push_pages: set[int] = set()
        self._pushed = 0
        self.raw_pushed = 0
        self.faults_taken = 0
        self.faults_ended = 0

    def faulted(self, answer: Answer) -> None:
        if answer in (Answer.FETCH, Answer.JOINED):
            self.faults_taken += 1

    def ended(self, ended: list[FaultTimes]) -> None:
        for times in ended:
            self.faults_ended += times.faults
            stages = (times.read, times.queued, times.fetched, times.installed)
            if min(stages) < 0 or abs(sum(stages) - times.total) > 1e-6:
                raise Violation(f"a fault's stages do not add up: {times}")

    def asked(self, runs: Runs) -> None:
        self._check_missing(runs, self._demand_pages, "demand")
        self._demand.append(runs)
        options = self._pager.options
        pages = sum(count for _, count in runs)
        if len(self._demand) > options.demand_window or pages > max(options.demand_batch, MAX_PAGES_A_FETCH):
            raise Violation(f"{len(self._demand)} demand requests are under way, the last of {pages} pages")

    def answered(self, message: Message) -> None:
        for first, count in self._demand.popleft():
            self._demand_pages.difference_update(range(first, first + count))

    def asked_to_push(self, request: PushRequest) -> None:
        self._check_missing(request.runs, self._push_pages, "push")
        self._push.append(request)
        pacing = self._pager.pacer.options
        if pacing.disabled or request.credit > pacing.max_credit or len(self._push) > self._pager.options.push_requests:
            raise Violation(f"{len(self._push)} push requests are under way, the last for {request.credit} bytes")
        under_way = sum(each.credit for each in self._push) - self._pushed
        if under_way > pacing.max_window or under_way != self._pager.push_under_way:
            raise Violation(f"{under_way} bytes of push are under way, the pager says {self._pager.push_under_way}")

    def pushed(self, message: Message) -> None:
        raw = len(message.contents) * PAGE_SIZE
        self._pushed += raw
        self.raw_pushed += raw
        if message.last:
            for first, count in self._push.popleft().runs:
                self._push_pages.difference_update(range(first, first + count))
            self._pushed = 0

    def lost(self) -> None:
        self._demand.clear()
        self._demand_pages.clear()
        self._push.clear()
        self._push_pages.clear()
        self._pushed = 0

    def _check_missing(self, runs: Runs, under_way: set[int], lane: str) -> None:
        for first, count in runs:
            self._pager.layout.check(first, count)
            for page in range(first, first + count):
                if page in under_way:
                    raise Violation(f"page {page} was asked for on {lane} and is under way there")
                if page in self._pager.map.settled:
                    raise Violation(f"page {page} was asked for on {lane} and is settled")
                under_way.add(page)

    def check_end(self, *, rate_bound: float) -> None:
        """Hold the pager's accounts against what happened."""
        if self.faults_taken != self.faults_ended:
            raise Violation(f"{self.faults_taken} faults were taken and {self.faults_ended} answered")
        if self.raw_pushed > rate_bound:
            raise Violation(f"{self.raw_pushed} bytes were pushed; the rate allows {rate_bound}")
        counts, around = self._pager.counts, self._pager.around.counts
        if any(getattr(counts, field.name) < 0 for field in fields(PagerCounts)):
            raise Violation(f"a count is negative: {counts}")
        if counts.demand_pages + counts.push_pages > self._pager.layout.page_count:
            raise Violation(f"more pages were counted than there are: {counts}")
        if around.used > around.issued or around.late > around.issued:
            raise Violation(f"prefetch does not add up: {around}")
