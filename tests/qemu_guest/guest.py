"""A stock QEMU, emulating in software, with the checksumming guest in it; or one that waits to receive that guest."""

from __future__ import annotations

import asyncio
import enum
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .control import ControlPort, Ready, Stats, Verified
from .image import QEMU, build
from .monitor import Monitor

_START_SECONDS = 20.0
_BOOT_SECONDS = 45.0
_COMMAND_SECONDS = 30.0
_END_SECONDS = 10.0
_RETRY_SECONDS = 0.02
_TAIL_BYTES = 2000
_SHM = Path("/dev/shm")

# The default name of the main RAM: with a backend of that name, ends with different backends take each other's streams.
_RAM_ID = "pc.ram"
# Quick to boot, and quiet about vCPUs that wait long for a page.
_KERNEL_OPTIONS = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on tsc=reliable no_timer_check "
    "nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
)


class Backend(enum.Enum):
    """What QEMU keeps the guest's RAM in."""

    PLAIN = "private anonymous memory, as by `-m` alone"
    MEMFD = "memory-backend-memfd, shared"
    FILE = "memory-backend-file, shared, a file on tmpfs"


@dataclass(frozen=True)
class Machine:
    """What both ends of a migration must have in common.

    `work_mib`, the memory that the workload fills, is by default all that is sure to be free beside the kernel.
    """

    memory_mib: int = 128
    vcpus: int = 1
    work_mib: int = 0
    seed: int = 1
    vga: bool = False
    machine: str = "pc"
    cpu: str = "qemu64"

    @property
    def worked_mib(self) -> int:
        return self.work_mib or self.memory_mib * 7 // 8 - 56


class QemuGuest:
    """One QEMU process; `async with` starts and ends it. With `incoming` it waits, paused, for `migrate-incoming`."""

    def __init__(
        self,
        machine: Machine | None = None,
        *,
        backend: Backend = Backend.PLAIN,
        prealloc: bool = False,
        incoming: bool = False,
        binary: str = QEMU,
        extra: tuple[str, ...] = (),
    ) -> None:
        self.machine = machine or Machine()
        self.backend = backend
        self.ready: Ready | None = None
        self._prealloc = prealloc
        self._incoming = incoming
        self._binary = binary
        self._extra = extra
        self._process: asyncio.subprocess.Process | None = None
        self._monitor: Monitor | None = None
        self._control: ControlPort | None = None
        # Short, as a socket's path must be.
        self.directory = Path(tempfile.gettempdir()) / f"qemu-guest-{secrets.token_hex(6)}"
        self.qmp_path = self.directory / "qmp"
        """A monitor that the harness leaves to others."""
        self.console_path = self.directory / "console"
        self.control_path = self.directory / "control"
        self.ram_path = _SHM / f"{self.directory.name}.ram"
        """The file that holds the RAM, with Backend.FILE."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the guest is not started"
        return self._process.pid

    @property
    def monitor(self) -> Monitor:
        """The harness's own monitor."""
        assert self._monitor is not None, "the guest is not started"
        return self._monitor

    async def start(self) -> None:
        """Start QEMU, and the guest unless one comes in: then wait until its workload is ready."""
        try:
            await self._start()
        except BaseException as error:
            error.add_note(self.diagnosis())
            await self.close()
            raise

    async def attach(self, seconds: float = _COMMAND_SECONDS) -> Ready:
        """Wait until the guest that came in answers here."""
        with self._diagnosed():
            self.ready = await self._port.ready(seconds)
        return self.ready

    async def command(self, text: str, seconds: float = _COMMAND_SECONDS) -> str:
        """Return the guest's answer to a command of workload.c; it is sent again until there is one."""
        with self._diagnosed():
            return await self._port.command(text, seconds)

    async def verify(self, seconds: float = _COMMAND_SECONDS) -> Verified:
        """Have every page checked."""
        with self._diagnosed():
            return await self._port.verify(seconds)

    async def stats(self, seconds: float = _COMMAND_SECONDS) -> Stats:
        """Read the workload's counters."""
        with self._diagnosed():
            return await self._port.stats(seconds)

    async def exit_code(self) -> int:
        """Wait until QEMU has ended by itself."""
        assert self._process is not None, "the guest is not started"
        return await asyncio.wait_for(self._process.wait(), _END_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        """Send QEMU a signal."""
        assert self._process is not None, "the guest is not started"
        self._process.send_signal(number)

    def diagnosis(self) -> str:
        """Return the ends of what the guest's console and QEMU said."""
        return "\n".join(f"--- {path.name}:\n{_tail(path)}" for path in (self.console_path, self._log_path))

    async def close(self) -> None:
        """End QEMU, whatever it is doing, and remove its files."""
        try:
            if self._process is not None:
                if self._process.returncode is None:
                    self._process.kill()
                await asyncio.wait_for(self._process.wait(), _END_SECONDS)
        finally:
            for connection in (self._monitor, self._control):
                if connection is not None:
                    await connection.close()
            self.ram_path.unlink(missing_ok=True)
            shutil.rmtree(self.directory, ignore_errors=True)

    # Starting

    async def _start(self) -> None:
        command = await asyncio.to_thread(self._command)
        self.directory.mkdir(mode=0o700)
        with self._log_path.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        async with asyncio.timeout(_START_SECONDS):
            self._monitor = await self._connect_monitor()
        # QEMU answers its monitors once all its sockets are there.
        self._control = await ControlPort.connect(self.control_path)
        if not self._incoming:
            await self._monitor.execute("cont")
            self.ready = await self._control.started(_BOOT_SECONDS)

    async def _connect_monitor(self) -> Monitor:
        while True:
            try:
                return await Monitor.connect(self._own_qmp_path)
            except OSError:
                if self._process is None or self._process.returncode is not None:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)

    def _command(self) -> list[str]:
        image, machine = build(), self.machine
        append = f"{_KERNEL_OPTIONS} work_mib={machine.worked_mib} work_seed={machine.seed}"
        return [
            # A test run that is killed takes its guests with it.
            *("setpriv", "--pdeathsig", "KILL", self._binary),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"),
            *("-accel", "tcg", "-cpu", machine.cpu, "-smp", str(machine.vcpus), "-m", str(machine.memory_mib)),
            *self._memory(),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", append),
            *("-chardev", f"file,id=console,path={self.console_path}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=control,path={self.control_path},server=on,wait=off"),
            *("-serial", "chardev:control"),
            *("-qmp", f"unix:{self._own_qmp_path},server=on,wait=off"),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
            *(("-vga", "std") if machine.vga else ()),
            *(("-incoming", "defer") if self._incoming else ()),
            *self._extra,
        ]

    def _memory(self) -> Iterator[str]:
        kind = {
            Backend.PLAIN: "memory-backend-ram",
            Backend.MEMFD: "memory-backend-memfd,share=on",
            Backend.FILE: f"memory-backend-file,share=on,mem-path={self.ram_path}",
        }[self.backend]
        prealloc = "on" if self._prealloc else "off"
        if self.backend is Backend.PLAIN and not self._prealloc:
            yield from ("-machine", self.machine.machine)
            return
        yield from ("-machine", f"{self.machine.machine},memory-backend={_RAM_ID}")
        yield from ("-object", f"{kind},id={_RAM_ID},size={self.machine.memory_mib}M,prealloc={prealloc}")

    # The rest

    @property
    def _own_qmp_path(self) -> Path:
        return self.directory / "own-qmp"

    @property
    def _log_path(self) -> Path:
        return self.directory / "qemu.log"

    @property
    def _port(self) -> ControlPort:
        assert self._control is not None, "the guest is not started"
        return self._control

    @contextmanager
    def _diagnosed(self) -> Iterator[None]:
        try:
            yield
        except (OSError, TimeoutError, RuntimeError) as error:
            error.add_note(self.diagnosis())
            raise


def _tail(path: Path) -> str:
    if not path.exists():
        return "(nothing)"
    return path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
