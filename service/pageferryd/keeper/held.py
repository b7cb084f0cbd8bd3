"""The descriptors that the keeper holds, each with its name, in the order in which they came."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from pageferryd.linux import notify_wire
from pageferryd.linux.same_file import file_id, same_open_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Entry(NamedTuple):
    """One descriptor."""

    name: str
    fd: int
    polled: bool
    file: tuple[int, int]


class Held:
    """At most `capacity` descriptors, owned by this object."""

    def __init__(self, capacity: int, events: select.epoll) -> None:
        """`events` tells of those that hang up: see `hung_up`."""
        self.capacity = capacity
        self._events = events
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def store(self, name: str, fds: Sequence[int], *, poll: bool) -> int:
        """Hold descriptors, all of which this object owns from now on; return how many it refused for want of space.

        An open file that is held already is held once, under its first name.
        """
        refused = 0
        for fd in fds:
            file = file_id(fd)
            if not self._fits(name):
                refused += 1
                os.close(fd)
            elif any(entry.file == file and same_open_file(entry.fd, fd) for entry in self._entries):
                os.close(fd)
            else:
                self._entries.append(Entry(name, fd, poll and self._watch(fd), file))
        return refused

    def remove(self, name: str) -> None:
        """Let go of all descriptors of a name."""
        self._let_go([entry for entry in self._entries if entry.name == name])

    def hung_up(self, fd: int) -> str:
        """Let go of a descriptor of which `events` told; return its name, "" for one that is not held (any more)."""
        found = [entry for entry in self._entries if entry.fd == fd]
        self._let_go(found)
        return found[0].name if found else ""

    def close(self) -> None:
        """Let go of everything."""
        self._let_go(list(self._entries))

    def _fits(self, name: str) -> bool:
        count = len(self._entries) + 1
        characters = len(name) + sum(len(entry.name) for entry in self._entries)
        return count <= self.capacity and notify_wire.names_bytes(count, characters) <= notify_wire.MAX_NAMES_BYTES

    def _watch(self, fd: int) -> bool:
        # Memory cannot be polled, nor can it hang up: PermissionError.
        with suppress(PermissionError):
            self._events.register(fd, 0)
            return True
        return False

    def _let_go(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._entries.remove(entry)
            if entry.polled:
                # Closing is not enough: others may have the file open, and epoll would go on about it.
                self._events.unregister(entry.fd)
            os.close(entry.fd)
