"""A sidecar that starts again goes on with the guests whose memory an earlier one was filling."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError
from pageferry.v1 import migration_pb2
from pageferryd.control.incoming import Incoming
from pageferryd.control.record import MigrationRecord

if TYPE_CHECKING:
    from pageferryd.control.book import MigrationBook
    from pageferryd.control.journal import Arriving
    from pageferryd.control.surroundings import Surroundings

_log = structlog.get_logger(__name__)


async def recover(around: Surroundings, book: MigrationBook) -> None:
    """Go on with all that the journal names; what cannot go on is in the book as failed."""
    await asyncio.gather(*(_go_on(arriving, around, book) for arriving in around.journal.unfinished()))


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
        if not around.guests.knows(prepare.guest_id):
            await around.guests.register(prepare.guest_id, prepare.driver, arriving.address, must_answer=False)
        guest = around.guests.claim(prepare.guest_id, prepare.migration_id)
    except FerryError as error:
        _log.error("migration_not_resumed", migration=prepare.migration_id, detail=error.message)
        return
    incoming = Incoming(record, guest, around)
    book.add(incoming)
    await incoming.go_on(arriving)
    _log.info("migration_taken_up", migration=prepare.migration_id, guest=prepare.guest_id, state=record.state.name)
