"""What an arrival has counted, as metrics show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferryd.core.figures import Figures

if TYPE_CHECKING:
    from pageferryd.control.arrival import Arrival


def figures_of(arrival: Arrival) -> Figures:
    """Return what one arrival has counted."""
    session = arrival.session
    pager = session.pager
    counts, around = pager.counts, pager.around.counts
    figures = Figures(
        duplicate_pages=counts.duplicate_pages,
        prefetch_issued=around.issued,
        prefetch_used=around.used,
        prefetch_late=around.late,
        push_held_seconds=pager.pacer.held_seconds,
        reconnects=session.reconnects,
        discarded_pages=pager.map.discarded.count,
        checksum_mismatches=session.placer.checksum_mismatches,
    )
    figures.faults.update(session.intake.counts)
    figures.latencies.add(session.latencies)
    figures.pages.update(session.placer.pages)
    figures.bytes.update({"demand": counts.demand_bytes, "push": counts.push_bytes})
    return figures
