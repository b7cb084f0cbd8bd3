"""After a guest's last page: its small mappings put back together, so that it is as fast as it was."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pageferryd.linux.collapse import big_bytes, collapse

if TYPE_CHECKING:
    from pageferryd.control.arrival import Arrival
    from pageferryd.control.record import MigrationRecord


async def map_by_huge_pages(arrival: Arrival, record: MigrationRecord) -> None:
    """Have small mappings put together; the guest runs meanwhile, and need not wait for it to be complete."""
    await asyncio.to_thread(collapse, arrival.pid, arrival.spans)
    record.huge_bytes = await asyncio.to_thread(big_bytes, arrival.pid, arrival.spans)
    record.changes.notify()
