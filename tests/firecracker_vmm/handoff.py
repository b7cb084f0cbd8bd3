"""Guest memory under a userfaultfd, and its hand-off: one sendmsg, as Firecracker makes it, or a wrong one."""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
import time

from firecracker_vmm.memory import FirecrackerMemory
from pageferry import userfaultfd
from pageferry.abi import userfaultfd as abi
from pageferry.vmm.userfault import register_missing

FOREVER = 3600.0


def open_userfault(memory: FirecrackerMemory, device: int) -> int:
    """Return a userfaultfd over all memory; `device` is an open /dev/userfaultfd, or negative."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    if device >= 0:
        uffd = fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, flags)
    else:
        uffd = userfaultfd.new_userfaultfd(user_mode_only=False)
    features = abi.UFFD_FEATURE_EVENT_REMOVE
    fcntl.ioctl(uffd, abi.UFFDIO_API, bytearray(abi.API.pack(abi.UFFD_API, features, 0)))
    for one in memory.mapped:
        register_missing(uffd, one.address, one.size)
    return uffd


def table(memory: FirecrackerMemory, *, old_keys: bool) -> list[dict[str, int]]:
    offset, entries = 0, []
    for one in memory.mapped:
        sizes = {"page_size_kib": memory.page_size} if old_keys else {"page_size": memory.page_size}
        entries.append(
            {"base_host_virt_addr": one.address, "size": one.size, "offset": offset, **sizes}
            | ({} if old_keys else {"page_size_kib": memory.page_size})
        )
        offset += one.size
    return entries


def hand_over(path: str, memory: FirecrackerMemory, uffd: int, behave: str) -> socket.socket:
    """Connect and send; the socket stays open."""
    entries, fds = table(memory, old_keys=behave == "hand-old-keys"), [uffd]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    if behave == "hand-silent":
        time.sleep(FOREVER)
    spoil(behave, entries, fds)
    data = json.dumps(entries, separators=(",", ":")).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    if behave == "hand-huge":
        data = b"[" + b" " * (2 << 20) + data[1:]
        sent = connection.sendmsg([data], ancillary)
        connection.sendall(data[sent:])
    else:
        connection.sendmsg([data], ancillary)
    match behave:
        case "hand-then-dies":
            os._exit(1)
        case "hand-then-silent":
            time.sleep(FOREVER)
    return connection


def spoil(behave: str, entries: list[dict[str, int]], fds: list[int]) -> None:
    """Make the hand-off wrong in the way that `behave` names, if it names one."""
    match behave:
        case "hand-no-fd":
            fds.clear()
        case "hand-not-uffd":
            fds[:] = [os.memfd_create("no-userfaultfd")]
        case "hand-sizes":
            entries[0]["size"] *= 2
        case "hand-offsets":
            entries[-1]["offset"] += 4096
        case "hand-fewer":
            entries.pop()
        case "hand-more":
            entries.append(dict(entries[-1]))
        case "hand-page-size":
            entries[0]["page_size"] = entries[0]["page_size_kib"] = 2 << 20
