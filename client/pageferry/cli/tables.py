"""Tables and short texts about guests, migrations, checks and limits. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pageferry.cli import memory_map, progress
from pageferry.cli.units import bytes_text, count_text, duration_text, ordinal_text, rate_text, share_text
from pageferry.client import ended
from pageferry.v1 import migration_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

_CHECK_MARKS: Final = {
    pb.CHECK_STATUS_OK: ("ok", "green"),
    pb.CHECK_STATUS_WARNING: ("warning", "yellow"),
    pb.CHECK_STATUS_FAILED: ("FAILED", "red"),
}
_GUEST_STATES: Final = {
    pb.GUEST_STATE_RUNNING: "running",
    pb.GUEST_STATE_INCOMING: "incoming",
    pb.GUEST_STATE_MIGRATING: "migrating",
    pb.GUEST_STATE_PAUSED: "paused",
    # The sidecar asked, and did not hear.
    pb.GUEST_STATE_UNSPECIFIED: "no answer",
}
_ON_LOSS: Final = {
    pb.ON_LOSS_UNSPECIFIED: "as the destination's sidecar is set",
    pb.ON_LOSS_WAIT: "the guest waits for it",
    pb.ON_LOSS_KILL: "the guest is killed",
}
DEFAULT_PUSH_WEIGHT: Final = 100
"""What a weight of 0 means."""
_ROLES: Final = {pb.ROLE_SOURCE: "leaves", pb.ROLE_DESTINATION: "comes"}


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        # Ids and paths are there to be copied: they wrap rather than lose their end.
        table.add_column(column, overflow="fold")
    return table


def guests(found: Sequence[pb.Guest]) -> RenderableType:
    """Return the guests of a host, and below them why some cannot be moved."""
    if not found:
        return Text("no guests: tell the sidecar of one with `pageferry register`")
    table = _table("GUEST", "STATE", "MOVABLE", "MEMORY", "PID", "DRIVER", "VMM")
    for guest in found:
        table.add_row(
            Text(guest.guest_id),
            _GUEST_STATES.get(guest.state, "unknown"),
            Text("yes", style="green") if guest.movable else Text("no", style="yellow"),
            bytes_text(guest.memory_bytes) if guest.memory_bytes else "-",
            str(guest.pid) if guest.pid else "-",
            guest.driver,
            Text(guest.vmm_address),
        )
    why_not = _table("GUEST", "WHY NOT")
    for guest in found:
        for obstacle in guest.obstacles:
            # Whoever looks for a guest in the text finds its name on each line.
            why_not.add_row(Text(guest.guest_id), Text(obstacle))
    return Group(table, Text(), why_not) if why_not.row_count else table


def migrations(found: Iterable[pb.Migration]) -> RenderableType:
    """Return the migrations that a sidecar knows."""
    table = _table("MIGRATION", "GUEST", "ROLE", "FROM", "TO", "STATE", "MEMORY IN", "DOWNTIME")
    hints: list[RenderableType] = []
    for migration in found:
        done = migration.progress.pages_total - progress.pages_left(migration.progress)
        table.add_row(
            migration.migration_id,
            migration.guest_id,
            _ROLES.get(migration.role, "?"),
            migration.source_name or "?",
            migration.destination_name or migration.destination_address,
            _standing(migration),
            share_text(done, migration.progress.pages_total),
            _duration(migration, "downtime"),
        )
        if progress.hint(migration):
            hints.append(Text(f"{migration.migration_id} is in doubt; {progress.hint(migration)}", style="bold"))
    if hints:
        return Group(table, Text(), *hints)
    return table if table.row_count else Text("no migrations")


def _standing(migration: pb.Migration) -> Text:
    state = progress.state_text(migration.state)
    return state.append(f", {ordinal_text(migration.queue_position)}") if migration.queue_position else state


def checks(found: Iterable[pb.Check]) -> Table:
    """Return checks, each remedy below its check."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for column in ("status", "name", "detail"):
        table.add_column(column, overflow="fold")
    for check in found:
        mark, style = _CHECK_MARKS.get(check.status, ("unknown", "yellow"))
        table.add_row(Text(mark, style=style), Text(check.name), Text(check.detail))
        if check.remedy:
            table.add_row("", "", Text(f"remedy: {check.remedy}", style="bold"))
    return table


def migration(found: pb.Migration, *, colours: bool) -> RenderableType:
    """Return everything that is known of a migration."""
    rows: list[RenderableType] = [_facts(found)]
    if progress.has_begun(found):
        rows += [Text(), figures(found)]
    if progress.total_latency(found) is not None:
        rows += [Text(), progress.latencies(found)]
    picture = memory_map.picture(found.memory_map, found.progress.pages_total, colours=colours)
    if picture:
        rows += [Text(), picture]
    return Group(*rows)


def _facts(found: pb.Migration) -> Table:
    table = _pairs()
    table.add_row("migration", Text(found.migration_id))
    table.add_row("guest", Text(found.guest_id))
    table.add_row("way", Text(f"{progress.route(found)} ({found.destination_address or 'address unknown'})"))
    table.add_row("state", progress.state_text(found.state))
    table.add_row("", Text(progress.situation(found), style="dim"))
    if progress.hint(found):
        table.add_row("", Text(progress.hint(found), style="bold"))
    if found.error.reason:
        table.add_row("error", Text(f"{found.error.reason}: {found.error.message}", style="red"))
    if found.HasField("create_time"):
        table.add_row("accepted", found.create_time.ToJsonString())
    if found.HasField("end_time"):
        table.add_row("ended", found.end_time.ToJsonString())
    table.add_row("limits", limits(found.limits))
    table.add_row("policy", policy(found.policy))
    return table


def figures(found: pb.Migration) -> Table:
    """Return the figures of a migration's memory."""
    seen = found.progress
    table = _pairs()
    table.add_row("downtime", _duration(found, "downtime"), "how long the guest stood still")
    table.add_row("time to last page", _duration(found, "postcopy_duration"), "the guest ran meanwhile")
    left = progress.pages_left(seen)
    table.add_row("pages in", f"{count_text(seen.pages_total - left)} of {count_text(seen.pages_total)}", "4 KiB each")
    table.add_row(
        "  by demand",
        count_text(seen.demand_pages),
        f"{bytes_text(seen.demand_bytes)}: touched, or beside a touched one",
    )
    table.add_row(
        "  by push", count_text(seen.push_pages), f"{bytes_text(seen.push_bytes)}: all others, behind the demand"
    )
    table.add_row("  of these zero", count_text(seen.zero_pages), "crossed as a flag, without bytes")
    if seen.pages_discarded:
        table.add_row("  discarded", count_text(seen.pages_discarded), "given up by the guest before they came")
    if seen.pages_poisoned:
        table.add_row("  poisoned", count_text(seen.pages_poisoned), "unreadable at the source")
    if seen.private_pages:
        table.add_row("  of these private", count_text(seen.private_pages), "imported by the VMM")
    table.add_row("faults", count_text(seen.faults), "accesses of the guest that had to wait for a page")
    if seen.exit_faults:
        table.add_row(
            "  by exit", count_text(seen.exit_faults), "of a vCPU, forwarded by the VMM; others by userfaultfd"
        )
    if seen.shared_accesses:
        table.add_row("  on shared sides", count_text(seen.shared_accesses), "of private pages: they got zeroes")
    if not ended(found):
        table.add_row("  waiting now", count_text(seen.faults_waiting))
    table.add_row("neighbours fetched", count_text(seen.prefetch_issued), _prefetch(seen))
    table.add_row("came twice", count_text(seen.duplicate_pages), "by both lanes at once; the second is dropped")
    if seen.checksum_mismatches:
        damaged = Text(count_text(seen.checksum_mismatches), style="yellow")
        table.add_row("came damaged", damaged, "by their checksums, and were fetched again")
    table.add_row("throughput", throughput(found), "bytes of both lanes over the time to the last page")
    if seen.huge_bytes:
        table.add_row("mapped huge again", bytes_text(seen.huge_bytes), "by 2 MiB pages, after the last page")
    if seen.reconnects:
        table.add_row("reconnects", count_text(seen.reconnects), "lost connections that were opened again")
    return table


def throughput(found: pb.Migration) -> str:
    """Return the mean rate of both lanes, or a dash before the last page is in."""
    seconds = found.postcopy_duration.ToTimedelta().total_seconds()
    if seconds <= 0:
        return "-"
    return rate_text((found.progress.demand_bytes + found.progress.push_bytes) / seconds)


def limits(found: pb.Limits) -> Text:
    """Return limits in words."""
    if found.push_disabled:
        return Text("no push: pages come only when touched, and the migration cannot end")
    rate = rate_text(found.push_bytes_per_second) if found.push_bytes_per_second else "unlimited"
    window = bytes_text(found.push_window_bytes) if found.push_window_bytes else "by the pacer"
    objective = duration_text(found.fault_objective_us) if found.fault_objective_us else "the sidecar's default"
    weight = count_text(found.push_weight or DEFAULT_PUSH_WEIGHT)
    return Text(f"push rate {rate}, push window {window}, fault objective {objective}, push weight {weight}")


def policy(found: pb.Policy) -> Text:
    """Return a policy in words."""
    lost = f"lost for {count_text(found.loss_seconds)} s" if found.loss_seconds else "lost"
    then = _ON_LOSS.get(found.on_loss, f"on_loss {found.on_loss}")
    checksums = "every page carries a checksum" if found.checksums else "no checksums"
    return Text(f"source {lost}: {then}; {checksums}")


def _pairs() -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    return table


def _prefetch(seen: pb.Progress) -> str:
    return (
        f"{count_text(seen.prefetch_used)} known to be wanted, {count_text(seen.prefetch_late)} wanted before they came"
    )


def _duration(found: pb.Migration, field: str) -> str:
    if not found.HasField("downtime" if field == "downtime" else "postcopy_duration"):
        return "-"
    value = found.downtime if field == "downtime" else found.postcopy_duration
    return duration_text(value.ToTimedelta().total_seconds() * 1e6)
