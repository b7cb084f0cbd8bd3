"""What the sidecar counts and how it stands now: kept by whoever does the work, shown as metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

from pageferryd.core.latency import FaultLatencies

if TYPE_CHECKING:
    from typing import Final

# What the labels of the counts can be. Figures with others are a mistake of whoever counted.
DOORS: Final = ("uffd", "exit", "offload")
FAULT_CLASSES: Final = ("missing", "joined", "zero", "present", "poisoned")
LANES: Final = ("demand", "push")
PAGE_KINDS: Final = ("raw", "zero", "poisoned")
ROLES: Final = ("source", "destination")


@dataclass(slots=True)
class Figures:
    """Counts since the start, of one migration or of all; they only ever grow."""

    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Faults that the doors reported, by door and class.

    A fault is of class "missing" when it had its page fetched, "joined" when the page was on its way already, "zero" or
    "poisoned" when it was answered as such without a fetch, "present" when the page was there already.
    """
    latencies: FaultLatencies = field(default_factory=FaultLatencies)
    """How long faults took, by stage."""
    pages: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Pages installed at a destination, by lane and kind."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Bytes received by a destination, by lane."""
    served_pages: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Pages sent by a source, by lane and kind."""
    served_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes sent by a source, by lane."""
    duplicate_pages: int = 0
    """Pages that came twice, and were dropped."""
    prefetch_issued: int = 0
    """Pages fetched because a neighbour was touched."""
    prefetch_used: int = 0
    """Of those: pages known to have been wanted."""
    prefetch_late: int = 0
    """Of those: pages that the guest touched before they had come."""
    push_held_seconds: float = 0.0
    """How long push lanes were held back by pacing, in seconds."""
    reconnects: int = 0
    """Times that lanes were opened again after a loss."""
    discarded_pages: int = 0
    """Pages that guests gave up before they came."""
    checksum_mismatches: int = 0
    """Pages that came damaged, by their checksums, and were fetched again."""
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Callers and VMMs that were refused, by place and reason; of the sidecar as a whole, not of a migration."""

    def add(self, other: Figures) -> None:
        """Count everything that another one has counted, too."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, FaultLatencies):
                mine.add(theirs)
            else:
                setattr(self, item.name, mine + theirs)


@dataclass(slots=True)
class Gauges:
    """How things stand at one moment, over all migrations that the sidecar knows."""

    migrations: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Migrations by role and by the lower-case name of their State."""
    queued: int = 0
    """Migrations that wait for their turn."""
    faults_waiting: int = 0
    """Faults that wait for their page."""
    push_window_bytes: int = 0
    """Bytes that push lanes may have under way."""
    push_under_way_bytes: int = 0
    """Bytes that push lanes have asked for and not yet received."""
    demand_requests_under_way: int = 0
    """Requests on demand lanes without their answer."""
    pages_missing: int = 0
    """Pages that guests at this destination still lack."""
    last_downtime_seconds: float | None = None
    """How long the guest of the migration that ended last stood still; None before any has ended."""
    last_postcopy_seconds: float | None = None
    """How long that guest ran before its last page came."""
    last_pages: int | None = None
    """How many pages that migration installed."""
    last_faults: int | None = None
    """How many faults that guest raised."""


class FiguresSource(Protocol):
    """Whoever knows the figures of all migrations, ended ones included."""

    def figures(self) -> Figures:
        """Return the counts since the sidecar started."""
        ...

    def gauges(self) -> Gauges:
        """Return how things stand now."""
        ...
