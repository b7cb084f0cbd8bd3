"""How a migration looks while it goes on: a panel for terminals, a line for everything else. Pure functions."""

from __future__ import annotations

from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pageferry.cli import memory_map
from pageferry.cli.units import bytes_text, count_text, duration_text, ordinal_text, rate_text, share_text
from pageferry.v1 import migration_pb2 as pb

PAGE_BYTES: Final = 4096
_MEANING: Final = {
    pb.MIGRATION_STATE_PENDING: "accepted, not begun",
    pb.MIGRATION_STATE_PREPARING: "the destination readies its VMM, the guest runs at the source",
    pb.MIGRATION_STATE_HANDING_OVER: "the guest stands still while its device state crosses",
    pb.MIGRATION_STATE_POSTCOPY: "the guest runs at the destination, its memory follows",
    pb.MIGRATION_STATE_POSTCOPY_PAUSED: "the other host is out of reach, the guest waits where it lacks a page",
    pb.MIGRATION_STATE_COMPLETED: "every page is at the destination, the source has let go",
    pb.MIGRATION_STATE_FAILED: "the migration failed",
    pb.MIGRATION_STATE_CANCELLED: "taken back, the guest runs at the source",
    pb.MIGRATION_STATE_IN_DOUBT: "the guest may have run at the destination, which cannot say; it stands still at the "
    "source",
}
_COLOURS: Final = {
    pb.MIGRATION_STATE_COMPLETED: "green",
    pb.MIGRATION_STATE_FAILED: "red",
    pb.MIGRATION_STATE_CANCELLED: "yellow",
    pb.MIGRATION_STATE_POSTCOPY_PAUSED: "yellow",
    pb.MIGRATION_STATE_IN_DOUBT: "red",
}


def state_name(state: int) -> str:
    """Return a state's short name: `postcopy paused`; a number where this release does not know it."""
    if state not in pb.MigrationState.values():
        return f"state {state}"
    name = pb.MigrationState.Name(pb.MigrationState.ValueType(state))
    return name.removeprefix("MIGRATION_STATE_").lower().replace("_", " ")


def state_text(state: int) -> Text:
    """Return a state's short name in its colour."""
    return Text(state_name(state), style=_COLOURS.get(pb.MigrationState.ValueType(state), "bold"))


def pages_left(progress: pb.Progress) -> int:
    """Return how many pages have yet to come."""
    return max(0, progress.pages_total - progress.pages_present - progress.pages_discarded - progress.pages_poisoned)


def has_begun(migration: pb.Migration) -> bool:
    """Tell whether there is something to say about the guest's memory."""
    return bool(migration.progress.pages_total) and not migration.queue_position


def total_latency(migration: pb.Migration) -> pb.LatencySummary | None:
    """Return the latency of whole faults, or None where there were none yet."""
    for stage in migration.fault_latencies:
        if stage.stage == "total" and stage.latency.count:
            return stage.latency
    return None


def line(migration: pb.Migration) -> str:
    """Return the migration as one line of text."""
    parts = [f"{state_name(migration.state)}:"]
    if has_begun(migration):
        parts.append(_amount(migration.progress))
        parts += [_traffic(migration.progress), _faults(migration.progress)]
        latency = total_latency(migration)
        if latency is not None:
            parts.append(f"fault p50 {duration_text(latency.p50_us)} p99 {duration_text(latency.p99_us)}")
    else:
        parts.append(situation(migration))
    parts += filter(None, [hint(migration)])
    if migration.error.reason:
        parts.append(f"{migration.error.reason}: {migration.error.message}")
    return parts[0] + " " + ", ".join(parts[1:])


def meaning(state: int) -> str:
    """Return what a state means, for someone who sees it for the first time."""
    return _MEANING.get(pb.MigrationState.ValueType(state), "a state that this release does not know")


def situation(migration: pb.Migration) -> str:
    """Return what the migration's state means for it, with its place where it waits for its turn."""
    if migration.queue_position:
        return f"waits for its turn: {ordinal_text(migration.queue_position)}"
    return meaning(migration.state)


def hint(migration: pb.Migration) -> str:
    """Return what a person has to do, or nothing."""
    if migration.state == pb.MIGRATION_STATE_IN_DOUBT:
        return f"see what both ends know, and decide: pageferry resolve {migration.migration_id}"
    return ""


def panel(migration: pb.Migration, *, colours: bool = True, width: int = 80) -> Group:
    """Return the migration as a few lines for a terminal that is `width` characters wide."""
    head = Text.assemble((migration.guest_id, "bold"), f"  {route(migration)}  ", state_text(migration.state))
    rows: list[Text | Table] = [head, Text(situation(migration), style="dim")]
    if hint(migration):
        rows.append(Text(hint(migration), style="bold"))
    if has_begun(migration):
        rows.append(Text(_amount(migration.progress)))
        rows += [Text(_traffic(migration.progress)), Text(_faults(migration.progress))]
        map_width = max(16, min(memory_map.WIDTH, width - 2))
        picture = memory_map.picture(
            migration.memory_map, migration.progress.pages_total, colours=colours, width=map_width
        )
        if picture:
            rows.append(picture)
    if total_latency(migration) is not None:
        rows.append(latencies(migration))
    if migration.error.reason:
        rows.append(Text(f"{migration.error.reason}: {migration.error.message}", style="red"))
    return Group(*rows)


def route(migration: pb.Migration) -> str:
    """Return from where to where the guest goes."""
    return f"{migration.source_name or '?'} to {migration.destination_name or migration.destination_address or '?'}"


def latencies(migration: pb.Migration, title: str | None = None) -> Table:
    """Return the latencies of faults by stage as a table."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("fault latency")
    for name in ("p50", "p90", "p99", "longest"):
        table.add_column(name, justify="right")
    for stage in migration.fault_latencies:
        latency = stage.latency
        if latency.count:
            times = (latency.p50_us, latency.p90_us, latency.p99_us, latency.max_us)
            table.add_row(stage.stage, *map(duration_text, times))
    return table


def _amount(progress: pb.Progress) -> str:
    total, left = progress.pages_total, pages_left(progress)
    here = bytes_text((total - left) * PAGE_BYTES)
    return (
        f"{share_text(total - left, total)}, {here} of {bytes_text(total * PAGE_BYTES)}, {count_text(left)} pages left"
    )


def _traffic(progress: pb.Progress) -> str:
    return (
        f"push {rate_text(progress.push_bytes_per_second)}, pages by demand {count_text(progress.demand_pages)} and by "
        f"push {count_text(progress.push_pages)}"
    )


def _faults(progress: pb.Progress) -> str:
    return f"{count_text(progress.faults)} faults ({count_text(progress.faults_waiting)} waiting)"
