"""A Vmm that does nothing but remember its calls, and wait or fail where a test says so."""

from __future__ import annotations

import asyncio

from pageferry.vmm import (
    FaultEndpoint,
    MemoryDescription,
    PageBundle,
    PrivatePages,
    ProcessMemory,
    Region,
    Vmm,
    VmmState,
)


class RecordingVmm(Vmm):
    """Starts in `state`; `failures[call]` is raised by that call, `gates[call]` is awaited in it."""

    def __init__(self, state: VmmState = VmmState.RUNNING) -> None:
        self.state = state
        self.regions = [Region(0, 1 << 20, location=ProcessMemory(0x1000))]
        self.saved = b"saved"
        self.private = PrivatePages()
        self.bundles: list[PageBundle] = []
        self.calls: list[object] = []
        self.failures: dict[str, BaseException] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.entered: dict[str, asyncio.Event] = {}

    def hold(self, call: str) -> None:
        """Make `call` wait until `gates[call]` is set, and say in `entered[call]` that it waits."""
        self.gates[call], self.entered[call] = asyncio.Event(), asyncio.Event()

    async def _record(self, call: str, *arguments: object) -> None:
        self.calls.append((call, *arguments) if arguments else call)
        if call in self.gates:
            self.entered[call].set()
            await self.gates[call].wait()
        if call in self.failures:
            raise self.failures.pop(call)

    async def describe_memory(self) -> MemoryDescription:
        if "describe" in self.failures:
            raise self.failures.pop("describe")
        return MemoryDescription(self.state, self.regions)

    async def use_fault_service(self, endpoint: FaultEndpoint) -> None:
        await self._record("use faults", endpoint)

    async def export_guest_pages(self, guest_addresses: list[int]) -> list[PageBundle]:
        await self._record("export", guest_addresses)
        return self.bundles

    async def list_private_pages(self) -> PrivatePages:
        await self._record("list private")
        return self.private

    async def attach_pager(self, socket_path: str) -> None:
        await self._record("attach", socket_path)

    async def pause(self) -> None:
        await self._record("pause")
        self.state = VmmState.PAUSED

    async def save_state(self) -> bytes:
        await self._record("save")
        return self.saved

    async def load_state(self, state: bytes) -> None:
        await self._record("load", state)

    async def resume(self) -> None:
        await self._record("resume")
        self.state = VmmState.RUNNING

    async def detach_pager(self) -> None:
        await self._record("detach")

    async def kill(self) -> None:
        await self._record("kill")
