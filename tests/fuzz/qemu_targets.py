"""What a QEMU says on its monitor, and what crosses between two of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from target import Target, in_loop

from pageferry.errors import FerryError, Reason
from pageferryd.core.layout import MAX_REGIONS
from pageferryd.vmm.qemu import state
from pageferryd.vmm.qemu.blobs import is_blob
from pageferryd.vmm.qemu.blocks import RamBlock, _ranges, parse_ramblocks
from pageferryd.vmm.qemu.memory import layout_of
from pageferryd.vmm.qemu.monitor import Monitor
from pageferryd.vmm.qemu.movable import _other_mappers, _target, busy
from pageferryd.vmm.qemu.package import MAX_BLOB_BYTES, MAX_BLOBS, Blob, Package, pack, pack_blob, unpack, unpack_blob
from pageferryd.vmm.qemu.state import MAX_STATE_BYTES, machine_of, ready_to_load


def package(data: bytes) -> None:
    """A package that is read is no larger than it came, and its blobs no larger than they say."""
    found = unpack(data)
    assert len(found.blobs) <= MAX_BLOBS
    assert len(found.state) + sum(len(blob.packed) for blob in found.blobs.values()) <= len(data)
    assert pack(found) == data
    for name, blob in found.blobs.items():
        with contextlib.suppress(FerryError):
            assert len(unpack_blob(name, blob)) <= blob.length <= MAX_BLOB_BYTES


def device_state(data: bytes) -> None:
    """A state that is loaded is whole, not too long, and of the machine that loads it, whoever made its digest."""
    for one in (data, data + state._tail(data)):
        with contextlib.suppress(FerryError):
            state._check(one, "pc")
            assert one.startswith(state._HEAD + _NAMED)
            assert len(one) <= MAX_STATE_BYTES + 1024


def ram_blocks(data: bytes) -> None:
    """Blocks that are listed are whole pages inside of what addresses can say; what cannot be a guest is refused."""
    blocks = parse_ramblocks(data.decode("latin-1"))
    for block in blocks:
        assert 0 < block.size < 1 << 64
        assert 0 <= block.offset < 1 << 64
        assert block.page_size >= 4096
        assert not block.size % block.page_size
    named = [
        RamBlock(one.name, one.offset, one.size, one.page_size, one.host_address or 0, False, True)
        for one in blocks
        if not is_blob(one.name)
    ]
    assert len(layout_of(named).regions) <= MAX_REGIONS


def memory_tree(data: bytes) -> None:
    """Ranges of guest memory are in order within 64 bits."""
    for first, last, offset in _ranges(data.decode("latin-1")):
        assert 0 <= first < 1 << 64
        assert 0 <= last < 1 << 64
        assert offset >= 0


class _Says:
    """A monitor of a QEMU that answers every command with the same; None is what is no JSON."""

    path = "/run/qemu.sock"

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def execute(self, _command: str, _arguments: object = None, _seconds: float = 1.0) -> Any:
        return self._answer

    async def hmp(self, _line: str) -> str:
        if isinstance(self._answer, str):
            return self._answer
        raise FerryError(Reason.VMM_FAILED, "no text")


async def answers(data: bytes) -> None:
    """A QEMU may answer a command with any JSON."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = data.decode("latin-1")
    monitor: Any = _Says(answer)
    for ask in (machine_of, state._version, busy, _target, _other_mappers, ready_to_load, _loadable):
        with contextlib.suppress(FerryError):
            await ask(monitor)


async def _loadable(monitor: Any) -> None:
    await ready_to_load(_Incoming(monitor))  # type: ignore[arg-type]


class _Incoming:
    """One that waits for a state, and otherwise answers as another."""

    path = "/run/qemu.sock"

    def __init__(self, other: Any) -> None:
        self._other = other

    async def execute(self, command: str, arguments: object = None) -> Any:
        return {"status": "inmigrate"} if command == "query-status" else await self._other.execute(command, arguments)


async def monitor(data: bytes) -> None:
    """Whatever is said at a monitor's socket, as its greeting or later, a command returns or fails with a reason."""
    behind, said = data[:1] != b"\0", data[1:]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "qmp"

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                if behind:
                    writer.write(GREETING)
                    await _command(reader)
                    writer.write(b'{"return":{}}\r\n')
                    command = await _command(reader)
                    writer.write(said.replace(b"ID", command["id"].encode()))
                else:
                    writer.write(said)
                await writer.drain()
            except (OSError, EOFError):
                pass
            finally:
                writer.close()

        async with await asyncio.start_unix_server(serve, path):
            one = await Monitor.open(path, 10)
            try:
                await one.execute("query-status", None, 10)
            finally:
                await one.close()
                await one.close()


async def _command(reader: asyncio.StreamReader) -> dict[str, Any]:
    data = b""
    while True:
        data += await reader.readuntil(b"}")
        try:
            found: dict[str, Any] = json.loads(data)
        except ValueError:
            # That was the end of an object in it.
            continue
        return found


GREETING = b'{"QMP":{"version":{"qemu":{"major":9,"minor":0,"micro":0},"package":""},"capabilities":[]}}\r\n'
_NAMED = state._SECTION.pack(7, 2) + b"pc"
_BOMB = pack_blob(bytes(1 << 20) + b"x")
_LIST = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                     mem    2 MiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007f0000000000  rw
                 pc.bios    4 KiB  0x0000000008000000 0x0000000000040000 0x0000000000040000 0x00007f1000000000  ro
"""
_TREE = """\
FlatView #0
 AS "memory", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): pc.ram
  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000
  0000000100000000-000000017fffffff (prio 0, nv-ram): pc.ram @0000000080000000
"""

QEMU_TARGETS = (
    Target(
        "QEMU package",
        package,
        [
            pack(Package(b"state", {"/rom@etc/acpi/tables": pack_blob(b"tables" * 50), "x.rom": pack_blob(bytes(99))})),
            pack(Package(b"", {"bomb": _BOMB._replace(length=100)})),
            pack(Package(b"", {"bomb": Blob(0, bytes(32), _BOMB.packed)})),
            pack(Package(b"s", {})),
        ],
    ),
    Target("QEMU state", device_state, [state._HEAD + _NAMED + b"devices", state._HEAD, state._HEAD + _NAMED[:4]]),
    Target("QEMU RAM blocks", ram_blocks, [_LIST.encode(), _LIST.replace("2 MiB", "9" * 400 + " TiB").encode()]),
    Target("QEMU memory tree", memory_tree, [_TREE.encode()]),
    Target(
        "QEMU answers",
        in_loop(answers),
        [
            b'"pc-i440fx-7.2-machine"',
            b'{"qemu":{"major":7,"minor":2},"status":"none","arch":"x86_64"}',
            b'{"qemu":{"major":1e999,"minor":-1e999},"status":"inmigrate"}',
            b'{"qemu":{"major":"9","minor":NaN},"status":{}, "arch":[]}',
            b'  dev: vhost-user-fs-pci, id "fs"\n \\ net0: index=0,type=vhost-user\n',
            b"null",
            *(b'{"arch":%s,"status":%s}' % (deep, deep) for deep in (b"[" * n + b"]" * n for n in range(800, 1000, 8))),
        ],
        (),
    ),
    Target(
        "QEMU monitor",
        in_loop(monitor),
        [
            b'\1{"return":{"status":"running"},"id":"ID"}\r\n',
            b'\1{"error":{"class":"GenericError","desc":"no"},"id":"ID"}\r\n',
            b'\1{"error":{"class":7,"desc":[]},"id":"ID"}\r\n{"error":7,"id":"ID"}\r\n',
            b'\1{"event":"STOP","timestamp":{"seconds":1,"microseconds":2}}\r\n{"return":1,"id":"ID"}\r\n',
            b'\1{"event":7}\r\n{"return":1,"id":{}}\r\n',
            b"\1" + b"[" * 3000 + b"\r\n",
            b'\1{"return":' + b"9" * 5000 + b',"id":"ID"}\r\n',
            b"\0" + GREETING,
            b'\0{"QMP":{"version":7,"capabilities":{}}}\r\n{"return":[]}\r\n',
        ],
        examples=25,
    ),
)
