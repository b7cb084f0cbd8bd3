"""A guest crosses between two Cloud Hypervisors: stand-ins that keep to its protocol, and some that do not."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from crossing import COMPLETED, FAILED, PAUSED, POSTCOPY, Crossing, Stage, until
from sidecar_process import Sidecar

from cloud_hypervisor_child import CloudHypervisor
from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]

DRIVER = "cloud-hypervisor"

Cross = Callable[..., Awaitable[Crossing]]


@pytest.fixture
async def vmm(short_path: Path) -> AsyncIterator[Callable[..., Awaitable[CloudHypervisor]]]:
    """Start VMMs that end with the test."""
    made: list[CloudHypervisor] = []
    numbers = itertools.count()

    async def start(*options: str) -> CloudHypervisor:
        made.append(started := await CloudHypervisor.start(short_path / f"ch{next(numbers)}.sock", *options))
        return started

    yield start
    for one in made:
        await one.close()


@pytest.fixture
async def cross(
    vmm: Callable[..., Awaitable[CloudHypervisor]], stage: Stage, alpha: Sidecar, beta: Sidecar
) -> AsyncIterator[Cross]:
    """Start and register a guest at one sidecar, and a VMM that waits for it at the other."""
    registered = []

    async def made(*options: str, waiting_options: tuple[str, ...] = ()) -> Crossing:
        guest_id = f"guest-{uuid.uuid4().hex[:8]}"
        running, waiting = await asyncio.gather(vmm(*options), vmm("--incoming", *waiting_options))
        clients = await stage.client(alpha), await stage.client(beta)
        for client, one in zip(clients, (running, waiting), strict=True):
            await client.register_guest(guest_id, one.socket_path, DRIVER)
            registered.append((client, guest_id))
        return Crossing(guest_id, alpha, beta, *clients, running, waiting)  # type: ignore[arg-type]

    yield made
    for client, guest_id in registered:
        try:
            await client.unregister_guest(guest_id)
        except FerryError as error:
            assert error.reason is Reason.UNKNOWN_GUEST  # noqa: PT017 - it has left


@pytest.mark.parametrize("options", [(), ("--answers-late",)], ids=["", "late"])
async def test_a_guest_crosses_with_every_byte_and_needs_no_sidecar(
    cross: Cross, alpha: Sidecar, beta: Sidecar, options: tuple[str, ...]
) -> None:
    crossing = await cross("--memory", "32", *options)
    await crossing.guest.runs_on()
    before = await crossing.guest.steps()
    fds = alpha.fds, beta.fds

    await crossing.start()
    left, came = await crossing.arrives()

    assert crossing.waiting is not None
    assert await crossing.waiting.steps() > before
    pages = (32 << 20) // 4096
    for shown in (left, came):
        assert shown.progress.pages_total == shown.progress.pages_present == pages
        assert shown.progress.pages_poisoned == shown.progress.faults_waiting == 0
        assert not shown.HasField("error")
    assert came.progress.faults > 0
    assert left.downtime.ToTimedelta().total_seconds() > 0
    assert await crossing.guest.exit_code() == 0
    assert crossing.guest_id not in [guest.guest_id for guest in await crossing.at_source.list_guests()]

    async def nothing_held() -> bool:
        # The source's driver held the process of the VMM that has gone.
        return alpha.fds["/memfd:ch_ram (deleted)"] == 0 and beta.fds <= fds[1]

    await until(nothing_held, f"the hosts hold no more than {fds}")
    assert alpha.left_behind == beta.left_behind == []


async def test_faults_are_counted_at_their_door(cross: Cross, beta: Sidecar) -> None:
    crossing = await cross("--memory", "8")
    await crossing.start()
    await crossing.arrives()
    assert (await beta.metrics())("faults_total", door="offload") > 0


async def test_a_guest_goes_on_to_a_third_vmm(
    cross: Cross, stage: Stage, vmm: Callable[..., Awaitable[CloudHypervisor]]
) -> None:
    crossing = await cross("--memory", "8")
    await crossing.start()
    await crossing.arrives()

    third = await vmm("--incoming")
    await crossing.at_source.register_guest(crossing.guest_id, third.socket_path, DRIVER)
    back = Crossing(
        crossing.guest_id,
        crossing.destination,
        crossing.source,
        crossing.at_destination,
        crossing.at_source,
        crossing.waiting,  # type: ignore[arg-type]
        third,  # type: ignore[arg-type]
    )
    await back.start()
    await back.arrives()


async def test_the_memory_is_served_on_when_the_source_vmm_is_killed(cross: Cross) -> None:
    crossing = await cross("--memory", "16")
    await crossing.guest.runs_on()
    await crossing.start(push_bytes_per_second=1 << 20)
    await crossing.both_become(POSTCOPY)
    shown = await crossing.seen(crossing.at_destination)
    assert shown is not None
    assert shown.progress.pages_present < shown.progress.pages_total
    await crossing.guest.kill()  # type: ignore[attr-defined]

    await crossing.at_source.set_limits(crossing.migration_id, pb.Limits())
    left, _ = await crossing.both_become(COMPLETED)
    assert crossing.waiting is not None
    await crossing.waiting.runs_on()
    await crossing.waiting.is_intact()
    assert left.progress.pages_present == left.progress.pages_total


@pytest.mark.parametrize(
    ("behave", "reasons"),
    [
        ("receive-500", (Reason.VMM_FAILED,)),
        ("refuses-config", (Reason.VMM_FAILED,)),
        ("refuses-state", (Reason.VMM_FAILED,)),
        ("ignores-postcopy", (Reason.VMM_FAILED,)),
        ("dies-at-slot", (Reason.VMM_FAILED, Reason.VMM_UNREACHABLE, Reason.VMM_GONE)),
        ("dies-at-state", (Reason.VMM_FAILED, Reason.VMM_UNREACHABLE, Reason.VMM_GONE)),
        ("asks-outside", (Reason.PAGE_OUT_OF_RANGE,)),
        ("asks-across", (Reason.PAGE_OUT_OF_RANGE,)),
        ("asks-crooked", (Reason.PAGE_OUT_OF_RANGE,)),
        ("asks-nothing", (Reason.PAGE_OUT_OF_RANGE,)),
        ("asks-at-length", (Reason.HANDOFF_MALFORMED,)),
        ("asks-something-else", (Reason.HANDOFF_MALFORMED,)),
        ("hangs-up", (Reason.VMM_FAILED,)),
    ],
)
async def test_a_destination_that_does_not_take_the_guest_leaves_it_at_its_source(
    cross: Cross, behave: str, reasons: tuple[Reason, ...]
) -> None:
    crossing = await cross("--memory", "4", waiting_options=("--behave", behave))
    await crossing.guest.runs_on()
    await crossing.start()
    # Where the pager gave it up, the call that the source waits for may only say that it was.
    await crossing.fails(*reasons, Reason.VMM_FAILED)
    await crossing.guest.is_intact()
    # It cannot be used again, and is not left over.
    assert crossing.waiting is not None
    await crossing.waiting.exit_code()


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        ("no-regions", Reason.LAYOUT_INVALID),
        ("not-a-memfd", Reason.VMM_FAILED),
        ("wrong-order", Reason.VMM_FAILED),
        ("huge-config", Reason.VMM_FAILED),
        ("send-500", Reason.VMM_FAILED),
        ("pause-500", Reason.VMM_FAILED),
    ],
)
async def test_a_source_that_does_it_wrongly_keeps_its_guest(cross: Cross, behave: str, reason: Reason) -> None:
    crossing = await cross("--memory", "4", "--behave", behave)
    await crossing.guest.runs_on()
    await crossing.start()
    await crossing.fails(reason)
    await crossing.guest.is_intact()


async def test_unshared_memory_is_refused_before_the_guest_stops(cross: Cross) -> None:
    crossing = await cross("--memory", "4", "--unshared")
    await crossing.start()
    failed = await crossing.becomes(crossing.at_source, FAILED)
    assert failed.error.reason == Reason.GUEST_NOT_MOVABLE
    assert "shared=on" in failed.error.message
    await crossing.guest.runs_on()


async def test_a_vmm_that_dies_at_its_destination_takes_the_guest_with_it_and_it_runs_nowhere_else(
    cross: Cross,
) -> None:
    crossing = await cross("--memory", "16")
    await crossing.start(push_bytes_per_second=1 << 20)
    await crossing.both_become(POSTCOPY)
    assert crossing.waiting is not None
    await crossing.waiting.kill()  # type: ignore[attr-defined]
    failed = await crossing.becomes(crossing.at_destination, FAILED)
    assert failed.error.reason == Reason.VMM_GONE
    await crossing.becomes(crossing.at_source, FAILED, PAUSED)
    assert (await crossing.guest.status())["state"] == "paused"
