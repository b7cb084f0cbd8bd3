"""The sidecar's figures as Prometheus metrics. No label names a guest or a migration: those are in the API."""

from __future__ import annotations

import math
import platform
from itertools import product
from typing import TYPE_CHECKING, Final, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from pageferry import __version__
from pageferry.errors import Reason
from pageferryd.core.figures import DOORS, FAULT_CLASSES, LANES, PAGE_KINDS, ROLES
from pageferryd.core.latency import STAGES
from pageferryd.core.lifecycle import State
from pageferryd.core.refusals import API, HANDOFF, LANE, PEER, VMM

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from prometheus_client import Metric

    from pageferryd.core.figures import Figures, FiguresSource, Gauges
    from pageferryd.core.latency import FaultLatencies

# Close to each other where a fault over the network usually ends.
LATENCY_BUCKETS: Final = (
    25e-6, 50e-6, 100e-6, 200e-6, 300e-6, 400e-6, 600e-6, 800e-6,
    1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds of the latency histogram, in seconds."""

_Key = TypeVar("_Key", bound="tuple[str, ...]")
_STATES: Final = tuple(state.name.lower() for state in State)

# Others come with the first of their kind; each is of Reason.
_REFUSALS: Final = {
    API: (Reason.PEER_NOT_ALLOWED, Reason.ROLE_MISSING),
    PEER: (Reason.PEER_NOT_ALLOWED, Reason.ROLE_MISSING, Reason.TOKEN_INVALID),
    LANE: (Reason.PEER_NOT_ALLOWED, Reason.TOKEN_INVALID, Reason.LANE_SILENT, Reason.LANE_LOST),
    HANDOFF: (
        Reason.HANDOFF_WRONG_PEER, Reason.HANDOFF_NO_FD, Reason.HANDOFF_MALFORMED, Reason.HANDOFF_REGIONS,
        Reason.MEMORY_NOT_ITS_OWN,
    ),
    VMM: (Reason.TOKEN_INVALID, Reason.MEMORY_NOT_ITS_OWN),
}  # fmt: skip

# Name, help, and field of Figures or Gauges.
_COUNTERS: Final = (
    ("duplicate_pages", "Pages that came twice and were dropped.", "duplicate_pages"),
    ("discarded_pages", "Pages that guests gave up before they came.", "discarded_pages"),
    ("prefetch_issued_pages", "Pages fetched because a neighbour was touched.", "prefetch_issued"),
    ("prefetch_used_pages", "Prefetched pages known to have been wanted.", "prefetch_used"),
    ("prefetch_late_pages", "Prefetched pages that the guest touched before they had come.", "prefetch_late"),
    ("push_paced_seconds", "Time that push lanes were held back by pacing.", "push_held_seconds"),
    ("lane_reconnects", "Times that lanes were opened again after a loss.", "reconnects"),
    ("checksum_mismatches", "Pages that came damaged and were fetched again.", "checksum_mismatches"),
)
_GAUGES: Final = (
    ("migrations_queued", "Migrations that wait for their turn.", "queued"),
    ("faults_waiting", "Faults that wait for their page.", "faults_waiting"),
    ("pages_missing", "Pages that guests at this destination still lack.", "pages_missing"),
    ("push_window_bytes", "Bytes that push lanes may have under way.", "push_window_bytes"),
    ("push_under_way_bytes", "Bytes that push lanes asked for and have not received.", "push_under_way_bytes"),
    ("demand_requests_under_way", "Requests on demand lanes without their answer.", "demand_requests_under_way"),
)
# Not a number until a migration has ended: zero would be a claim.
_LAST: Final = (
    ("downtime_seconds", "How long its guest stood still.", "last_downtime_seconds"),
    ("postcopy_seconds", "How long its guest ran before the last page came.", "last_postcopy_seconds"),
    ("pages", "Pages that it installed.", "last_pages"),
    ("faults", "Faults that its guest raised.", "last_faults"),
)


def make_registry(source: FiguresSource) -> CollectorRegistry:
    """Return a registry of its own with the sidecar's figures, and its process's memory, CPU time and open files."""
    registry = CollectorRegistry()
    registry.register(FiguresCollector(source))
    ProcessCollector(registry=registry)
    return registry


class FiguresCollector(Collector):
    """Reads the figures at each scrape. Every series exists from the start."""

    def __init__(self, source: FiguresSource) -> None:
        self._source = source

    def describe(self) -> Iterable[Metric]:
        """Return nothing: names are checked when they are scraped, not when the source may not be ready yet."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Return all metrics as they are now."""
        yield from _from_figures(self._source.figures())
        yield from _from_gauges(self._source.gauges())
        build = GaugeMetricFamily(
            "pageferry_build_info", "The release that runs; always 1.", labels=("version", "python")
        )
        build.add_metric((__version__, platform.python_version()), 1)
        yield build


def _from_figures(figures: Figures) -> Iterator[Metric]:
    yield _counter(
        "faults", "Faults of guests, by how they arrived and what they found.", ("door", "class"),
        figures.faults, product(DOORS, FAULT_CLASSES),
    )  # fmt: skip
    yield _latencies(figures.latencies)
    kinds = list(product(LANES, PAGE_KINDS))
    lanes = list(product(LANES))
    labels = ("lane", "kind")
    yield _counter("pages", "Pages installed at this destination.", labels, figures.pages, kinds)
    yield _counter("received_bytes", "Bytes received from sources.", ("lane",), _keyed(figures.bytes), lanes)
    yield _counter("served_pages", "Pages sent by this source.", labels, figures.served_pages, kinds)
    yield _counter("served_bytes", "Bytes sent to destinations.", ("lane",), _keyed(figures.served_bytes), lanes)
    refusals = [(where, reason.value) for where, reasons in _REFUSALS.items() for reason in reasons]
    yield _counter("refusals", "Callers and VMMs refused.", ("where", "reason"), figures.refusals, refusals)
    for name, text, field in _COUNTERS:
        yield CounterMetricFamily(f"pageferry_{name}", text, value=getattr(figures, field))


def _from_gauges(gauges: Gauges) -> Iterator[Metric]:
    migrations = GaugeMetricFamily(
        "pageferry_migrations", "Migrations that this sidecar knows, ended ones included.", labels=("role", "state")
    )
    for key in _series(gauges.migrations, product(ROLES, _STATES)):
        migrations.add_metric(key, gauges.migrations.get(key, 0))
    yield migrations
    for name, text, field in _GAUGES:
        yield GaugeMetricFamily(f"pageferry_{name}", text, value=getattr(gauges, field))
    for name, text, field in _LAST:
        value = getattr(gauges, field)
        yield GaugeMetricFamily(
            f"pageferry_last_migration_{name}",
            f"Of the migration that ended last: {text[0].lower()}{text[1:]}",
            value=math.nan if value is None else value,
        )


def _counter(
    name: str,
    text: str,
    labels: Sequence[str],
    counts: Mapping[_Key, int],
    known: Iterable[_Key],
) -> Metric:
    family = CounterMetricFamily(f"pageferry_{name}", text, labels=labels)
    for key in _series(counts, known):
        family.add_metric(key, counts.get(key, 0))
    return family


def _latencies(latencies: FaultLatencies) -> Metric:
    family = HistogramMetricFamily(
        "pageferry_fault_latency_seconds", "How long faults took, by stage and in total.", labels=("stage",)
    )
    bounds = (*LATENCY_BUCKETS, math.inf)
    labels = (*map(repr, LATENCY_BUCKETS), "+Inf")
    for stage in STAGES:
        recorder = latencies.by_stage[stage]
        counts = zip(labels, recorder.counts_up_to(bounds), strict=True)
        family.add_metric((stage,), list(counts), recorder.sum)
    return family


def _series(counts: Mapping[_Key, int], known: Iterable[_Key]) -> list[_Key]:
    """Return the known label values, and behind them whatever was counted beside them."""
    return list(dict.fromkeys([*known, *sorted(counts)]))


def _keyed(counts: Mapping[str, int]) -> dict[tuple[str], int]:
    return {(key,): count for key, count in counts.items()}
