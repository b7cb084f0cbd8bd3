"""A sidecar for the demonstration that moves nothing: it tells the stand-in guests by files to go and to come.

`STAND_IN` in the environment names what goes wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import grpc
from google.protobuf.duration_pb2 import Duration

from pageferry.v1 import migration_pb2 as pb
from pageferry.v1 import migration_pb2_grpc

WRONG = os.environ.get("STAND_IN", "")
PAGES = 1024


class StandIn(migration_pb2_grpc.MigrationServiceServicer):
    def __init__(self) -> None:
        self.directory = Path()

    async def Preflight(self, request, context):
        checks = [pb.Check(name="userfaultfd", status=pb.CHECK_STATUS_OK, detail="usable")]
        if WRONG == "preflight":
            checks.append(
                pb.Check(name="ptrace", status=pb.CHECK_STATUS_FAILED, detail="not permitted", remedy="run as root")
            )
        return pb.PreflightResponse(release="0", checks=checks)

    async def RegisterGuest(self, request, context):
        self.directory = Path(request.vmm_address).parent
        return pb.RegisterGuestResponse(guest=pb.Guest(guest_id=request.guest_id))

    async def StartMigration(self, request, context):
        return pb.StartMigrationResponse(migration=migration(pb.MIGRATION_STATE_PENDING))

    async def WatchMigration(self, request, context):
        yield pb.WatchMigrationResponse(migration=migration(pb.MIGRATION_STATE_PREPARING))
        if WRONG == "never ends":
            await asyncio.Event().wait()
        if WRONG == "migration":
            failed = migration(pb.MIGRATION_STATE_FAILED)
            failed.error.CopyFrom(pb.ErrorDetail(reason="LAYOUT_MISMATCH", message="the guests differ"))
            yield pb.WatchMigrationResponse(migration=failed)
            return
        (self.directory / "guest.sock.go").touch()
        (self.directory / "incoming.sock.go").touch()
        yield pb.WatchMigrationResponse(migration=migration(pb.MIGRATION_STATE_COMPLETED))

    async def GetMigration(self, request, context):
        return pb.GetMigrationResponse(migration=migration(pb.MIGRATION_STATE_COMPLETED))


def migration(state: int) -> pb.Migration:
    found = pb.Migration(migration_id="m", guest_id="demo", state=state, source_name="alpha", destination_name="beta")
    if state == pb.MIGRATION_STATE_COMPLETED:
        found.progress.CopyFrom(pb.Progress(pages_total=PAGES, pages_present=PAGES, push_pages=PAGES, push_bytes=4096))
        found.downtime.CopyFrom(Duration(nanos=7_000_000))
        found.postcopy_duration.CopyFrom(Duration(nanos=90_000_000))
    return found


async def main() -> None:
    if WRONG == "sidecar":
        print("pageferryd: no port is free", file=sys.stderr)
        sys.exit(2)
    server = grpc.aio.server()
    migration_pb2_grpc.add_MigrationServiceServicer_to_server(StandIn(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("a line of no log", file=sys.stderr)
    ready = {"event": "ready", "listen": [f"127.0.0.1:{port}"], "http": "127.0.0.1:1", "host": "x"}
    print(json.dumps(ready), file=sys.stderr, flush=True)
    await ended.wait()
    await server.stop(None)


asyncio.run(main())
