"""The push window: which push requests are under way, and whether what comes answers them in order."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from pageferryd.core.errors import UnrequestedPagesError
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.runs import raw_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pageferryd.core.push_order import PushRequest
    from pageferryd.core.runs import Run


class Answered(NamedTuple):
    """A request that was answered for good: its raw bytes, and the runs of it that no response carried."""

    request: PushRequest
    used: int
    rest: list[tuple[int, int]]


class PushWindow:
    """The push requests under way, oldest first; the source answers them in order."""

    def __init__(self) -> None:
        self._requests: deque[PushRequest] = deque()
        # Of the oldest request: the bytes that came, what is left of the run they are in, and the runs behind it.
        self._used = 0
        self._run_left = (0, 0)
        self._expected: Iterator[tuple[int, int]] = iter(())
        self._heard = 0.0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def under_way(self) -> int:
        """Bytes granted and not used up yet."""
        return sum([request.credit for request in self._requests]) - self._used

    @property
    def owed_since(self) -> float | None:
        """Since when the lane owes an answer, or None."""
        return self._heard if self._requests else None

    def sent(self, request: PushRequest, now: float) -> None:
        """Record a request as under way."""
        self._requests.append(request)
        if len(self._requests) == 1:
            self._heard = now
            self._begin()

    def arrived(self, runs: list[Run], now: float, *, last: bool) -> tuple[int, Answered | None]:
        """Match pages with the oldest request; return their raw bytes, and the request if this was its last answer.

        Raises UnrequestedPagesError where they are not what comes next.
        """
        if not self._requests:
            raise UnrequestedPagesError("pages came on the push lane that nobody asked for")
        for run in runs:
            self._expect(run)
        request = self._requests[0]
        used = raw_pages(runs) * PAGE_SIZE
        self._used += used
        if self._used > request.credit:
            raise UnrequestedPagesError(f"the push lane sent {self._used} bytes for {request.credit} granted")
        # A message of nothing is no sign of progress.
        if runs or last:
            self._heard = now
        return used, self._finish(request) if last else None

    def lost(self) -> None:
        """The lane is gone, and every request with it."""
        self._requests.clear()
        self._begin()

    def _expect(self, run: Run) -> None:
        first, left = self._run_left
        if not left:
            first, left = next(self._expected, (0, 0))
        if run.first != first or run.pages > left:
            raise UnrequestedPagesError(
                f"pages {run.first} to {run.first + run.pages} came on the push lane where page {first} was next"
            )
        self._run_left = (first + run.pages, left - run.pages)

    def _finish(self, request: PushRequest) -> Answered:
        rest = [self._run_left] if self._run_left[1] else []
        rest += self._expected
        if rest == list(request.runs):
            raise UnrequestedPagesError("a push request was ended unanswered")
        answered = Answered(request, self._used, rest)
        self._requests.popleft()
        self._begin()
        return answered

    def _begin(self) -> None:
        """The oldest request is what the push lane answers next."""
        self._used = 0
        self._run_left = (0, 0)
        self._expected = iter(self._requests[0].runs if self._requests else ())
