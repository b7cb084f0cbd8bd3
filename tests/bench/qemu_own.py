"""QEMU's own post-copy, told to begin at once and to push as fast as it can."""

from __future__ import annotations

from qemu_ends import Ends, Moved

from qemu_guest.guest import QemuGuest

_UNLIMITED = 1 << 40
"""Bytes a second: above what memory itself can do."""


async def move_by_itself(ends: Ends, *, preempt: bool) -> Moved:
    """Move the guest over a Unix socket; with `preempt` pages that are waited for have a channel of their own.

    Post-copy is asked for right after the migration, so that it begins when that is set up: what QEMU may send before
    is what it sends meanwhile.
    """
    source, destination = ends.source.monitor, ends.destination.monitor
    for guest in (ends.source, ends.destination):
        await _enable(guest, preempt=preempt)
    uri = f"unix:{ends.destination.directory / 'migration'}"
    # While a guest is awaited this means: let it run as soon as it can.
    await destination.execute("cont")
    await destination.execute("migrate-incoming", uri=uri)
    await ends.begin()
    await source.execute("migrate", uri=uri)
    await source.execute("migrate-start-postcopy")
    await ends.source_events.first("MIGRATION", status="completed")
    completed = await ends.destination_events.first("MIGRATION", status="completed")
    moved = await source.execute("query-migrate")
    if not moved["ram"]["postcopy-requests"]:
        raise RuntimeError("QEMU moved the guest without post-copy")
    runs = await ends.destination_events.first("RESUME")
    return Moved((completed - runs) * 1e3, int(moved["ram"]["transferred"]))


async def _enable(guest: QemuGuest, *, preempt: bool) -> None:
    names = ["events", "postcopy-ram", *(["postcopy-preempt"] if preempt else [])]
    await guest.monitor.execute(
        "migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names]
    )
    # 0 stands for no limit.
    await guest.monitor.execute("migrate-set-parameters", max_bandwidth=_UNLIMITED, max_postcopy_bandwidth=0)
