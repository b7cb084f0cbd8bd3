"""The VMM that docs/vmm-authors.md shows: taken out of the page, run, and its guest moved."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from doc_examples import examples
from guest_memfd_pager import GuestMemfdPager
from tiny_pager import TinyPager

from pageferry.channel import open_channel
from pageferry.v1 import fault_pb2, vmm_pb2_grpc
from pageferry.v1 import vmm_pb2 as pb
from pageferry.vmm import GuestMemfd

PAGE = 4096


class CountingVmm:
    """The example as a process, and its service."""

    def __init__(self, process: asyncio.subprocess.Process, stub: vmm_pb2_grpc.VmmServiceStub) -> None:
        self.process = process
        self.service = stub
        self._address = 0

    async def find_memory(self) -> None:
        described = await self.service.DescribeMemory(pb.DescribeMemoryRequest())
        self._address = described.locations[0].process.address

    def read(self, offset: int, length: int = PAGE) -> bytes:
        with open(f"/proc/{self.process.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(self._address + offset)
            return memory.read(length)

    def count(self) -> int:
        return int.from_bytes(self.read(0, 8), "little")

    async def counts_beyond(self, count: int) -> None:
        async with asyncio.timeout(30):
            while self.count() <= count:  # noqa: ASYNC110 - memory of another process has no event
                await asyncio.sleep(0)

    async def pause_and_save(self) -> bytes:
        await self.service.Pause(pb.PauseRequest())
        return (await self.service.SaveState(pb.SaveStateRequest())).state


@asynccontextmanager
async def running(program: Path, socket_path: Path, *options: str) -> AsyncIterator[CountingVmm]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, program, socket_path, *options, stdout=pipe)
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"ready\n"
        async with open_channel(f"unix:{socket_path}", None) as channel:
            yield CountingVmm(process, vmm_pb2_grpc.VmmServiceStub(channel))
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
def program(short_path: Path) -> Path:
    source = examples("vmm-authors.md", "python")[0]
    path = short_path / "counting_vmm.py"
    path.write_text(source)
    return path


@pytest.mark.root
@pytest.mark.userfaultfd
async def test_the_guest_of_the_example_is_moved_and_goes_on_counting(
    program: Path, short_path: Path, tiny_pager: TinyPager
) -> None:
    async with (
        running(program, short_path / "a.sock") as source,
        running(program, short_path / "b.sock", "--incoming") as target,
    ):
        await target.service.AttachPager(pb.AttachPagerRequest(socket_path=tiny_pager.path))
        await source.find_memory()
        await source.counts_beyond(0)
        state = await source.pause_and_save()
        moved_at = source.count()
        tiny_pager.serve(source.read)
        await target.service.LoadState(pb.LoadStateRequest(state=state))
        await target.service.Resume(pb.ResumeRequest())
        await asyncio.to_thread(tiny_pager.finish)
        await target.service.DetachPager(pb.DetachPagerRequest())
        await source.service.Kill(pb.KillRequest())

        await target.find_memory()
        await target.counts_beyond(moved_at)

        assert int.from_bytes(await target.pause_and_save(), "little") == target.count()
        assert int.from_bytes(state, "little") == moved_at
        assert await asyncio.wait_for(source.process.wait(), 30) == 0


def test_the_example_with_exits_waits_for_pages_that_are_missing_and_for_no_others(short_path: Path) -> None:
    module: dict[str, Any] = {}
    exec(examples("vmm-authors.md", "python")[1], module)
    memfd = os.memfd_create("guest")
    os.ftruncate(memfd, 8 * PAGE)
    memory, pager = GuestMemfd(memfd, 8 * PAGE), GuestMemfdPager(short_path)
    pager.serve(lambda offset: bytes([offset // PAGE]) * PAGE)
    exits = module["Exits"](pager.path, pager.service.endpoint, memory)
    pager.push(4, 5)

    for page in (3, 3, 4):
        exits.wait_for(0, page * PAGE + 100)

    assert pager.faulted == [3]
    assert [memory.read(page * PAGE, 1) for page in (3, 4, 5)] == [b"\x03", b"\x04", b"\x00"]
    pager.outcome = fault_pb2.OUTCOME_POISONED
    with pytest.raises(MemoryError):
        exits.wait_for(0, 5 * PAGE)
    exits.close()
    pager.close()
    memory.close()
