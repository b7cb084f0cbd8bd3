"""The guests of this host: those that run and can be moved, and VMMs that wait for one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.config import GUEST_ID
from pageferryd.control.fitting import memory_bytes
from pageferryd.vmm.driver import Activity, Description, VmmDriver

MAX_GUESTS = 4096

DriverFactory = Callable[[str], VmmDriver]


@dataclass(slots=True)
class Guest:
    """A registered guest, its VMM, and the migration that has it, if any.

    A `lasting` one stays registered when its VMM has ended: another one may come up at the same address.
    """

    guest_id: str
    driver_name: str
    address: str
    driver: VmmDriver
    migration_id: str | None = None
    lasting: bool = False


class GuestRegistry:
    """Guests by id. `drivers` makes a driver of each kind from a VMM's address."""

    def __init__(self, drivers: Mapping[str, DriverFactory]) -> None:
        self._drivers = drivers
        self._guests: dict[str, Guest] = {}

    async def register(
        self, guest_id: str, driver_name: str, address: str, *, must_answer: bool = True, lasting: bool = False
    ) -> migration_pb2.Guest:
        """Register a guest; the same again is harmless. A VMM that need not answer is not asked: it shows no state.

        FerryError: INVALID_ARGUMENT, GUEST_EXISTS, TOO_MANY_MIGRATIONS, or what the VMM says.
        """
        if not GUEST_ID.fullmatch(guest_id):
            raise FerryError(
                Reason.INVALID_ARGUMENT, f"{guest_id!r} is no guest id: use 1 to 128 letters, digits, '.', '_' or '-'"
            )
        factory = self._factory(driver_name)
        known = self._guests.get(guest_id)
        if known is not None:
            if (known.driver_name, known.address) != (driver_name, address):
                raise FerryError(
                    Reason.GUEST_EXISTS,
                    f"guest {guest_id} is registered with {known.address}: unregister it first, or use another id",
                )
            return await self.look(known)
        if len(self._guests) >= MAX_GUESTS:
            raise FerryError(Reason.TOO_MANY_MIGRATIONS, f"{MAX_GUESTS} guests are registered: unregister some")
        guest = Guest(guest_id, driver_name, address, factory(address), lasting=lasting)
        if must_answer:
            return await self._add(guest)
        self._guests[guest_id] = guest
        return _plain(guest)

    def _factory(self, driver_name: str) -> DriverFactory:
        factory = self._drivers.get(driver_name)
        if factory is None:
            raise FerryError(
                Reason.INVALID_ARGUMENT, f"there is no driver {driver_name!r}: use one of {', '.join(self._drivers)}"
            )
        return factory

    async def _add(self, guest: Guest) -> migration_pb2.Guest:
        try:
            looked = await self.look(guest)
        except BaseException:
            await guest.driver.close()
            raise
        if guest.guest_id in self._guests:
            await guest.driver.close()
            raise FerryError(Reason.GUEST_EXISTS, f"guest {guest.guest_id} was registered by somebody else meanwhile")
        self._guests[guest.guest_id] = guest
        return looked

    def get(self, guest_id: str) -> Guest:
        """Return a guest, or raise FerryError(UNKNOWN_GUEST)."""
        guest = self._guests.get(guest_id)
        if guest is None:
            raise FerryError(Reason.UNKNOWN_GUEST, f"no guest {guest_id!r} is registered here: register it first")
        return guest

    def claim(self, guest_id: str, migration_id: str) -> Guest:
        """Give the guest to a migration, or raise FerryError(GUEST_BUSY)."""
        guest = self.get(guest_id)
        if guest.migration_id is not None:
            raise FerryError(
                Reason.GUEST_BUSY, f"guest {guest_id} is in migration {guest.migration_id}: wait for it, or cancel it"
            )
        guest.migration_id = migration_id
        return guest

    async def unregister(self, guest_id: str) -> None:
        """Forget a guest that no migration has."""
        guest = self.get(guest_id)
        if guest.migration_id is not None:
            raise FerryError(Reason.GUEST_BUSY, f"guest {guest_id} is in migration {guest.migration_id}")
        await self._remove(guest)

    async def forget(self, guest: Guest) -> None:
        """Forget a guest whose VMM has ended; a lasting one begins anew, free, for the next VMM at its address.

        The migration that ended keeps `guest` itself, whose driver must not reach that next VMM.
        """
        if guest.lasting and self.has(guest):
            driver = self._factory(guest.driver_name)(guest.address)
            self._guests[guest.guest_id] = replace(guest, driver=driver, migration_id=None)
        await self._remove(guest)

    async def _remove(self, guest: Guest) -> None:
        if self.has(guest):
            del self._guests[guest.guest_id]
        await guest.driver.close()

    def has(self, guest: Guest) -> bool:
        """Say whether this very guest is registered, and not another of its id."""
        return self._guests.get(guest.guest_id) is guest

    def knows(self, guest_id: str) -> bool:
        """Say whether a guest of that id is registered."""
        return guest_id in self._guests

    async def list(self) -> list[migration_pb2.Guest]:
        """Return all guests by id; one whose VMM does not answer shows without a state."""
        return await asyncio.gather(*(self._look_or_plain(guest) for _, guest in sorted(self._guests.items())))

    async def _look_or_plain(self, guest: Guest) -> migration_pb2.Guest:
        try:
            return await self.look(guest)
        except FerryError as error:
            message = _plain(guest)
            message.obstacles.append(error.message)
            return message

    async def look(self, guest: Guest) -> migration_pb2.Guest:
        """Ask the VMM, and return the guest as it is."""
        return _described(guest, await guest.driver.describe())

    async def close(self) -> None:
        """Let all VMMs' connections go."""
        for guest in list(self._guests.values()):
            await self._remove(guest)


def _plain(guest: Guest) -> migration_pb2.Guest:
    return migration_pb2.Guest(guest_id=guest.guest_id, driver=guest.driver_name, vmm_address=guest.address)


def _described(guest: Guest, description: Description) -> migration_pb2.Guest:
    message = _plain(guest)
    message.memory_bytes = memory_bytes(description)
    message.pid = description.pid
    if guest.migration_id is not None:
        message.state = migration_pb2.GUEST_STATE_MIGRATING
        message.obstacles.append(f"it is in migration {guest.migration_id}")
    elif description.activity is Activity.INCOMING:
        message.state = migration_pb2.GUEST_STATE_INCOMING
        message.obstacles.append("its VMM waits for the guest to come")
    elif description.activity is Activity.PAUSED:
        message.state = migration_pb2.GUEST_STATE_PAUSED
        message.obstacles.append("it is paused: only a running guest can be moved")
    else:
        message.state = migration_pb2.GUEST_STATE_RUNNING
    message.obstacles.extend(description.obstacles)
    message.movable = not message.obstacles
    return message
