"""A process guest that misbehaves in one way, at one moment: a process of its own, run by path."""

from __future__ import annotations

import argparse
import array
import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from pageferry.errors import FerryError, Reason
from pageferry.guests.control import run_control
from pageferry.guests.process.guest import ProcessGuest
from pageferry.guests.process.plan import Order, Plan
from pageferry.vmm import GuestMemory, VmmServer
from pageferry.vmm.regions import FileMemory, MemoryDescription, Region

MIB = 1 << 20
# Ends when its input does: with the process that started it.
ANOTHER = """
import socket, sys
from pageferry.vmm.memory import GuestMemory
memory = GuestMemory(int(sys.argv[2]))
with socket.socket(fileno=int(sys.argv[1])) as to:
    socket.send_fds(to, [str(memory.address).encode()], [memory.open_userfault()])
sys.stdin.read()
"""
FOREVER = 3600.0


class HostileVmm(ProcessGuest):
    """Does what `behave` names; otherwise it is a good guest."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory)
        self.memory = memory
        self.behave = ""
        self.failures = 0

    async def describe_memory(self) -> MemoryDescription:
        description = await super().describe_memory()
        if self.behave.startswith("names-"):
            # A file of somebody else's, which the sidecar may open.
            foreign = FileMemory(self.behave.removeprefix("names-"))
            return MemoryDescription(description.state, [Region(0, self.memory.size, 4096, foreign)])
        if self.behave.startswith("describe-"):
            size = self.memory.size
            regions = {
                "describe-nothing": [],
                "describe-overlap": [Region(0, size), Region(size // 2, size)],
                "describe-uneven": [Region(0, size - 1)],
                "describe-endless": [Region(0, 1 << 62)],
            }[self.behave]
            located = [Region(one.guest_address, one.size, 4096, self.memory.location()) for one in regions]
            return MemoryDescription(description.state, located)
        return description

    async def attach_pager(self, socket_path: str) -> None:
        match self.behave:
            case "attach-dies":
                os._exit(1)
            case "attach-hangs":
                print(json.dumps({"event": "attaching"}), flush=True)
                await asyncio.sleep(FOREVER)
            case "attach-lies":
                # Says that it has handed over, and has not even connected.
                return
            case "attach-refuses":
                raise FerryError(Reason.NO_SPACE, "no memory left on this machine")
            case behave if behave.startswith("hand-"):
                self._hand_over(socket_path, behave.removeprefix("hand-"))
            case _:
                await super().attach_pager(socket_path)

    def _hand_over(self, socket_path: str, what: str) -> None:
        size, address = self.memory.size, self.memory.address
        good = {"base_host_virt_addr": address, "size": size, "offset": 0, "page_size": 4096}
        table = {
            "nonsense": b"\x00\xff nonsense",
            "half": json.dumps([good]).encode()[:20],
            "object": json.dumps(good).encode() + b"]",
            "twice": json.dumps([good, good]).encode(),
            "small": json.dumps([{**good, "size": size // 2}]).encode(),
            "crooked": json.dumps([{**good, "base_host_virt_addr": address + 1}]).encode(),
            "beyond": json.dumps([{**good, "base_host_virt_addr": (1 << 64) - 4096}]).encode(),
            "words": json.dumps([{**good, "base_host_virt_addr": "here"}]).encode(),
            "elsewhere": json.dumps([{**good, "base_host_virt_addr": 1 << 30}]).encode(),
        }.get(what, json.dumps([good]).encode())
        reader, writer = os.pipe()
        fds = {"no-fd": [], "many-fds": [reader] * 3, "pipe": [reader], "unregistered": []}.get(what)
        if what == "foreign":
            uffd, good["base_host_virt_addr"] = self._made_by_another(size)
            table, fds = json.dumps([good]).encode(), [uffd]
        elif fds is None:
            fds = [self.memory.open_userfault()]
        self.kept = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.kept.connect(socket_path)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.kept.sendmsg([table], ancillary)
        os.close(reader)
        os.close(writer)

    def _made_by_another(self, size: int) -> tuple[int, int]:
        """Return a userfaultfd over memory of another process, and where that memory lies."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [sys.executable, "-c", ANOTHER, str(theirs.fileno()), str(size)]
            self.another = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE)
            address, fds, _, _ = socket.recv_fds(ours, 64, 1)
        return fds[0], int(address)

    async def pause(self) -> None:
        if self.behave == "pause-dies":
            os._exit(1)
        if self.behave == "pause-hangs":
            await asyncio.sleep(FOREVER)
        await super().pause()

    async def save_state(self) -> bytes:
        if self.behave == "save-fails":
            raise RuntimeError("a device does not let itself be saved")
        if self.behave == "save-nonsense":
            return b"nonsense"
        if self.behave == "save-huge":
            return bytes(65 * MIB)
        return await super().save_state()

    async def load_state(self, state: bytes) -> None:
        if self.behave == "load-dies":
            os._exit(1)
        if self.behave == "load-hangs":
            await asyncio.sleep(FOREVER)
        if self.behave == "load-slow":
            await asyncio.sleep(0.5)
        await super().load_state(state)

    async def resume(self) -> None:
        if self.behave == "resume-dies":
            os._exit(1)
        if self.behave == "resume-fails-twice" and self.failures < 2:
            self.failures += 1
            raise RuntimeError("the guest does not get up")
        await super().resume()

    async def detach_pager(self) -> None:
        if self.behave == "detach-fails":
            raise RuntimeError("no")
        await super().detach_pager()

    async def kill(self) -> None:
        if self.behave == "kill-refuses":
            return
        await super().kill()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--behave", required=True)
    parser.add_argument("--incoming", action="store_true")
    parser.add_argument("--working-set", type=float, default=1.0)
    options = parser.parse_args()
    memory = GuestMemory(int(options.memory.removesuffix("M")) * MIB)
    pages = memory.size // 4096
    plan = Plan(seed=7, pages=pages, working=int(pages * options.working_set), holes=4, order=Order.RANDOM)
    vmm = HostileVmm(memory) if options.incoming else HostileVmm.started(memory, plan)
    vmm.behave = options.behave
    server = VmmServer()
    await server.start(vmm, options.socket)
    await run_control(vmm, server)
    os._exit(0)


if __name__ == "__main__":
    Path("/proc/self/comm").write_text("hostile-vmm")
    asyncio.run(main())
