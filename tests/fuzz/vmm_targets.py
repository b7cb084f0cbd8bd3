"""What Cloud Hypervisor, Firecracker and a guest of our own say: protocols, APIs, saved states."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import socket
import tempfile
import zlib
from pathlib import Path
from typing import Any

from mutated import pieces
from target import Target, in_loop

from pageferry.abi import cloud_hypervisor as abi
from pageferry.abi import kvm
from pageferry.abi.cloud_hypervisor import Command
from pageferry.errors import FerryError
from pageferry.guests.kvm import state as kvm_state
from pageferry.guests.kvm.layout import Layout as KvmLayout
from pageferry.guests.kvm.program import Order, Work
from pageferry.guests.kvm.state import State
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.vmm.cloud_hypervisor.description import describe
from pageferryd.vmm.cloud_hypervisor.protocol import HungUpError, PeerConnection
from pageferryd.vmm.cloud_hypervisor.saved_guest import MAX_SLOTS, SavedGuest, for_receiver, read_slots
from pageferryd.vmm.firecracker import memory, state_file
from pageferryd.vmm.firecracker.api import FirecrackerApi
from pageferryd.vmm.http_api import MAX_ANSWER_BYTES, UnixHttp


def saved_guest(data: bytes) -> None:
    """A saved guest that is read has memory that can be, and is packed again as it came."""
    found = SavedGuest.unpack(data)
    assert found.pack() == data[: len(found.pack())]
    assert found.layout.page_count * PAGE_SIZE == sum(slot.size for slot in found.slots)


def config(data: bytes) -> None:
    """A config that is read reaches the destination with its memory on demand, and all else as it was."""
    slots = read_slots(data)
    assert 0 < len(slots) <= MAX_SLOTS
    assert all(slot.file_size < 1 << 63 for slot in slots)
    given = json.loads(for_receiver(data).decode())
    assert given.pop("memory_mode") == "Postcopy"
    before = json.loads(data.decode())
    before.pop("memory_mode", None)
    # By their text: what is no number is not equal to itself.
    assert json.dumps(given, sort_keys=True) == json.dumps(before, sort_keys=True)


def description(data: bytes) -> None:
    """A description that is understood tells a size that can be."""
    try:
        info = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(info, dict):
        found = describe(info, 1, "the VMM")
        assert 0 <= (found.memory_bytes or 0) < 1 << 63


async def migration_peer(data: bytes) -> None:
    """Requests of a VMM are taken within their bounds, until one cannot be or it hangs up."""
    here, vmm = socket.socketpair()
    vmm.setblocking(False)
    connection = PeerConnection(here, "the VMM")
    try:
        for piece in pieces(data):
            vmm.send(piece)
        vmm.close()
        while True:
            request = await connection.receive_request()
            if request.command is Command.MEMORY_FD:
                slot, fd = await connection.receive_slot(request)
                os.close(fd)
                assert 0 <= slot < 1 << 32
            else:
                payload = await connection.receive_payload(request, 1000)
                assert len(payload) == request.length <= 1000
    except (BlockingIOError, HungUpError):
        # More than a socket takes at once, or all that there is.
        pass
    finally:
        vmm.close()
        connection.close()


async def migration_answers(data: bytes) -> None:
    """A VMM that is given a guest may answer anything to each step."""
    here, vmm = socket.socketpair()
    connection = PeerConnection(here, "the VMM")
    try:
        vmm.send(data[:10_000])
        vmm.shutdown(socket.SHUT_WR)
        await connection.ask(Command.START, headers=abi.VERSION.pack(0))
        await connection.hand_slot(7, vmm.fileno())
        await connection.ask(Command.CONFIG, b"{}")
    finally:
        vmm.close()
        connection.close()


class _Says:
    """An API that answers every call with the same."""

    path = "/run/fc.sock"

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def call(self, *_: object) -> Any:
        return self._answer


async def firecracker_api(data: bytes) -> None:
    """Firecracker may answer with any JSON; a machine that is taken has memory of a size that can be."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return
    api = FirecrackerApi("/run/fc.sock")
    api._http = _Says(answer)  # type: ignore[assignment]
    for ask in (api.instance, api.obstacles, api.machine):
        try:
            found = await ask()
        except FerryError:
            continue
    else:
        if "found" in locals() and hasattr(found, "memory_bytes"):
            assert 0 < found.memory_bytes <= 1 << 44


def firecracker_memory(data: bytes) -> None:
    """Places that fit lie inside of mappings, one for each range, and none in another's."""
    lines = data.decode("latin-1").split("\n")
    mapped = [one for line in lines if _is_of_maps(line) for one in memory._parse(line)]
    for ranges in memory.possible_ranges(4 << 30, "x86_64"):
        for place in [*memory._apart(ranges, mapped), *memory._joined(ranges, mapped)][:100]:
            spans = sorted((at, at + size) for at, (_, size) in zip(place.addresses, ranges, strict=True))
            assert all(any(one.start <= low and high <= one.end for one in mapped) for low, high in spans)


def _is_of_maps(line: str) -> bool:
    """Say whether the kernel would write that: what is mapped where is its word, only names are not."""
    parts = line.split(maxsplit=5)
    try:
        start, end = (int(part, 16) for part in parts[0].split("-"))
        int(parts[2], 16)
    except (ValueError, IndexError):
        return False
    return 0 <= start < end < 1 << 47 and len(parts) >= 5 and len(parts[1]) == 4


def firecracker_state(data: bytes) -> None:
    """A state is complete where its checksum closes it, and is taken from a file as it is."""
    closed = data + state_file.crc64(data).to_bytes(8, "little")
    assert state_file.is_complete(closed) is (len(data) > 0)
    assert not state_file.is_complete(closed[:-1] + bytes([closed[-1] ^ 1]))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state"
        assert state_file.take(path) == b""
        state_file.put(path, data)
        assert state_file.take(path) == data


async def http_api(data: bytes) -> None:
    """Whatever a VMM's API says, a call returns JSON of a bounded length, or fails with a reason."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "api"

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.readuntil(b"\r\n\r\n")
                for piece in pieces(data):
                    writer.write(piece)
                await writer.drain()
            except (OSError, EOFError):
                pass
            finally:
                writer.close()

        async with await asyncio.start_unix_server(serve, path):
            found = await UnixHttp(str(path)).call("GET", "/", seconds=10)
    assert found is None or len(json.dumps(found)) <= 8 * MAX_ANSWER_BYTES


def kvm_guest(data: bytes) -> None:
    """A state of our own guest is loaded where its memory and program can be, whoever made its checksum."""
    body = data[: kvm_state._SREGS_END]
    for one in (data, body + zlib.crc32(body).to_bytes(4, "little")):
        if one is data and zlib.crc32(body) != int.from_bytes(data[-4:], "little"):
            continue
        found = State.unpack(one, KvmLayout.of(16 << 20))
        assert found.memory_size == 16 << 20
        assert found.pack() == one


_CONFIG = {
    "memory_manager_data": {
        "guest_ram_mappings": [
            {"slot": 0, "gpa": 0, "size": 3 << 20, "file_offset": 0, "virtio_mem": False},
            {"slot": 1, "gpa": 1 << 32, "size": 1 << 20, "file_offset": 4096, "virtio_mem": False},
        ]
    },
    "vm_config": {"cpus": {"boot_vcpus": 1}},
}
_TEXT = json.dumps(_CONFIG)
CONFIGS = [
    _TEXT.encode(),
    json.dumps({**_CONFIG, "memory_mode": "Precopy"}).encode(),
    _TEXT.encode("utf-16"),
    _TEXT.encode("utf-8-sig"),
]
DEEP = [b"[" * n + b"]" * n for n in range(800, 1000, 8)]
_INFO = {"state": "Running", "config": {"memory": {"size": 1 << 30, "shared": True, "zones": None}}}
_HUGE = b'{"state":"Running","config":{"memory":{"zones":[{"size":1e400}]}}}'
_ZONES = b'{"state":"Paused","config":{"memory":{"zones":[{"size":%s},{"size":%s}]}}}' % (b"9" * 4300, b"9" * 4300)
_STARTS = abi.REQUEST.pack(Command.START, abi.VERSION.pack(0), 0) + abi.REQUEST.pack(Command.CONFIG, abi.NO_HEADERS, 2)
_STARTS += b"{}" + abi.REQUEST.pack(Command.MEMORY_FD, abi.NO_HEADERS, 4) + abi.SLOT.pack(1)
_MAPS = b"""\
7f0000000000-7f00c0000000 rw-p 00000000 00:00 0
7f0100000000-7f0140000000 rw-p 00000000 00:00 0                          [anon: guest]
7f0200000000-7f02c0000000 rw-s 00000000 00:01 77                         /memfd:guest (deleted)
7f0300000000-7f0340000000 rw-s c0000000 00:01 77                         /memfd:guest (deleted)
7f0400000000-7f0500000000 rw-p 00000000 00:00 0
"""
_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"


def _kvm_body() -> bytes:
    head = kvm_state._HEADER.pack(kvm_state._MAGIC, 16 << 20)
    layout = KvmLayout.of(16 << 20)
    work = Work.plan(7, layout.data_pages, layout.data_address, Order.SEQUENTIAL)
    return head + bytes(work.registers(layout.entry)) + bytes(ctypes.sizeof(kvm.Sregs))


VMM_TARGETS = (
    Target("saved guest", saved_guest, [SavedGuest(0, CONFIGS[0], b"state", []).pack()]),
    Target("guest config", config, CONFIGS),
    Target(
        "VM description",
        description,
        [
            json.dumps(_INFO).encode(),
            _HUGE,
            _ZONES,
            *(b'{"state":%s,"config":{"memory":{"size":1}}}' % one for one in DEEP),
        ],
    ),
    Target("migration peer", in_loop(migration_peer), [b"\5" + _STARTS, b"\0" + _STARTS[:34], b"\1" + _STARTS]),
    Target("migration answers", in_loop(migration_answers), [abi.RESPONSE.pack(1, 0) * 3, abi.RESPONSE.pack(2, 9)]),
    Target(
        "Firecracker API",
        in_loop(firecracker_api),
        [
            b'{"state":"Running","vmm_version":"1.13.0"}',
            b'{"mem_size_mib":128,"huge_pages":"2M","track_dirty_pages":true}',
            b'{"drives":[{"drive_id":"x","socket":"/s"}]}',
            *(b'{"mem_size_mib":%s,"vmm_version":%s,"huge_pages":%s}' % (deep, deep, deep) for deep in DEEP),
        ],
        (),
    ),
    Target("Firecracker memory", firecracker_memory, [_MAPS, _MAPS * 3], ()),
    Target("Firecracker state", firecracker_state, [b"state of a microVM", b"\0", b""], (), examples=50),
    Target(
        "HTTP API",
        in_loop(http_api),
        [
            b"\5" + _OK,
            b"\0" + _CHUNKED,
            b"\0HTTP/1.1 204 No Content\r\n\r\n",
            b"\0HTTP/1.1 400 Bad\r\nContent-Length: 3\r\n\r\nno!",
            b"\0HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            b"\0" + b"HTTP/1.1 100 Continue\r\n\r\n" * 50 + _OK,
            b"\0HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n{}",
            b"\0HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000 + b"\r\n\r\n{}",
            b"\0HTTP/1.1 302 Found\r\nLocation: /x\r\nSet-Cookie: \xff=\xff\r\nContent-Length: 0\r\n\r\n",
        ],
        examples=25,
    ),
    Target("KVM guest", kvm_guest, [_kvm_body()]),
)
