"""A sidecar that starts again goes on with the migrations that an earlier one had under way."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from typing import TYPE_CHECKING

import structlog

from pageferry.errors import FerryError
from pageferryd.control.departure import PageAddresses
from pageferryd.control.departures_journal import Step
from pageferryd.control.incoming import Incoming
from pageferryd.control.outgoing import Outgoing
from pageferryd.control.record import MIGRATION_ID, MigrationRecord
from pageferryd.vmm.driver import Activity

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from pageferryd.control.arrivals_journal import Arriving
    from pageferryd.control.book import MigrationBook
    from pageferryd.control.departures_journal import Leaving
    from pageferryd.control.registry import Guest
    from pageferryd.control.surroundings import Surroundings
    from pageferryd.source.page_service import PageService

_log = structlog.get_logger(__name__)

# Their destinations were told where pages are when these were prepared.
_NO_ADDRESSES = PageAddresses("")


async def recover_arrivals(around: Surroundings, book: MigrationBook) -> None:
    """Go on with all guests that were this host's; what cannot go on is in the book as failed.

    VMMs that were only readied for a guest are ended: their memory was taken, and they can serve no other.
    """
    arrivals = around.journal.arrivals
    owned = list(arrivals.owned())
    sweep_directories(around.settings.runtime_dir, {arriving.prepare.migration_id for arriving in owned})
    await asyncio.gather(
        *(_go_on(arriving, around, book) for arriving in owned),
        *(_give_up(arriving, around) for arriving in (*arrivals.readied(), *arrivals.never_ran_here())),
    )


async def recover_departures(around: Surroundings, book: MigrationBook, pages: PageService) -> None:
    """Go on with all guests that were leaving: those not given away run here again, others are served until whole.

    Returns once they are served: to whoever asked before that they would be unknown.
    """
    unfinished = list(around.journal.departures.unfinished())
    await asyncio.gather(*(_see_off(leaving, step, around, book, pages) for leaving, step in unfinished))


def sweep_directories(runtime_dir: Path, needed: AbstractSet[str]) -> None:
    """Remove the directories of VMMs of migrations that were under way, but for those that are gone on with."""
    with contextlib.suppress(FileNotFoundError):
        for path in list(runtime_dir.iterdir()):
            if MIGRATION_ID.fullmatch(path.name) and path.name not in needed and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


async def _go_on(arriving: Arriving, around: Surroundings, book: MigrationBook) -> None:
    prepare = arriving.prepare
    record = MigrationRecord.of_arriving(prepare, around.settings.host)
    try:
        guest = await _claim(around, prepare.migration_id, prepare.guest_id, prepare.driver, arriving.address)
    except FerryError as error:
        _log.error("migration_not_taken_up", migration=prepare.migration_id, detail=error.message)
        return
    incoming = Incoming(record, guest, around)
    book.add(incoming)
    await incoming.go_on(arriving)
    _log.info("migration_taken_up", migration=prepare.migration_id, guest=prepare.guest_id, state=record.state.name)


async def _give_up(arriving: Arriving, around: Surroundings) -> None:
    prepare = arriving.prepare
    # Before anything else: its source is told so from now on, and lets the guest go on there.
    around.journal.arrivals.never_ran(prepare.migration_id)
    if not arriving.alive:
        return
    try:
        guest = await _claim(around, prepare.migration_id, prepare.guest_id, prepare.driver, arriving.address)
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
    _log.info("migration_given_up", migration=prepare.migration_id, guest=prepare.guest_id)


async def _see_off(leaving: Leaving, step: Step, around: Surroundings, book: MigrationBook, pages: PageService) -> None:
    migration = leaving.migration
    try:
        guest = await _claim(around, migration.migration_id, migration.guest_id, leaving.driver, leaving.address)
    except FerryError as error:
        _log.error("migration_not_taken_up", migration=migration.migration_id, detail=error.message)
        return
    record = MigrationRecord.of_leaving(migration)
    outgoing = Outgoing(record, guest, around, pages, _NO_ADDRESSES, (leaving, step))
    book.add(outgoing)
    if step is Step.GIVEN:
        await outgoing.begun.wait()
    _log.info("migration_taken_up", migration=record.migration_id, guest=record.guest_id, step=step.name)


async def _claim(around: Surroundings, migration_id: str, guest_id: str, driver: str, address: str) -> Guest:
    await around.guests.register(guest_id, driver, address, must_answer=False)
    return around.guests.claim(guest_id, migration_id)
