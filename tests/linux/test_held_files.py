"""Which files a process has in its hands: what it has opened to read or has mapped, and nothing that it only names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pageferry.errors import FerryError, Reason
from pageferryd.linux import held_files
from pageferryd.linux.held_files import holds_file, may_read

pytestmark = pytest.mark.root

# Opens its argument in one way, says so, and waits until its input ends.
HOLDER = """
import mmap, os, sys
how, path = sys.argv[1:]
flags = {"read": os.O_RDONLY, "write": os.O_WRONLY, "both": os.O_RDWR, "name only": os.O_PATH}
if how in flags:
    fd = os.open(path, flags[how])
elif how != "nothing":
    fd = os.open(path, os.O_RDWR)
    kind = mmap.MAP_SHARED if how == "mapped" else mmap.MAP_PRIVATE
    memory = mmap.mmap(fd, 4096, kind, mmap.PROT_READ | mmap.PROT_WRITE)
    # The module keeps a descriptor of its own.
    os.closerange(3, 64)
print("held", flush=True)
sys.stdin.read()
os._exit(0)
"""

Hold = Callable[[str, Path], int]


@pytest.fixture
def hold() -> Iterator[Hold]:
    children: list[subprocess.Popen[bytes]] = []

    def start(how: str, path: Path) -> int:
        pipe = subprocess.PIPE
        child = subprocess.Popen([sys.executable, "-c", HOLDER, how, str(path)], stdin=pipe, stdout=pipe)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        return child.pid

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A file, and a descriptor of it here."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDONLY)
    yield path, fd
    os.close(fd)


@pytest.mark.parametrize("how", ["read", "both", "mapped", "mapped privately"])
def test_what_a_process_reads_is_in_its_hands(hold: Hold, memory: tuple[Path, int], how: str) -> None:
    assert holds_file(hold(how, memory[0]), memory[1])


@pytest.mark.parametrize("how", ["nothing", "write", "name only"])
def test_what_a_process_may_not_read_is_not(hold: Hold, memory: tuple[Path, int], how: str) -> None:
    assert not holds_file(hold(how, memory[0]), memory[1])


def test_another_file_in_its_place_is_not_the_same(hold: Hold, memory: tuple[Path, int]) -> None:
    path, fd = memory
    pid = hold("both", path)
    path.unlink()
    path.write_bytes(bytes(4096))
    other = os.open(path, os.O_RDONLY)
    try:
        assert holds_file(pid, fd)
        assert not holds_file(pid, other)
    finally:
        os.close(other)


def test_a_mapping_is_found_where_map_files_may_not_be_read(
    hold: Hold, memory: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, _wanted: os.stat_result) -> bool:
        raise PermissionError(f"no CAP_SYS_ADMIN: {path}")

    monkeypatch.setattr(held_files, "_is", refused)
    assert holds_file(hold("mapped", memory[0]), memory[1])


def test_a_process_with_countless_files_is_not_searched_for_ever(
    hold: Hold, memory: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_files, "MOST_FILES", 2)
    with pytest.raises(FerryError, match="more than 2") as refused:
        holds_file(hold("nothing", memory[0]), memory[1])
    assert refused.value.reason is Reason.INVALID_ARGUMENT


def test_a_process_that_is_gone_is_said_to_be(memory: tuple[Path, int]) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(FerryError) as gone:
        holds_file(child.pid, memory[1])
    assert gone.value.reason is Reason.VMM_GONE


@pytest.mark.parametrize(
    ("flags", "readable"),
    [(os.O_RDONLY, True), (os.O_RDWR, True), (os.O_WRONLY, False), (os.O_PATH, False)],
)
def test_a_descriptor_shows_whether_its_maker_might_read(tmp_path: Path, flags: int, readable: bool) -> None:
    path = tmp_path / "file"
    path.touch()
    fd = os.open(path, flags)
    try:
        assert may_read(fd) is readable
    finally:
        os.close(fd)
