"""A sidecar that starts again goes on with the guests whose memory an earlier one was filling."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError
from pageferry.v1 import migration_pb2
from pageferryd.control.incoming import Incoming
from pageferryd.control.record import MigrationRecord
from pageferryd.vmm.driver import Activity

if TYPE_CHECKING:
    from pageferryd.control.book import MigrationBook
    from pageferryd.control.journal import Arriving
    from pageferryd.control.registry import Guest
    from pageferryd.control.surroundings import Surroundings

_log = structlog.get_logger(__name__)


async def recover(around: Surroundings, book: MigrationBook) -> None:
    """Go on with all that the journal names; what cannot go on is in the book as failed.

    VMMs that were only readied for a guest are ended: their memory was taken, and they can serve no other.
    """
    await asyncio.gather(
        *(_go_on(arriving, around, book) for arriving in around.journal.unfinished()),
        *(_give_up(arriving, around) for arriving in around.journal.never_owned()),
    )


async def _go_on(arriving: Arriving, around: Surroundings, book: MigrationBook) -> None:
    prepare = arriving.prepare
    record = MigrationRecord(
        migration_id=prepare.migration_id,
        request_id="",
        guest_id=prepare.guest_id,
        role=migration_pb2.ROLE_DESTINATION,
        source_name=prepare.source_name,
        destination_name=around.settings.host,
        destination_address="",
        limits=prepare.limits,
    )
    try:
        guest = await _claim(arriving, around)
    except FerryError as error:
        _log.error("migration_not_taken_up", migration=prepare.migration_id, detail=error.message)
        return
    incoming = Incoming(record, guest, around)
    book.add(incoming)
    await incoming.go_on(arriving)
    _log.info("migration_taken_up", migration=prepare.migration_id, guest=prepare.guest_id, state=record.state.name)


async def _give_up(arriving: Arriving, around: Surroundings) -> None:
    prepare = arriving.prepare
    try:
        guest = await _claim(arriving, around)
    except FerryError as error:
        _log.warning("vmm_not_killed", migration=prepare.migration_id, detail=error.message)
        return
    try:
        found = await guest.driver.describe()
        if found.pid == arriving.pid and found.activity is not Activity.RUNNING:
            await guest.driver.kill()
    except FerryError as error:
        _log.warning("vmm_not_killed", migration=prepare.migration_id, detail=error.message)
    guest.migration_id = None
    await around.guests.forget(guest)
    around.journal.ended(prepare.migration_id)
    _log.info("migration_given_up", migration=prepare.migration_id, guest=prepare.guest_id)


async def _claim(arriving: Arriving, around: Surroundings) -> Guest:
    prepare = arriving.prepare
    await around.guests.register(prepare.guest_id, prepare.driver, arriving.address, must_answer=False)
    return around.guests.claim(prepare.guest_id, prepare.migration_id)
