"""What each end of a migration knows of the guest's owner, and an operator's decision where they cannot settle it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.control.incoming import Incoming
from pageferryd.control.peer import Destination
from pageferryd.core.handover import SourceNote, Told, may_give_up_at_source, may_run_at_source

if TYPE_CHECKING:
    from pageferryd.control.book import Mover
    from pageferryd.control.outgoing import Outgoing
    from pageferryd.control.surroundings import Surroundings

_VMM_SECONDS = 5.0


async def view_here(mover: Mover, host: str) -> migration_pb2.HandoverView:
    """Tell what this end knows."""
    record = mover.record
    view = migration_pb2.HandoverView(
        role=record.role,
        host=host,
        reachable=True,
        known=True,
        state=migration_pb2.MigrationState.ValueType(record.state.value),
        handed_over=mover.committed,
        detail=record.error.message if record.error is not None else "",
    )
    try:
        async with asyncio.timeout(_VMM_SECONDS):
            view.vmm_activity = (await mover.guest.driver.describe()).activity.value
    except (FerryError, TimeoutError):
        # It has ended, or does not answer: it is shown as neither.
        pass
    if isinstance(mover, Incoming) and mover.arrival is not None:
        view.pages_missing = mover.arrival.session.pager.map.missing
    return view


async def view_there(mover: Mover, around: Surroundings) -> migration_pb2.HandoverView:
    """Ask the other end; one that cannot be asked says why."""
    record = mover.record
    if isinstance(mover, Incoming):
        view = migration_pb2.HandoverView(role=migration_pb2.ROLE_SOURCE, host=record.source_name)
        address, name = mover.source_address, record.source_name
    else:
        view = migration_pb2.HandoverView(role=migration_pb2.ROLE_DESTINATION, host=record.destination_name)
        address, name = record.destination_address, record.destination_name
    other = Destination(address, name, around.tls, record.migration_id)
    try:
        return await other.describe_handover()
    except FerryError as error:
        view.detail = error.message
        if error.reason is Reason.UNKNOWN_MIGRATION:
            view.reachable = True
        return view
    finally:
        await other.close()


async def resolve(
    mover: Mover, decision: migration_pb2.Decision.ValueType, around: Surroundings, *, peer_fenced: bool
) -> list[migration_pb2.HandoverView]:
    """Carry a decision out; return what both ends know then, this one first.

    FerryError: ILLEGAL_STATE where there is nothing to decide, IN_DOUBT where the other end may still have the guest.
    """
    host = around.settings.host
    if decision == migration_pb2.DECISION_RUN_AT_SOURCE:
        await _run_at_source(mover, await view_there(mover, around), peer_fenced=peer_fenced)
    elif decision == migration_pb2.DECISION_GIVE_UP:
        await _give_up(mover, await view_there(mover, around), peer_fenced=peer_fenced)
    elif decision != migration_pb2.DECISION_UNSPECIFIED:
        raise FerryError(Reason.INVALID_ARGUMENT, f"there is no decision {decision}")
    return [await view_here(mover, host), await view_there(mover, around)]


async def _run_at_source(mover: Mover, there: migration_pb2.HandoverView, *, peer_fenced: bool) -> None:
    if isinstance(mover, Incoming):
        raise FerryError(
            Reason.INVALID_ARGUMENT,
            f"migration {mover.record.migration_id} comes to this host: to have the guest run at its source, decide "
            "it there, and give it up here",
        )
    _refuse(mover, may_run_at_source(_note(mover), _told(there), peer_fenced=peer_fenced))
    await mover.run_here(FerryError(Reason.GIVEN_UP, "an operator decided that the guest runs on here, as it left"))


async def _give_up(mover: Mover, there: migration_pb2.HandoverView, *, peer_fenced: bool) -> None:
    if isinstance(mover, Incoming):
        await mover.give_up_owned("an operator decided to give the guest up here")
        return
    _refuse(mover, may_give_up_at_source(_note(mover), _told(there), peer_fenced=peer_fenced))
    await mover.give_up(FerryError(Reason.GIVEN_UP, "an operator decided to give the guest up here"))


def _refuse(mover: Outgoing, refusal: str | None) -> None:
    if refusal is not None:
        raise FerryError(Reason.IN_DOUBT, f"migration {mover.record.migration_id}: {refusal}")


def _note(mover: Outgoing) -> SourceNote:
    if not mover.committed:
        return SourceNote.NONE
    return SourceNote.ARRIVED if mover.has_arrived else SourceNote.GIVEN


def _told(view: migration_pb2.HandoverView) -> Told:
    """Return what a destination has said of a guest."""
    if not view.reachable:
        return Told.NO_ANSWER
    if not view.known:
        return Told.UNKNOWN
    if view.handed_over:
        return Told.WHOLE if view.state == migration_pb2.MIGRATION_STATE_COMPLETED else Told.OWNED
    return Told.NEVER_RAN if view.state == migration_pb2.MIGRATION_STATE_FAILED else Told.READY
