"""What is read from files, and from /proc: settings, and what other processes have mapped."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

from target import Target

from pageferryd.config.model import Settings
from pageferryd.config.reading import load
from pageferryd.linux.proc import mapping_lines
from pageferryd.source.mappings import mappings
from pageferryd.vmm.firecracker import memory
from pageferryd.vmm.qemu.mapped import mapped

_LONGEST_NAME = 255


def settings(data: bytes) -> None:
    """A file that is accepted gives settings, and any other says what is wrong with it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pageferryd.toml"
        path.write_bytes(data)
        assert isinstance(load(path), Settings)


def _with_file(data: bytes) -> tuple[mmap.mmap, Path, tempfile.TemporaryDirectory[str]]:
    """Map a file with such a name into this process."""
    directory = tempfile.TemporaryDirectory()
    name = data.replace(b"/", b"_").replace(b"\0", b"_")[: _LONGEST_NAME - 1]
    path = Path(os.fsdecode(os.fsencode(directory.name) + b"/x" + name))
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 4096), path, directory


def mapped_names(data: bytes) -> None:
    """Whatever a process calls its files, each mapping of it is one line, and what is read of it the kernel's word."""
    held, path, directory = _with_file(data)
    try:
        kernels = Path("/proc/self/maps").read_bytes().count(b"\n")
        assert abs(len(mapping_lines(os.getpid())) - kernels) <= 2
        found = mappings(os.getpid(), 0, 1 << 64)
        assert abs(len(found) - kernels) <= 2
        assert all(one.start < one.end for one in found)
        memory._mapped(os.getpid())
    finally:
        held.close()
        path.unlink()
        directory.cleanup()


def mapped_names_at_qemu(data: bytes) -> None:
    """The same of the longer list that is read of a QEMU."""
    held, path, directory = _with_file(data)
    try:
        inode = path.stat().st_ino
        found = mapped(os.getpid())
        assert [one.size for one in found if one.inode == inode] == [4096]
        kernels = Path("/proc/self/maps").read_bytes().count(b"\n")
        assert abs(len(found) - kernels) <= 2
    finally:
        held.close()
        path.unlink()
        directory.cleanup()


_FILE = b"""\
host = "alpha"
listen = ["127.0.0.1:7070"]
insecure = true
[limits]
lane_silence_timeout = 2.5
[[guests]]
name = "web"
driver = "qemu"
endpoint = "/run/web.sock"
"""
_FORGED = b"\r7f0000000000-7f0000001000 rw-s 00000000 00:01 1"
SETTINGS = [_FILE, b"x = " + b"[" * 3000, b"x = " + b"9" * 5000, b"_build_sources = 3\n" + _FILE]
NAMES = [
    b"memory",
    b"with blanks \t",
    b"\xff\xfe",
    _FORGED,
    b"\rVmFlags: dc",
    b"\x0c" + _FORGED[1:],
    "\x85\u2028".encode(),
]

FILE_TARGETS = (
    Target("settings", settings, SETTINGS),
    Target("mapped names", mapped_names, NAMES, (), examples=40),
    Target("mapped names at QEMU", mapped_names_at_qemu, NAMES, (), examples=25),
)
