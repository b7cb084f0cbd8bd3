"""Migrations as the API shows them."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from pageferry.v1 import memory_pb2, migration_pb2
from pageferryd.core.layout import Layout, Region

if TYPE_CHECKING:
    from collections.abc import Callable

    from pageferryd.control.record import MigrationRecord
    from pageferryd.core.latency import LatencySummary
    from pageferryd.destination.session import Session

_RATE_SECONDS = 1.0


def migration_of(record: MigrationRecord) -> migration_pb2.Migration:
    """Return what the record alone knows."""
    message = migration_pb2.Migration(
        migration_id=record.migration_id,
        request_id=record.request_id,
        guest_id=record.guest_id,
        role=record.role,
        state=migration_pb2.MigrationState.ValueType(record.state.value),
        source_name=record.source_name,
        destination_name=record.destination_name,
        destination_address=record.destination_address,
        create_time=_timestamp(record.created),
        limits=record.limits,
        policy=record.policy,
        queue_position=record.queue_position,
    )
    if record.huge_bytes:
        message.progress.huge_bytes = record.huge_bytes
    if record.ended is not None:
        message.end_time.CopyFrom(_timestamp(record.ended))
    if record.downtime is not None:
        message.downtime.CopyFrom(_duration(record.downtime))
    if record.postcopy_seconds is not None:
        message.postcopy_duration.CopyFrom(_duration(record.postcopy_seconds))
    if record.error is not None:
        message.error.CopyFrom(
            migration_pb2.ErrorDetail(reason=record.error.reason.value, message=record.error.message)
        )
    return message


class RateMeter:
    """Bytes a second over about the last second, from samples as they are looked at."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque(maxlen=64)

    def rate(self, total: int) -> float:
        """Note the total so far; return the rate."""
        now = self._clock()
        while len(self._samples) > 1 and now - self._samples[1][0] >= _RATE_SECONDS:
            self._samples.popleft()
        if not self._samples or now > self._samples[-1][0]:
            self._samples.append((now, total))
        (since, before), (until, after) = self._samples[0], self._samples[-1]
        return (after - before) / (until - since) if until > since else 0.0


def add_session(message: migration_pb2.Migration, session: Session, rate: float) -> None:
    """Add what the destination's session has seen."""
    pager = session.pager
    counts, page_map, around = pager.counts, pager.map, pager.around.counts
    discarded, poisoned = page_map.discarded.count, page_map.poisoned.count
    message.progress.MergeFrom(
        migration_pb2.Progress(
            pages_total=page_map.page_count,
            pages_present=page_map.settled.count - discarded - poisoned,
            pages_discarded=discarded,
            pages_poisoned=poisoned,
            demand_pages=counts.demand_pages,
            push_pages=counts.push_pages,
            zero_pages=counts.zero_pages,
            duplicate_pages=counts.duplicate_pages,
            checksum_mismatches=session.placer.checksum_mismatches,
            demand_bytes=counts.demand_bytes,
            push_bytes=counts.push_bytes,
            faults=counts.faults,
            faults_waiting=pager.faults_waiting,
            prefetch_issued=around.issued,
            prefetch_used=around.used,
            prefetch_late=around.late,
            push_bytes_per_second=rate,
            reconnects=session.reconnects,
            exit_faults=sum(count for (door, _), count in session.intake.counts.items() if door == "exit"),
            private_pages=session.placer.private.count,
            shared_accesses=session.placer.shared_accesses,
        )
    )
    message.fault_latencies.extend(
        migration_pb2.StageLatency(stage=stage, latency=_summary(summary))
        for stage, summary in session.latencies.summaries()
    )
    message.memory_map.CopyFrom(
        migration_pb2.MemoryMap(
            pages_per_cell=session.arrivals.pages_per_cell,
            demand_pages=session.arrivals.demand,
            push_pages=session.arrivals.push,
        )
    )


def layout_of(message: memory_pb2.MemoryLayout) -> Layout:
    """Return a message as a layout. Raises LayoutError."""
    return Layout([Region(region.guest_address, region.size, region.page_size) for region in message.regions])


def _summary(summary: LatencySummary) -> migration_pb2.LatencySummary:
    return migration_pb2.LatencySummary(
        count=summary.count,
        mean_us=summary.mean * 1e6,
        p50_us=summary.p50 * 1e6,
        p90_us=summary.p90 * 1e6,
        p99_us=summary.p99 * 1e6,
        max_us=summary.max * 1e6,
    )


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(int(seconds * 1e6))
    return stamp


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration
