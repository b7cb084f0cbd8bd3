"""What both ends say of a guest's owner, and what can be decided about it. Pure functions.

The sidecar judges a decision by itself; what is said here only saves an operator from asking in vain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pageferry.cli.progress import PAGE_BYTES, state_text
from pageferry.cli.units import bytes_text, count_text
from pageferry.client import FINAL_STATES
from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

RUN_AT_SOURCE: Final = "--run-at-source"
GIVE_UP: Final = "--give-up"

_POSSIBLE: Final = "possible"
_REFUSED: Final = "refused now"
_FENCED: Final = "only with --peer-fenced"
_VERDICT_COLOURS: Final = {_POSSIBLE: "green", _REFUSED: "red", _FENCED: "yellow"}

_ROLES: Final = {
    pb.ROLE_SOURCE: "source: the guest leaves it",
    pb.ROLE_DESTINATION: "destination: the guest comes to it",
}
_RECORDS: Final = {
    (pb.ROLE_SOURCE, True): "handed over: it may have run at the destination",
    (pb.ROLE_SOURCE, False): "no handover on record",
    (pb.ROLE_DESTINATION, True): "taken over: the guest is its own",
    (pb.ROLE_DESTINATION, False): "no takeover on record: the guest is not its own",
}
_ACTIVITIES: Final = {
    "running": "runs the guest",
    "paused": "has the guest, which stands still",
    "incoming": "waits for a guest to come",
    "": "does not answer",
}


class Ends(NamedTuple):
    """Both ends of a migration: that of the sidecar that was asked, and the other."""

    here: pb.HandoverView
    there: pb.HandoverView

    @property
    def source(self) -> pb.HandoverView:
        """The end that the guest leaves."""
        return self.here if self.here.role == pb.ROLE_SOURCE else self.there

    @property
    def destination(self) -> pb.HandoverView:
        """The end that the guest comes to."""
        return self.there if self.here.role == pb.ROLE_SOURCE else self.here


class Choice(NamedTuple):
    """A decision, whether it can be had now, and why."""

    option: str
    verdict: str
    why: str


def ends_of(views: Sequence[pb.HandoverView]) -> Ends:
    """Return the two ends that a sidecar answered with. Raises FerryError where they are not two."""
    if len(views) != 2 or {view.role for view in views} != {pb.ROLE_SOURCE, pb.ROLE_DESTINATION}:
        raise FerryError(
            Reason.PROTOCOL_MISMATCH,
            f"the sidecar tells of {len(views)} ends, which are not one source and one destination; is it a current "
            "pageferryd?",
        )
    return Ends(views[0], views[1])


def both(ends: Ends) -> RenderableType:
    """Return what both ends know as a table, one column an end."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column(style="bold")
    table.add_column("THIS END", overflow="fold", max_width=52)
    table.add_column("OTHER END", overflow="fold", max_width=52)
    table.add_row("role", *(Text(_ROLES.get(end.role, "?")) for end in ends))
    table.add_row("host", *(Text(end.host or "?") for end in ends))
    table.add_row("state", *(_state(end) for end in ends))
    for name, told in (("record", _record), ("its VMM", _vmm), ("lacks", _missing)):
        table.add_row(name, *(told(end) if end.reachable and end.known else Text("-", style="dim") for end in ends))
    table.add_row("detail", *(Text(end.detail or "-") for end in ends))
    if all(end.known and end.vmm_activity == "running" for end in ends):
        warning = (
            "BOTH HOSTS SAY THAT THEY RUN THE GUEST. Stop one of the two VMMs at once, then find out which is right."
        )
        return Group(table, Text(), Text(warning, style="bold red"))
    return table


def _state(end: pb.HandoverView) -> Text:
    if not end.reachable:
        return Text("DOES NOT ANSWER", style="yellow")
    if not end.known:
        return Text("knows nothing of this migration", style="yellow")
    return state_text(end.state)


def _record(end: pb.HandoverView) -> Text:
    return Text(_RECORDS.get((end.role, end.handed_over), "?"))


def _vmm(end: pb.HandoverView) -> Text:
    return Text(_ACTIVITIES.get(end.vmm_activity, end.vmm_activity))


def _missing(end: pb.HandoverView) -> Text:
    if end.role == pb.ROLE_SOURCE:
        return Text("-", style="dim")
    if not end.pages_missing:
        return Text("no page")
    return Text(f"{count_text(end.pages_missing)} pages, {bytes_text(end.pages_missing * PAGE_BYTES)}")


def options(ends: Ends, migration_id: str) -> RenderableType:
    """Return what can be decided at this end, each decision by its option."""
    possible = choices(ends)
    if not possible:
        return Text(nothing_to_decide(ends.here, migration_id))
    table = Table(title="what can be decided here", title_justify="left", title_style="bold", box=None)
    table.padding = (0, 3, 0, 0)
    table.show_header = False
    for _ in Choice._fields:
        table.add_column(overflow="fold")
    for choice in possible:
        table.add_row(choice.option, Text(choice.verdict, style=_VERDICT_COLOURS[choice.verdict]), Text(choice.why))
    return Group(table, Text(f"decide: pageferry resolve {migration_id} OPTION", style="dim"))


def choices(ends: Ends) -> list[Choice]:
    """Return the decisions that can come into question at this end; none where its migration needs no decision."""
    here, there = ends
    if not _open(here):
        return []
    if here.role == pb.ROLE_DESTINATION:
        return [
            Choice(RUN_AT_SOURCE, _REFUSED, f"{_name(there)} decides this, once the guest is given up here"),
            _give_up_at_destination(here),
        ]
    return [_run_at_source(there), _give_up_at_source(there)] if here.handed_over else []


def _open(here: pb.HandoverView) -> bool:
    """Say whether there is anything left at this end: a migration that failed may have left a guest standing still."""
    if here.state == pb.MIGRATION_STATE_FAILED:
        return here.known and here.handed_over
    return here.known and here.state not in FINAL_STATES


def _give_up_at_destination(here: pb.HandoverView) -> Choice:
    if here.state not in {pb.MIGRATION_STATE_POSTCOPY_PAUSED, pb.MIGRATION_STATE_FAILED}:
        return Choice(
            GIVE_UP, _REFUSED, "the guest does not wait for a source that is gone, nor has its migration failed"
        )
    return Choice(GIVE_UP, _POSSIBLE, "its VMM here is killed, and what it did here is lost")


def nothing_to_decide(here: pb.HandoverView, migration_id: str) -> str:
    """Return why this end has no decision to make, and what to do instead."""
    if not here.known:
        return "nothing can be decided here: this sidecar knows nothing of the migration"
    if not _open(here):
        return "nothing is left to decide: the migration has ended at this end"
    return f"nothing has to be decided: the guest was not handed over; take it back: pageferry cancel {migration_id}"


def _run_at_source(there: pb.HandoverView) -> Choice:
    if not there.reachable:
        why = f"{_name(there)} cannot be asked: first make sure that the guest cannot run there any more"
        return Choice(RUN_AT_SOURCE, _FENCED, why)
    if not there.known:
        why = f"{_name(there)} cannot say: first make sure that no VMM runs the guest there"
        return Choice(RUN_AT_SOURCE, _FENCED, why)
    if there.handed_over:
        return Choice(RUN_AT_SOURCE, _REFUSED, f"the guest is {_name(there)}'s own: give it up there first")
    if there.state in {pb.MIGRATION_STATE_FAILED, pb.MIGRATION_STATE_CANCELLED}:
        return Choice(RUN_AT_SOURCE, _POSSIBLE, f"{_name(there)} has given it up; it goes on as at the handover")
    return Choice(
        RUN_AT_SOURCE, _REFUSED, f"{_name(there)} answers and has not given the guest up: it would have to, first"
    )


def _give_up_at_source(there: pb.HandoverView) -> Choice:
    if not (there.reachable and there.known):
        return Choice(GIVE_UP, _FENCED, f"what {_name(there)} lacks of the guest's memory is lost with it")
    if not there.handed_over:
        return Choice(GIVE_UP, _FENCED, f"the guest is not {_name(there)}'s own, and would be lost altogether")
    if there.state != pb.MIGRATION_STATE_COMPLETED and not there.pages_missing:
        return Choice(GIVE_UP, _FENCED, f"{_name(there)} has not said yet that it needs nothing more from here")
    if there.pages_missing:
        missing = _missing(there).plain
        return Choice(GIVE_UP, _FENCED, f"{_name(there)} lacks {missing}, which would be lost")
    return Choice(GIVE_UP, _POSSIBLE, f"{_name(there)} has the whole guest")


def consequences(decision: pb.Decision.ValueType, ends: Ends, *, peer_fenced: bool) -> list[str]:
    """Return what a decision means, a sentence each, for whoever has to confirm it."""
    here, there = ends
    if decision == pb.DECISION_RUN_AT_SOURCE:
        said = [
            f"The guest goes on at {_name(here)}, as it was at the handover.",
            f"What it did at {_name(there)} since then is lost, and it must never run there again.",
        ]
        promise = (
            f"You say that the guest cannot run at {_name(there)} any more. If it can, two of it will run, and destroy "
            "what they share: disks, addresses."
        )
    elif here.role == pb.ROLE_SOURCE:
        said = [
            f"The guest's VMM at {_name(here)} is killed, and its memory there is gone for good.",
            f"Pages that {_name(there)} lacks cannot be had any more.",
        ]
        promise = f"You say that {_name(there)} cannot run the guest, or needs nothing of it from here any more."
    else:
        said = [
            f"The guest's VMM at {_name(here)} is killed, and it never runs there again. What it did there is lost."
        ]
        promise = f"You say that you have made sure of {_name(there)}."
    return [*said, promise] if peer_fenced else said


def done(decision: pb.Decision.ValueType, ends: Ends) -> str:
    """Return what has happened once the decision was carried out."""
    if decision == pb.DECISION_RUN_AT_SOURCE:
        return f"decided: the guest goes on at {_name(ends.here)}"
    return f"decided: the guest is given up at {_name(ends.here)}"


def _name(end: pb.HandoverView) -> str:
    return end.host or ("the source" if end.role == pb.ROLE_SOURCE else "the destination")
