"""The guests of a host: registered once, claimed by one migration at a time, and let go."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from stand_in_vmm import PAGES, StandInVmm

from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2
from pageferryd.control import registry as registry_module
from pageferryd.control.registry import GuestRegistry
from pageferryd.vmm.driver import Activity

GONE = FerryError(Reason.VMM_UNREACHABLE, "nobody answers")


class Drivers:
    """Makes a driver for each address; `vmms` has all that were made, `next` what the next one is."""

    def __init__(self) -> None:
        self.vmms: list[StandInVmm] = []
        self.next: StandInVmm | None = None
        self.registry = GuestRegistry({"stand-in": self._make, "other": self._make})

    def _make(self, address: str) -> StandInVmm:
        vmm, self.next = self.next or StandInVmm(), None
        self.vmms.append(vmm)
        return vmm


@pytest.fixture
def drivers() -> Iterator[Drivers]:
    one = Drivers()
    yield one
    for vmm in one.vmms:
        vmm.free()


async def refused(awaitable: object) -> Reason:
    with pytest.raises(FerryError) as raised:
        await awaitable  # type: ignore[misc]
    return raised.value.reason


async def test_a_guest_is_shown_as_its_vmm_describes_it(drivers: Drivers) -> None:
    guest = await drivers.registry.register("g", "stand-in", "/v")
    assert (guest.guest_id, guest.driver, guest.vmm_address) == ("g", "stand-in", "/v")
    assert guest.memory_bytes == PAGES * 4096
    assert guest.pid > 0
    assert guest.state == migration_pb2.GUEST_STATE_RUNNING
    assert await drivers.registry.list() == [guest]


async def test_the_same_again_is_harmless_and_makes_no_second_driver(drivers: Drivers) -> None:
    first = await drivers.registry.register("g", "stand-in", "/v")
    assert await drivers.registry.register("g", "stand-in", "/v") == first
    assert len(drivers.vmms) == 1


@pytest.mark.parametrize(("driver", "address"), [("stand-in", "/w"), ("other", "/v")])
async def test_another_vmm_under_a_known_id_is_refused(drivers: Drivers, driver: str, address: str) -> None:
    await drivers.registry.register("g", "stand-in", "/v")
    assert await refused(drivers.registry.register("g", driver, address)) is Reason.GUEST_EXISTS
    assert len(drivers.vmms) == 1


@pytest.mark.parametrize("guest_id", ["", "a b", "a/b", "ü", "x" * 129, "g\n"])
async def test_an_id_that_cannot_be_is_refused(drivers: Drivers, guest_id: str) -> None:
    assert await refused(drivers.registry.register(guest_id, "stand-in", "/v")) is Reason.INVALID_ARGUMENT


async def test_a_driver_that_is_not_known_is_refused_with_those_that_are(drivers: Drivers) -> None:
    with pytest.raises(FerryError, match="stand-in, other") as raised:
        await drivers.registry.register("g", "nothing", "/v")
    assert raised.value.reason is Reason.INVALID_ARGUMENT


async def test_a_vmm_that_does_not_answer_is_not_registered(drivers: Drivers) -> None:
    drivers.next = StandInVmm()
    drivers.next.failures["describe"] = GONE
    assert await refused(drivers.registry.register("g", "stand-in", "/v")) is Reason.VMM_UNREACHABLE
    assert drivers.vmms[0].closed
    assert await drivers.registry.list() == []
    # It may come later.
    await drivers.registry.register("g", "stand-in", "/v")


async def test_of_two_who_register_one_id_at_once_one_wins(drivers: Drivers) -> None:
    drivers.next = slow = StandInVmm()
    gate = slow.gate("describe")
    waiting = asyncio.create_task(refused(drivers.registry.register("g", "stand-in", "/v")))
    await gate.until_reached()
    await drivers.registry.register("g", "stand-in", "/w")
    gate.opened.set()
    assert await waiting is Reason.GUEST_EXISTS
    assert slow.closed
    assert drivers.registry.get("g").address == "/w"


async def test_no_more_are_registered_than_may_be(drivers: Drivers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MAX_GUESTS", 2)
    for guest_id in "ab":
        await drivers.registry.register(guest_id, "stand-in", f"/{guest_id}")
    with pytest.raises(FerryError, match="2 guests"):
        await drivers.registry.register("c", "stand-in", "/c")
    await drivers.registry.unregister("a")
    await drivers.registry.register("c", "stand-in", "/c")


async def test_a_guest_belongs_to_one_migration_at_a_time(drivers: Drivers) -> None:
    registry = drivers.registry
    await registry.register("g", "stand-in", "/v")
    guest = registry.claim("g", "m1")
    with pytest.raises(FerryError, match="m1") as busy:
        registry.claim("g", "m2")
    assert busy.value.reason is Reason.GUEST_BUSY
    assert await refused(registry.unregister("g")) is Reason.GUEST_BUSY
    (shown,) = await registry.list()
    assert shown.state == migration_pb2.GUEST_STATE_MIGRATING

    guest.migration_id = None
    assert registry.claim("g", "m2") is guest


async def test_what_is_not_registered_is_not_known(drivers: Drivers) -> None:
    for call in (lambda: drivers.registry.get("g"), lambda: drivers.registry.claim("g", "m")):
        with pytest.raises(FerryError) as unknown:
            call()
        assert unknown.value.reason is Reason.UNKNOWN_GUEST
    assert await refused(drivers.registry.unregister("g")) is Reason.UNKNOWN_GUEST


async def test_a_list_shows_every_guest_in_order_and_those_out_of_reach_without_a_state(drivers: Drivers) -> None:
    drivers.next = StandInVmm(Activity.INCOMING)
    await drivers.registry.register("c", "stand-in", "/c")
    await drivers.registry.register("a", "stand-in", "/a")
    await drivers.registry.register("b", "stand-in", "/b")
    drivers.vmms[2].failures["describe"] = GONE
    guests = await drivers.registry.list()
    assert [(guest.guest_id, guest.state) for guest in guests] == [
        ("a", migration_pb2.GUEST_STATE_RUNNING),
        ("b", migration_pb2.GUEST_STATE_UNSPECIFIED),
        ("c", migration_pb2.GUEST_STATE_INCOMING),
    ]


async def test_forgetting_an_old_guest_does_not_take_its_successors_place(drivers: Drivers) -> None:
    registry = drivers.registry
    await registry.register("g", "stand-in", "/v")
    old = registry.get("g")
    await registry.forget(old)
    await registry.register("g", "stand-in", "/v")
    await registry.forget(old)
    assert registry.get("g") is not old


# Guests that last


async def lasting(drivers: Drivers, guest_id: str = "g") -> migration_pb2.Guest:
    return await drivers.registry.register(guest_id, "stand-in", "/v", must_answer=False, lasting=True)


async def test_a_vmm_that_need_not_answer_is_not_asked_and_later_shown_with_the_reason(drivers: Drivers) -> None:
    drivers.next = StandInVmm()
    drivers.next.failures["describe"] = GONE
    assert (await lasting(drivers)).state == migration_pb2.GUEST_STATE_UNSPECIFIED
    assert drivers.vmms[0].calls == []

    (shown,) = await drivers.registry.list()
    assert (shown.guest_id, shown.driver, shown.vmm_address) == ("g", "stand-in", "/v")
    assert shown.state == migration_pb2.GUEST_STATE_UNSPECIFIED
    assert (shown.movable, list(shown.obstacles)) == (False, ["nobody answers"])

    drivers.vmms[0].failures.clear()
    (shown,) = await drivers.registry.list()
    assert shown.state == migration_pb2.GUEST_STATE_RUNNING
    assert shown.movable


async def test_the_same_again_is_harmless_for_a_lasting_guest_too(drivers: Drivers) -> None:
    await lasting(drivers)
    await drivers.registry.register("g", "stand-in", "/v")
    await drivers.registry.forget(drivers.registry.get("g"))
    assert drivers.registry.knows("g")


async def test_a_lasting_guest_whose_vmm_has_ended_waits_for_the_next_one(drivers: Drivers) -> None:
    await lasting(drivers)
    old = drivers.registry.claim("g", "m")
    drivers.next = StandInVmm(Activity.INCOMING)
    await drivers.registry.forget(old)

    # It is free, and what the migration still holds does not reach the next VMM.
    new = drivers.registry.claim("g", "n")
    assert new.driver is drivers.vmms[1]
    assert old.driver is drivers.vmms[0]
    assert drivers.vmms[0].closed
    assert not drivers.vmms[1].closed

    await drivers.registry.forget(old)
    assert drivers.registry.has(new)
    assert not drivers.vmms[1].closed


async def test_a_lasting_guest_is_forgotten_when_that_is_asked_for(drivers: Drivers) -> None:
    await lasting(drivers)
    await drivers.registry.unregister("g")
    assert not drivers.registry.knows("g")
    assert [vmm.closed for vmm in drivers.vmms] == [True]


async def test_lasting_guests_do_not_outlast_the_registry(drivers: Drivers) -> None:
    await lasting(drivers)
    await drivers.registry.close()
    assert await drivers.registry.list() == []
    assert [vmm.closed for vmm in drivers.vmms] == [True]


async def test_closed_it_lets_every_vmm_go_and_touches_none(drivers: Drivers) -> None:
    for guest_id in "ab":
        await drivers.registry.register(guest_id, "stand-in", f"/{guest_id}")
    await drivers.registry.close()
    assert all(vmm.closed and not vmm.killed for vmm in drivers.vmms)
    assert await drivers.registry.list() == []
