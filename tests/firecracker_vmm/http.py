"""Firecracker's HTTP server, as far as a client can tell: micro_http's answers on a Unix socket."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from firecracker_vmm.handoff import FOREVER
from firecracker_vmm.vmm import Fault, Vmm

MAX_BODY = 51200
_SERVER = "Server: Firecracker API\r\nConnection: keep-alive\r\n"


class ApiServer:
    """Serves one VMM, one call after the other."""

    def __init__(self, vmm: Vmm) -> None:
        self._vmm = vmm
        self._turn = asyncio.Lock()
        self._server: asyncio.Server | None = None

    async def start(self, path: str) -> None:
        self._server = await asyncio.start_unix_server(self._serve, path)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *headers = head.split("\r\n")
        method, path, _ = line.split(" ")
        length = 0
        for header in headers:
            name, _, value = header.partition(":")
            if name.lower() == "content-length":
                length = int(value)
        if length > MAX_BODY:
            writer.write(_answer(400, {"fault_message": "Payload too large."}))
            return False
        body = await reader.readexactly(length)
        if await self._odd(writer):
            return False
        async with self._turn:
            try:
                told = await self._vmm.answer(method, path, json.loads(body) if body else None)
                answer = _answer(204 if told is None else 200, told)
            except Fault as fault:
                answer = _answer(400, {"fault_message": str(fault)})
        writer.write(answer)
        await writer.drain()
        if self._vmm.failed:
            # Firecracker ends when a snapshot could not be loaded.
            writer.close()
            os._exit(1)
        return True

    async def _odd(self, writer: asyncio.StreamWriter) -> bool:
        """Answer as no Firecracker does, if it is to."""
        match self._vmm.behave:
            case "api-silent":
                await asyncio.sleep(FOREVER)
            case "api-hangs-up":
                return True
            case "api-no-json":
                writer.write(_frame(200, b"{'state'"))
            case "api-no-object":
                writer.write(_frame(200, b"[1]"))
            case "api-no-http":
                writer.write(b"\x00\x01\x02\r\n\r\n")
            case "api-gigabyte":
                writer.write(f"HTTP/1.1 200 \r\n{_SERVER}Content-Length: {1 << 30}\r\n\r\n".encode())
                while not writer.transport.is_closing():
                    writer.write(bytes(1 << 16))
                    await writer.drain()
            case _:
                return False
        await writer.drain()
        return True


def _answer(status: int, told: Any) -> bytes:
    return _frame(status, json.dumps(told, separators=(",", ":")).encode() if told is not None else b"")


def _frame(status: int, body: bytes) -> bytes:
    content = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    return f"HTTP/1.1 {status} \r\n{_SERVER}{content}\r\n".encode() + body
