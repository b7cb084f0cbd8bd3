"""The source's side of a local migration; runs in a thread."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from ch_memory import TwoRegions
from ch_wire import (
    ABANDON,
    COMPLETE,
    COMPLETE_PAUSED,
    CONFIG,
    MEMORY_FD,
    START,
    STATE,
    expect_ok,
    hang,
    request,
    send_slot,
    wait_until_gone,
)

GIB = 1 << 30


def send(path: str, memory: TwoRegions, config: dict[str, Any], state: bytes, was_running: bool, behave: str) -> None:
    """Send the VM; ProtocolError where the peer refuses it."""
    if behave == "silent-connect":
        wait_until_gone(path)
    if behave == "dies-connect":
        os._exit(1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        walk = _Walk(connection, behave)
        if behave == "wrong-order":
            walk.ask(STATE, state)
        walk.misbehave("start")
        connection.sendall(request(START, version=7 if behave == "wrong-version" else 0))
        expect_ok(connection, "Start")
        if behave == "abandon":
            walk.ask(ABANDON)
        if behave == "unknown-command":
            walk.ask(77)
        walk.slots(memory)
        walk.config(config)
        walk.state(state)
        walk.misbehave("complete")
        walk.ask(COMPLETE if was_running or behave == "was-running" else COMPLETE_PAUSED)


class _Walk:
    def __init__(self, connection: socket.socket, behave: str) -> None:
        self._connection = connection
        self._behave = behave

    def misbehave(self, step: str) -> None:
        if self._behave == f"silent-{step}":
            hang(self._connection)
        if self._behave == f"dies-{step}":
            os._exit(1)

    def ask(self, command: int, payload: bytes = b"") -> None:
        self._connection.sendall(request(command, len(payload)) + payload)
        expect_ok(self._connection, str(command))

    def slots(self, memory: TwoRegions) -> None:
        for one in memory.mappings:
            self.misbehave("slot")
            if self._behave == "slot-missing" and one is memory.mappings[-1]:
                continue
            times = 2 if self._behave == "slot-twice" else 1
            for _ in range(times):
                self._slot(one.slot, memory.files[one.slot])

    def _slot(self, slot: int, fd: int) -> None:
        length = 12 if self._behave == "slot-length" else 4
        self._connection.sendall(request(MEMORY_FD, length))
        fds = [fd]
        if self._behave == "no-fd":
            fds = []
        elif self._behave == "two-fds":
            fds = [fd, fd]
        elif self._behave == "not-a-memfd":
            fds = [os.open("/dev/zero", os.O_RDWR)]
        elif self._behave == "small-memfd":
            fds = [os.memfd_create("small")]
        send_slot(self._connection, slot, fds)
        expect_ok(self._connection, "MemoryFd")

    def config(self, config: dict[str, Any]) -> None:
        self.misbehave("config")
        match self._behave:
            case "huge-config":
                self._connection.sendall(request(CONFIG, GIB))
                hang(self._connection)
            case "not-json":
                self.ask(CONFIG, b"\xff{" * 100)
            case "nested-json":
                self.ask(CONFIG, b"[" * 100_000)
            case "says-memfds":
                # As releases after v53 do.
                config["memory_mode"] = "MemFDs"
        _spoil(config, self._behave)
        self.ask(CONFIG, json.dumps(config).encode())

    def state(self, state: bytes) -> None:
        self.misbehave("state")
        if self._behave == "huge-state":
            self._connection.sendall(request(STATE, GIB))
            hang(self._connection)
        if self._behave == "half-state":
            self._connection.sendall(request(STATE, len(state)) + state[:10])
            hang(self._connection)
        self.ask(STATE, b"" if self._behave == "empty-state" else state)


def _spoil(config: dict[str, Any], behave: str) -> None:
    data = config["memory_manager_data"]
    last = data["guest_ram_mappings"][-1]
    match behave:
        case "no-regions":
            data["guest_ram_mappings"] = []
        case "no-memory-manager":
            del config["memory_manager_data"]
        case "overlapping-regions":
            last["gpa"] = 0
        case "odd-region":
            last["size"] += 100
        case "endless-region":
            last["size"] = 1 << 62
        case "words-for-numbers":
            last["gpa"] = "high"
        case "virtio-mem":
            last["virtio_mem"] = True
