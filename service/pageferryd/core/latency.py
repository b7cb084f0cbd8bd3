"""Durations of faults, counted in logarithmic buckets: cheap enough to note five of them at every fault.

A bucket is one sixteenth of a power of two of nanoseconds wide, as in HdrHistogram with 4 bits of precision: a reported
percentile is at most 3.2 % away from the true one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# A duration's bucket is given by its leading 1 and the 4 bits after it.
_SUB_BITS: Final = 4
_SUB_BUCKETS: Final = 1 << _SUB_BITS
_LEAD_BITS: Final = _SUB_BITS + 1
# Shorter ones count as this long, in nanoseconds.
_SHORTEST: Final = _SUB_BUCKETS
# Longer ones count as about 18 minutes, in nanoseconds.
_LONGEST: Final = (1 << 40) - 1
_BUCKETS: Final = ((_LONGEST.bit_length() - _LEAD_BITS) << _SUB_BITS) + _SUB_BUCKETS

STAGES: Final = ("read", "queued", "fetched", "installed", "total")


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """A set of durations in a few numbers, all in seconds but the count. Zeroes when there are none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class LatencyRecorder:
    """Counts durations. Bounded: about 600 counters, however many there are."""

    __slots__ = ("_buckets", "max", "sum")

    def __init__(self) -> None:
        self._buckets = [0] * _BUCKETS
        self.sum = 0.0
        """All durations added up, in seconds."""
        self.max = 0.0
        """The longest duration, in seconds."""

    def observe(self, seconds: float) -> None:
        """Note one duration, in seconds and finite. A negative one (a clock that went back) counts as shortest."""
        # `_index` written out: a call would cost as much as all the rest.
        nanoseconds = int(seconds * 1e9)
        if not _SHORTEST <= nanoseconds <= _LONGEST:
            nanoseconds = _clamp(nanoseconds)
            seconds = max(seconds, 0.0)
        shift = nanoseconds.bit_length() - _LEAD_BITS
        self._buckets[(shift << _SUB_BITS) + (nanoseconds >> shift) - _SUB_BUCKETS] += 1
        self.sum += seconds
        if seconds > self.max:
            self.max = seconds

    @property
    def count(self) -> int:
        """How many durations were noted."""
        return sum(self._buckets)

    def percentile(self, fraction: float) -> float:
        """Return the duration, in seconds, that `fraction` (0 to 1) of all do not exceed; 0 when there are none."""
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"a fraction is from 0 to 1, not {fraction}")
        return self._percentile(list(accumulate(self._buckets)), fraction)

    def _percentile(self, below: list[int], fraction: float) -> float:
        if not below[-1]:
            return 0.0
        index = bisect_left(below, max(1, math.ceil(fraction * below[-1])))
        return min(_middle(index), self.max)

    def summary(self) -> LatencySummary:
        """Return count, mean, percentiles and maximum."""
        below = list(accumulate(self._buckets))
        count = below[-1]
        return LatencySummary(
            count=count,
            mean=self.sum / count if count else 0.0,
            p50=self._percentile(below, 0.5),
            p90=self._percentile(below, 0.9),
            p99=self._percentile(below, 0.99),
            max=self.max,
        )

    def counts_up_to(self, bounds: Sequence[float]) -> list[int]:
        """Return for each bound, in seconds, how many durations did not exceed it.

        A duration within a bucket's width (6.25 %) of a bound may be counted on its other side.
        """
        below = [0, *accumulate(self._buckets)]
        return [below[_buckets_up_to(bound)] for bound in bounds]

    def add(self, other: LatencyRecorder) -> None:
        """Count everything that another recorder has counted, too."""
        self._buckets = [mine + theirs for mine, theirs in zip(self._buckets, other._buckets, strict=True)]
        self.sum += other.sum
        self.max = max(self.max, other.max)


class FaultLatencies:
    """The latencies of a guest's faults: one recorder a stage, and one for the whole."""

    __slots__ = ("_fetched", "_installed", "_queued", "_read", "_total", "by_stage")

    def __init__(self) -> None:
        self._read, self._queued, self._fetched, self._installed, self._total = (LatencyRecorder() for _ in STAGES)
        recorders = (self._read, self._queued, self._fetched, self._installed, self._total)
        self.by_stage: Mapping[str, LatencyRecorder] = dict(zip(STAGES, recorders, strict=True))
        """The recorders by the names in STAGES, in that order."""

    def observe(self, read: float, queued: float, fetched: float, installed: float, total: float) -> None:
        """Note one fault: how long each stage took, and the whole, in seconds."""
        self._read.observe(read)
        self._queued.observe(queued)
        self._fetched.observe(fetched)
        self._installed.observe(installed)
        self._total.observe(total)

    def add(self, other: FaultLatencies) -> None:
        """Count everything that another one has counted, too."""
        for stage, recorder in other.by_stage.items():
            self.by_stage[stage].add(recorder)

    def summaries(self) -> Iterable[tuple[str, LatencySummary]]:
        """Return each stage's name and summary, in the order of STAGES."""
        return [(stage, recorder.summary()) for stage, recorder in self.by_stage.items()]


def _clamp(nanoseconds: int) -> int:
    return min(max(nanoseconds, _SHORTEST), _LONGEST)


def _index(nanoseconds: int) -> int:
    nanoseconds = _clamp(nanoseconds)
    shift = nanoseconds.bit_length() - _LEAD_BITS
    return (shift << _SUB_BITS) + (nanoseconds >> shift) - _SUB_BUCKETS


def _middle(index: int) -> float:
    """Return the middle of a bucket, in seconds."""
    shift, sub = divmod(index, _SUB_BUCKETS)
    return ((_SUB_BUCKETS + sub + 0.5) * (1 << shift)) * 1e-9


def _buckets_up_to(bound: float) -> int:
    """Return how many of the first buckets lie, by their middle, at or below a bound in seconds."""
    index = _index(int(min(bound, _LONGEST * 1e-9) * 1e9))
    return index + 1 if _middle(index) <= bound else index
