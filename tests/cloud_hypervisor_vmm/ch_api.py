"""The API: HTTP on a Unix socket, one call after another as the VMM's one control loop takes them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from aiohttp import web
from ch_vm import Vmm, VmmError


class ApiServer:
    def __init__(self, vmm: Vmm) -> None:
        self._vmm = vmm
        self._turn = asyncio.Lock()
        self._runner: web.AppRunner | None = None

    async def start(self, path: str) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/api/v1/vm.info", self._info),
                web.put("/api/v1/vm.pause", self._pause),
                web.put("/api/v1/vm.resume", self._resume),
                web.put("/api/v1/vm.send-migration", self._send),
                web.put("/api/v1/vm.receive-migration", self._receive),
                web.put("/api/v1/vmm.shutdown", self._shutdown),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, path).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _info(self, _request: web.Request) -> web.Response:
        match self._vmm.behave:
            case "info-500":
                return web.Response(status=500, text="the VM is in a bad mood")
            case "info-nonsense":
                return web.Response(text="{not json")
            case "info-list":
                return web.json_response(["Running"])
            case "info-empty":
                return web.json_response({"state": "Running"})
            case "info-endless":
                return web.Response(body=bytes(8 << 20))
            case "info-hangs":
                await asyncio.sleep(3600)
            case "info-dies":
                os._exit(1)
        async with self._turn:
            info = self._vmm.info()
        if info is None:
            return web.json_response(
                ["Error from API", "The VM info is not available", "VM is not created"], status=404
            )
        return web.json_response(info)

    async def _pause(self, _request: web.Request) -> web.Response:
        if self._vmm.behave == "pause-500":
            return web.Response(status=500, text="cannot pause: a vCPU does not stop")
        return await self._call(self._vmm.pause())

    async def _resume(self, _request: web.Request) -> web.Response:
        return await self._call(self._vmm.resume())

    async def _send(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self._vmm.behave == "send-500":
            return web.Response(status=500, text="Local migration requires shared memory or hugepages enabled")
        late = self._vmm.answers_late
        answer = await self._call(self._vmm.send_migration(body["destination_url"], body["local"]))
        if late and answer.status < 300:
            try:
                await self._vmm.sent()
            except VmmError as error:
                return web.Response(status=500, text=str(error))
        return answer

    async def _receive(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self._vmm.behave == "receive-500":
            return web.Response(status=500, text="Error binding to UNIX domain socket")
        mode = body.get("memory_mode", "Precopy")
        # As serde reads the enumeration.
        if mode not in ("Precopy", "Postcopy"):
            return web.Response(status=400, text=f"unknown variant `{mode}`, expected `Precopy` or `Postcopy`")
        return await self._call(self._vmm.receive_migration(body["receiver_url"], mode))

    async def _shutdown(self, _request: web.Request) -> web.Response:
        if self._vmm.behave == "shutdown-500":
            return web.Response(status=500, text="The VM is migrating")
        async with self._turn:
            asyncio.get_running_loop().call_later(0.02, os._exit, 0)
        return web.Response(status=204)

    async def _call(self, call: Any) -> web.Response:
        async with self._turn:
            try:
                await call
            except VmmError as error:
                return web.Response(status=500, text=str(error))
        return web.Response(status=204)
