"""The VmmService through a real Unix socket: what it translates, what it refuses, and how it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from recording_vmm import RecordingVmm

from pageferry.channel import open_channel
from pageferry.errors import FerryError, Reason, from_rpc
from pageferry.v1 import memory_pb2, vmm_pb2, vmm_pb2_grpc
from pageferry.vmm import (
    FaultEndpoint,
    FileMemory,
    MemfdMemory,
    PageBundle,
    PrivatePages,
    ProcessMemory,
    Region,
    Vmm,
    VmmServer,
    VmmState,
)
from pageferry.vmm.servicer import MAX_STATE_BYTES

# Not a value that from_rpc gives for an ErrorInfo of these tests: it would show that none was sent.
NO_INFO = Reason.INTERNAL


class Client:
    """One method a call of the service."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = vmm_pb2_grpc.VmmServiceStub(channel)

    async def describe(self) -> vmm_pb2.DescribeMemoryResponse:
        return await self._stub.DescribeMemory(vmm_pb2.DescribeMemoryRequest())

    async def attach(self, path: str = "/run/pager.sock") -> None:
        await self._stub.AttachPager(vmm_pb2.AttachPagerRequest(socket_path=path))

    async def attach_with_faults(self, path: str, token: bytes) -> None:
        await self._stub.AttachPager(
            vmm_pb2.AttachPagerRequest(socket_path="/run/pager.sock", fault_socket_path=path, fault_token=token)
        )

    async def list_private(self) -> vmm_pb2.ListPrivatePagesResponse:
        return await self._stub.ListPrivatePages(vmm_pb2.ListPrivatePagesRequest())

    async def export(self, *addresses: int) -> vmm_pb2.ExportGuestPagesResponse:
        return await self._stub.ExportGuestPages(vmm_pb2.ExportGuestPagesRequest(guest_addresses=addresses))

    async def pause(self) -> None:
        await self._stub.Pause(vmm_pb2.PauseRequest())

    async def save(self) -> bytes:
        return (await self._stub.SaveState(vmm_pb2.SaveStateRequest())).state

    async def load(self, state: bytes = b"state") -> None:
        await self._stub.LoadState(vmm_pb2.LoadStateRequest(state=state))

    async def resume(self) -> None:
        await self._stub.Resume(vmm_pb2.ResumeRequest())

    async def detach(self) -> None:
        await self._stub.DetachPager(vmm_pb2.DetachPagerRequest())

    async def kill(self) -> None:
        await self._stub.Kill(vmm_pb2.KillRequest())


@pytest.fixture
def vmm() -> RecordingVmm:
    return RecordingVmm()


@pytest.fixture
async def client(vmm: RecordingVmm, short_path: Path) -> AsyncIterator[Client]:
    server = VmmServer()
    await server.start(vmm, str(short_path / "vmm.sock"))
    async with open_channel(f"unix:{short_path}/vmm.sock", None) as channel:
        yield Client(channel)
    await server.stop(grace=0)
    await server.wait_closed()


async def refusal(call: Awaitable[Any]) -> FerryError:
    """Return the error that the call ends with; its ErrorInfo must be there."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    error = from_rpc(refused.value, NO_INFO)
    assert error.reason is not NO_INFO, refused.value
    assert refused.value.code() is error.code
    return error


async def test_memory_is_described_with_layout_places_and_state(client: Client, vmm: RecordingVmm) -> None:
    vmm.regions = [
        Region(0, 1 << 30, location=ProcessMemory(0x7F00_0000_0000)),
        Region(1 << 32, 2 << 20, 2 << 20, MemfdMemory(7, 4096)),
        Region(1 << 40, 4096, location=FileMemory("/var/lib/guest.mem", 8192)),
    ]

    described = await client.describe()

    assert described == vmm_pb2.DescribeMemoryResponse(
        layout=memory_pb2.MemoryLayout(
            regions=[
                memory_pb2.MemoryRegion(guest_address=0, size=1 << 30, page_size=4096),
                memory_pb2.MemoryRegion(guest_address=1 << 32, size=2 << 20, page_size=2 << 20),
                memory_pb2.MemoryRegion(guest_address=1 << 40, size=4096, page_size=4096),
            ]
        ),
        locations=[
            memory_pb2.MemoryLocation(process=memory_pb2.ProcessMemory(address=0x7F00_0000_0000)),
            memory_pb2.MemoryLocation(memfd=memory_pb2.MemfdMemory(fd=7, offset=4096)),
            memory_pb2.MemoryLocation(file=memory_pb2.FileMemory(path="/var/lib/guest.mem", offset=8192)),
        ],
        state=vmm_pb2.VMM_STATE_RUNNING,
    )


async def test_an_incoming_vmm_tells_its_layout_but_no_places(client: Client, vmm: RecordingVmm) -> None:
    vmm.state = VmmState.INCOMING
    vmm.regions = [Region(0, 4096, location=ProcessMemory(4096)), Region(4096, 4096)]

    described = await client.describe()

    assert len(described.layout.regions) == 2
    assert not described.locations
    assert described.state == vmm_pb2.VMM_STATE_INCOMING


async def test_a_running_vmm_that_hides_where_its_memory_is_has_failed(client: Client, vmm: RecordingVmm) -> None:
    vmm.regions = [Region(0x10000, 4096)]

    error = await refusal(client.describe())

    assert error.reason is Reason.VMM_FAILED
    assert "0x10000" in error.message


CALLS: dict[str, Callable[[Client], Awaitable[Any]]] = {
    "attach": Client.attach,
    "pause": Client.pause,
    "save": Client.save,
    "load": Client.load,
    "resume": Client.resume,
    "detach": Client.detach,
}


@pytest.mark.parametrize(
    ("state", "call"),
    [
        (VmmState.RUNNING, "attach"),
        (VmmState.RUNNING, "save"),
        (VmmState.RUNNING, "load"),
        (VmmState.RUNNING, "detach"),
        (VmmState.PAUSED, "attach"),
        (VmmState.PAUSED, "load"),
        (VmmState.PAUSED, "detach"),
        (VmmState.INCOMING, "pause"),
        (VmmState.INCOMING, "save"),
        (VmmState.INCOMING, "load"),
        (VmmState.INCOMING, "resume"),
        (VmmState.INCOMING, "detach"),
    ],
)
async def test_a_call_that_makes_no_sense_in_a_state_is_refused_and_never_reaches_the_vmm(
    client: Client, vmm: RecordingVmm, state: VmmState, call: str
) -> None:
    vmm.state = state

    error = await refusal(CALLS[call](client))

    assert error.reason is Reason.ILLEGAL_STATE
    assert vmm.calls == []


async def test_a_guest_is_paused_saved_and_resumed(client: Client, vmm: RecordingVmm) -> None:
    await client.pause()
    assert await client.save() == b"saved"
    await client.resume()

    assert vmm.calls == ["pause", "save", "resume"]


async def test_a_guest_comes_in_by_attach_load_resume_and_detach(client: Client, vmm: RecordingVmm) -> None:
    vmm.state = VmmState.INCOMING

    await client.attach("/run/p.sock")
    await client.load(b"device state")
    await client.resume()
    await client.detach()

    assert vmm.calls == [("attach", "/run/p.sock"), ("load", b"device state"), "resume", "detach"]


async def test_calls_that_ask_for_what_is_so_already_change_nothing(client: Client, vmm: RecordingVmm) -> None:
    await client.resume()
    await client.pause()
    await client.pause()

    assert vmm.calls == ["pause"]


async def test_a_second_detach_is_harmless(client: Client, vmm: RecordingVmm) -> None:
    vmm.state = VmmState.INCOMING
    await client.attach()

    await client.detach()
    await client.detach()

    assert vmm.calls.count("detach") == 1


async def test_a_pager_is_attached_once(client: Client, vmm: RecordingVmm) -> None:
    vmm.state = VmmState.INCOMING
    await client.attach("/run/first.sock")

    error = await refusal(client.attach("/run/second.sock"))

    assert error.reason is Reason.ILLEGAL_STATE
    assert vmm.calls == [("attach", "/run/first.sock")]


async def test_a_failed_attach_may_be_tried_again(client: Client, vmm: RecordingVmm) -> None:
    vmm.state = VmmState.INCOMING
    vmm.failures["attach"] = FerryError(Reason.HANDOFF_TIMEOUT, "nobody took it")

    assert (await refusal(client.attach())).reason is Reason.HANDOFF_TIMEOUT
    assert (await refusal(client.load())).reason is Reason.ILLEGAL_STATE
    await client.attach()
    await client.load()


async def test_an_empty_pager_path_is_an_invalid_argument(client: Client, vmm: RecordingVmm) -> None:
    vmm.state = VmmState.INCOMING

    assert (await refusal(client.attach(""))).reason is Reason.INVALID_ARGUMENT
    assert vmm.calls == []


async def test_an_error_of_the_vmm_arrives_with_its_reason_and_sentence(client: Client, vmm: RecordingVmm) -> None:
    vmm.failures["pause"] = FerryError(Reason.NO_SPACE, "the disk of the guest is full")

    error = await refusal(client.pause())

    assert (error.reason, error.message) == (Reason.NO_SPACE, "the disk of the guest is full")


@pytest.mark.parametrize("call", ["describe", "pause"])
async def test_any_other_exception_is_vmm_failed_and_the_service_goes_on(
    client: Client, vmm: RecordingVmm, call: str
) -> None:
    vmm.failures[call] = ZeroDivisionError("a bug")

    error = await refusal(getattr(client, call)())

    assert error.reason is Reason.VMM_FAILED
    assert "ZeroDivisionError: a bug" in error.message
    await client.pause()


async def test_the_largest_state_crosses_and_a_larger_one_is_refused(client: Client, vmm: RecordingVmm) -> None:
    await client.pause()
    vmm.saved = bytes(MAX_STATE_BYTES)
    assert len(await client.save()) == MAX_STATE_BYTES

    vmm.saved = bytes(MAX_STATE_BYTES + 1)
    assert (await refusal(client.save())).reason is Reason.VMM_FAILED


async def test_calls_go_one_at_a_time_but_describe_and_kill_wait_for_none(client: Client, vmm: RecordingVmm) -> None:
    vmm.hold("pause")
    pausing = asyncio.ensure_future(client.pause())
    await vmm.entered["pause"].wait()
    # Would be refused at once if it did not wait for its turn: the guest still runs.
    saving = asyncio.ensure_future(client.save())

    assert (await client.describe()).state == vmm_pb2.VMM_STATE_RUNNING
    await client.kill()
    assert vmm.calls == ["pause", "kill"]

    vmm.gates["pause"].set()
    await pausing
    assert await saving == b"saved"


async def test_an_abandoned_call_leaves_the_turn_to_the_next(client: Client, vmm: RecordingVmm) -> None:
    vmm.hold("pause")
    pausing = asyncio.ensure_future(client.pause())
    await vmm.entered["pause"].wait()
    pausing.cancel()
    del vmm.gates["pause"]

    await client.pause()

    assert vmm.state is VmmState.PAUSED


async def test_the_vmm_learns_of_the_fault_service_just_before_it_attaches(client: Client, vmm: RecordingVmm) -> None:
    vmm.state = VmmState.INCOMING

    await client.attach_with_faults("/run/faults.sock", b"\xff")

    assert vmm.calls == [("use faults", FaultEndpoint("/run/faults.sock", b"\xff")), ("attach", "/run/pager.sock")]


async def test_a_vmm_without_such_memory_leaves_the_fault_service_alone(short_path: Path) -> None:
    class Plain(RecordingVmm):
        use_fault_service = Vmm.use_fault_service
        list_private_pages = Vmm.list_private_pages
        export_guest_pages = Vmm.export_guest_pages

    vmm, server = Plain(VmmState.INCOMING), VmmServer()
    await server.start(vmm, str(short_path / "plain.sock"))
    async with open_channel(f"unix:{short_path}/plain.sock", None) as channel:
        client = Client(channel)
        await client.attach_with_faults("/run/faults.sock", b"\xff")
        vmm.state = VmmState.PAUSED
        assert await client.list_private() == vmm_pb2.ListPrivatePagesResponse()
        error = await refusal(client.export(0))
    await server.stop(grace=0)

    assert vmm.calls == [("attach", "/run/pager.sock")]
    assert error.reason is Reason.ILLEGAL_STATE


async def test_private_pages_of_a_paused_guest_are_listed(client: Client, vmm: RecordingVmm) -> None:
    error = await refusal(client.list_private())
    assert error.reason is Reason.ILLEGAL_STATE
    vmm.state, vmm.private = VmmState.PAUSED, PrivatePages([(0, 4096), (1 << 32, 8192)], opaque=True)

    listed = await client.list_private()

    assert list(listed.guest_addresses) == [0, 1 << 32]
    assert list(listed.sizes) == [4096, 8192]
    assert listed.opaque


async def test_opaque_pages_are_exported_in_bundles(client: Client, vmm: RecordingVmm) -> None:
    vmm.state = VmmState.PAUSED
    vmm.bundles = [PageBundle([4096, 0], b"ciphertext", b"mac", stream=1, epoch=9), PageBundle([8192])]

    whole, pending = (await client.export(0, 8192)).bundles

    assert vmm.calls == [("export", [0, 8192])]
    assert (list(whole.guest_addresses), whole.payload, whole.metadata) == ([4096, 0], b"ciphertext", b"mac")
    assert (whole.stream, whole.epoch, pending.payload) == (1, 9, b"")


async def test_what_is_too_much_to_be_exported_is_refused(client: Client, vmm: RecordingVmm) -> None:
    vmm.state = VmmState.PAUSED

    assert (await refusal(client.export(*range(0, 513 * 4096, 4096)))).reason is Reason.INVALID_ARGUMENT
    assert vmm.calls == []
    vmm.bundles = [PageBundle([0], bytes((4 << 20) + 1))]
    assert (await refusal(client.export(0))).reason is Reason.VMM_FAILED
    vmm.private = PrivatePages([(0, 4096)] * 1_000_001)
    assert (await refusal(client.list_private())).reason is Reason.VMM_FAILED
