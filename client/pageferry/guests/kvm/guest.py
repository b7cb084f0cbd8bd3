"""The KVM guest as a VMM: what the sidecar asks of it, and what its console shows."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Final, TypeVar

from pageferry.abi import kvm as abi
from pageferry.errors import FerryError, Reason
from pageferry.guests.control import GuestStatus, Verification
from pageferry.guests.kvm import check
from pageferry.guests.kvm.absent import AbsentPages
from pageferry.guests.kvm.layout import Layout
from pageferry.guests.kvm.machine import Machine
from pageferry.guests.kvm.program import Order, Progress, Work, describe_mismatch
from pageferry.guests.kvm.state import State
from pageferry.guests.kvm.vm import DEVICE
from pageferry.vmm import (
    Backing,
    FaultEndpoint,
    FaultForwarder,
    GuestMemfd,
    GuestMemory,
    MemoryDescription,
    PagerLink,
    UserfaultBitmap,
    Vmm,
    VmmState,
)

_KEPT_FINDINGS: Final = 8

_Result = TypeVar("_Result")


class KvmGuest(Vmm):
    """A virtual machine of one vCPU. `boot` fills it and lets it run; without that it waits for a guest to come in.

    `on_kill` is called, once, when the sidecar ends the VMM. All methods belong to one event loop.
    """

    def __init__(
        self,
        size: int,
        backing: Backing = Backing.ANONYMOUS,
        *,
        on_kill: Callable[[], None],
        device: str = DEVICE,
    ) -> None:
        self._layout = Layout.of(size)
        self._on_kill = on_kill
        self._backing = backing
        self._findings: deque[str] = deque(maxlen=_KEPT_FINDINGS)
        self._mismatches = 0
        self._machine = Machine(size, backing, self._report, device)
        self._memory, self._status_page = self._machine.memory, self._machine.status
        self._vcpu = self._machine.vcpu
        self._running: Future[None] | None = None
        self._told_failure = False
        self._state = VmmState.INCOMING
        self._link: PagerLink | None = None
        self._endpoint: FaultEndpoint | None = None
        self._absent: AbsentPages | None = None
        self._longest_stall = 0.0
        # Held by whatever stops or starts the vCPU, so that a check of memory and a pause do not cross.
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()

    def boot(self, seed: int, order: Order) -> None:
        """Write the program and its data into the fresh memory and let it run. Blocks for seconds a GiB."""
        layout = self._layout
        work = Work.plan(seed, layout.data_pages, layout.data_address, order)
        check.fill(self._memory, layout, work)
        if self._backing is Backing.GUEST_MEMFD:
            self._machine.let_in()
        self._vcpu.load(work.registers(layout.entry), self._machine.start_registers())
        self._start()

    async def describe_memory(self) -> MemoryDescription:
        """Return the one region. VMM_FAILED once the vCPU has failed: nothing but a kill makes sense then."""
        failure = self._failure()
        if failure is not None:
            raise failure
        return MemoryDescription(self._state, [self._memory.region()])

    async def use_fault_service(self, endpoint: FaultEndpoint) -> None:
        """Remember where faults are answered that no userfaultfd sees."""
        self._endpoint = endpoint

    async def attach_pager(self, socket_path: str) -> None:
        """Hand the untouched memory to the pager."""
        memory = self._memory
        if isinstance(memory, GuestMemory):
            self._link = await _in_thread(lambda: PagerLink.open(socket_path, memory, user_mode_only=False))
        else:
            self._link = await _in_thread(lambda: self._attach_by_exits(socket_path, memory))

    def _attach_by_exits(self, socket_path: str, memory: GuestMemfd) -> PagerLink:
        if self._endpoint is None:
            raise FerryError(
                Reason.PROTOCOL_MISMATCH,
                "this guest's memory is a guest_memfd, whose faults have to be forwarded, and the pager named no "
                "FaultService: it is of an older release; use another backing",
            )
        bitmap = UserfaultBitmap(self._layout.pages)
        try:
            link = PagerLink.open_without_userfault(socket_path, memory, bitmap)
        except BaseException:
            bitmap.close()
            raise
        forwarder = FaultForwarder(self._endpoint)
        link.forward_through(forwarder)
        self._absent = AbsentPages(self._machine.vm, memory, bitmap, forwarder)
        self._vcpu.absent = self._absent
        return link

    async def pause(self) -> None:
        """Stop the vCPU. The pause is completed even when its caller gives up."""
        await self._to_the_end(self._pause())

    async def save_state(self) -> bytes:
        """Return the registers of the paused vCPU."""
        return State(self._layout.size, self._vcpu.regs(), self._vcpu.sregs()).pack()

    async def load_state(self, state: bytes) -> None:
        """Set the registers of the incoming vCPU, and bring in what it needs to run at all."""
        loaded = State.unpack(state, self._layout)
        absent, layout = self._absent, self._layout
        if absent is not None:
            await _in_thread(lambda: absent.bring_in(layout.entry, layout.data_address - layout.entry))
        self._vcpu.load(loaded.regs, loaded.sregs)
        progress = Progress.of(loaded.regs)
        self._mismatches = progress.mismatches
        self._status_page.write(0, progress.steps.to_bytes(8, "little"))

    async def resume(self) -> None:
        """Let the vCPU run."""
        async with self._turn:
            self._start()

    async def detach_pager(self) -> None:
        """Let the userfaultfd or the forwarder go, and the pager's socket."""
        if self._absent is not None:
            await self._to_the_end(self._settle(self._absent))
        if self._link is not None:
            self._link.close()

    async def kill(self) -> None:
        """Stop the vCPU, without waiting for it, and tell the owner of the process."""
        self._vcpu.stop()
        self._on_kill()

    def status(self) -> GuestStatus:
        """Tell how far the guest is: the program itself stores that where it can be read at any time."""
        steps = int.from_bytes(self._status_page.read(0, 8), "little")
        state = "failed" if self._failure() else self._state.value
        if self._absent is not None:
            self._longest_stall = self._absent.longest_stall
        return GuestStatus(steps, self._mismatches, state, round(1000 * self._longest_stall, 3))

    async def verify(self) -> Verification:
        """Check every byte of memory while the vCPU stands still; afterwards it goes on if it ran."""
        return await self._to_the_end(self._verify())

    def take_findings(self) -> list[str]:
        """Return what the program and the vCPU reported since the last call."""
        findings = []
        while self._findings:
            findings.append(self._findings.popleft())
        failure = self._failure()
        if failure is not None and not self._told_failure:
            self._told_failure = True
            findings.append(str(failure))
        return findings

    async def close(self) -> None:
        """Stop the vCPU and free everything. Waits for a vCPU that waits for a page, unless that page is forwarded."""
        if self._absent is not None:
            await _in_thread(self._absent.close)
        async with self._turn:
            try:
                await self._halt()
            except Exception:
                # A vCPU that failed stands still as well.
                self._free()
                raise
            self._free()

    def _free(self) -> None:
        """Free everything under the stopped vCPU."""
        if self._absent is not None:
            self._absent.forget()
        if self._link is not None:
            self._link.close()
        self._machine.close()

    def _start(self) -> None:
        self._running = self._vcpu.start()
        self._state = VmmState.RUNNING

    async def _halt(self) -> None:
        """Stop the vCPU and wait until it stands still.

        A vCPU that waits for a page is stopped at once, but for one case: without the hardware's second page tables,
        KVM reads the guest's own tables by a plain access, which only the page itself can end.
        """
        await asyncio.wrap_future(self._vcpu.stop())

    async def _pause(self) -> None:
        async with self._turn:
            await self._halt()
            self._state = VmmState.PAUSED

    async def _verify(self) -> Verification:
        async with self._turn:
            if self._state is VmmState.INCOMING:
                raise FerryError(Reason.ILLEGAL_STATE, "the guest has not arrived here yet; verify it once it runs")
            await self._halt()
            try:
                regs = self._vcpu.regs()
                work, progress = Work.from_registers(regs), Progress.of(regs)
                memory = self._absent or self._memory
                return await _in_thread(lambda: check.check(memory, self._layout, work, progress))
            finally:
                if self._state is VmmState.RUNNING:
                    self._start()

    async def _settle(self, absent: AbsentPages) -> None:
        """Let go of the pager, which has brought everything, and let the vCPU reach all memory as one."""
        await _in_thread(absent.close)
        async with self._turn:
            await self._halt()
            await _in_thread(absent.settle)
            self._absent = self._vcpu.absent = None
            if self._state is VmmState.RUNNING:
                self._start()

    async def _to_the_end(self, work: Coroutine[None, None, _Result]) -> _Result:
        """Await `work`, which goes on to its end when the caller gives up: half of it would leave the vCPU stopped."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    def _failure(self) -> BaseException | None:
        if self._running is None or not self._running.done():
            return None
        return self._running.exception()

    def _report(self, regs: abi.Regs) -> None:
        self._mismatches = Progress.of(regs).mismatches
        self._findings.append(describe_mismatch(regs))


async def _in_thread(work: Callable[[], _Result]) -> _Result:
    """Run blocking work in a daemon thread: unlike an executor's, it cannot keep the process from ending."""
    outcome: Future[_Result] = Future()
    # From here on whoever waits can only give up waiting, not cancel it.
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            outcome.set_exception(error)

    threading.Thread(target=run, name="kvm-guest-work", daemon=True).start()
    return await asyncio.wrap_future(outcome)
