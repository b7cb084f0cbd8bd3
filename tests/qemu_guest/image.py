"""The guest's kernel and initramfs: found or built once, in .make/guest, which tools/system_packages.sh fills.

The initramfs is a cpio archive in the "newc" format (the kernel's driver-api/early-userspace/buffer-format.rst).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_CACHE = _HERE.parent.parent / ".make" / "guest"
_SOURCES = ("workload.c", "workers.c")
_HEADERS = ("gaps.h", "pages.h", "workers.h")
_COMPILE = ("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread")
_COMPILE_SECONDS = 60.0

QEMU = "qemu-system-x86_64"


@dataclass(frozen=True)
class GuestImage:
    """What QEMU boots."""

    kernel: Path
    initramfs: Path


def what_is_missing(qemu: str = QEMU) -> str | None:
    """Say why no guest can be started here and which Debian package would help; None where it can."""
    if platform.machine() != "x86_64":
        return f"the guest's program is compiled for x86-64, and this machine is {platform.machine()}"
    for program, package in ((qemu, "qemu-system-x86"), ("setpriv", "util-linux"), ("gcc", "gcc")):
        if shutil.which(program) is None:
            return f"{program} is missing; it is in the package {package}"
    if not _has_static_libc():
        return "libc.a is missing; it is in the package libc6-dev"
    if _find_busybox() is None:
        return "a statically linked busybox is missing; it is in the package busybox-static"
    if _find_kernel() is None:
        return "Debian's cloud kernel is missing; tools/system_packages.sh unpacks it from linux-image-cloud-amd64"
    return None


def build(directory: Path = _CACHE) -> GuestImage:
    """Return the image, built in the directory if need be. RuntimeError: what is missing, or the compiler says."""
    kernel, busybox = _find_kernel(), _find_busybox()
    if kernel is None or busybox is None:
        raise RuntimeError(f"the guest's image cannot be built: {what_is_missing()}")
    initramfs = directory / f"initramfs-{_key(busybox)}.cpio"
    if not initramfs.exists():
        _write_whole(initramfs, _archive(busybox, _compile()))
    return GuestImage(kernel, initramfs)


def _find_kernel() -> Path | None:
    candidates = [_CACHE / "vmlinuz", *sorted(Path("/boot").glob("vmlinuz-*cloud*"), reverse=True)]
    return next((path for path in candidates if os.access(path, os.R_OK)), None)


def _find_busybox() -> Path | None:
    on_path = shutil.which("busybox")
    candidates = [_CACHE / "busybox", *([Path(on_path)] if on_path else [])]
    return next((path for path in candidates if path.is_file() and _is_static(path)), None)


def _is_static(program: Path) -> bool:
    # A dynamic program names its loader near its beginning, in PT_INTERP.
    with program.open("rb") as file:
        return b"/ld-linux" not in file.read(4096)


def _has_static_libc() -> bool:
    asked = subprocess.run(["gcc", "-print-file-name=libc.a"], capture_output=True, text=True, check=False, timeout=10)
    return "/" in asked.stdout


def _key(busybox: Path) -> str:
    digest = hashlib.sha256(" ".join(_COMPILE).encode())
    for path in (*(_HERE / name for name in (*_SOURCES, *_HEADERS, "init")), Path(__file__), busybox):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile() -> bytes:
    with tempfile.TemporaryDirectory(prefix="guest-") as scratch:
        program = Path(scratch) / "workload"
        command = [*_COMPILE, "-o", str(program), *(str(_HERE / name) for name in _SOURCES)]
        compiled = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMPILE_SECONDS)
        if compiled.returncode:
            raise RuntimeError(f"the guest's program does not compile:\n{compiled.stderr}")
        return program.read_bytes()


def _archive(busybox: Path, workload: bytes) -> bytes:
    folder, program = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755
    entries = [(name, folder, b"") for name in ("bin", "dev", "proc", "sys")]
    entries += [
        ("bin/busybox", program, busybox.read_bytes()),
        ("bin/workload", program, workload),
        ("init", program, (_HERE / "init").read_bytes()),
        ("TRAILER!!!", 0, b""),
    ]
    return b"".join(_entry(inode, *entry) for inode, entry in enumerate(entries, 1))


def _entry(inode: int, name: str, mode: int, content: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device (2), the device that it is (2), name's length, checksum
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + encoded) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _write_whole(path: Path, content: bytes) -> None:
    """Write the file so that nobody sees a part of it, however many build it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, scratch = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
        Path(scratch).rename(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
