"""A MigrationService that plays a part by the guest's name: run as a process, it prints its address and serves.

Guests: `web` crosses, `doomed` fails, `undone` is cancelled, `cut` has its watch end early, `slow` never ends, `held`
cannot be moved, `absent` does not answer, `queued` waits for its turn before it crosses; for those in doubt see
fake_handovers.py.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import fake_handovers
import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_status import rpc_status

from pageferry.errors import FerryError, Reason, to_status
from pageferry.v1 import migration_pb2 as pb
from pageferry.v1 import migration_pb2_grpc

MIB_PAGES = 256
DRIVERS = ("vmm", "qemu", "cloud-hypervisor", "firecracker")
HELD = ("it is paused: only a running guest can be moved", "a host device is passed through to it: net0")


def check(name: str, status: int = pb.CHECK_STATUS_OK, detail: str = "in order", remedy: str = "") -> pb.Check:
    return pb.Check(name=name, status=status, detail=detail, remedy=remedy)


def latency(stage: str, scale: float) -> pb.StageLatency:
    times = {"mean_us": 300, "p50_us": 250, "p90_us": 800, "p99_us": 2500, "max_us": 9000}
    return pb.StageLatency(
        stage=stage, latency=pb.LatencySummary(count=1000, **{name: us * scale for name, us in times.items()})
    )


def example(state: int = pb.MIGRATION_STATE_POSTCOPY, percent: int = 45, guest_id: str = "web") -> pb.Migration:
    """Return a migration of 16 MiB in 16 cells, of which `percent` is in; every 16th page came by demand."""
    total = 16 * MIB_PAGES
    present = total * percent // 100
    full = percent * 16 // 100
    demand = [16 if cell < full else 0 for cell in range(16)]
    push = [240 if cell < full else 0 for cell in range(16)]
    if full < 16:
        push[full] = present - full * MIB_PAGES
    found = pb.Migration(
        migration_id=f"m-{guest_id}",
        guest_id=guest_id,
        role=pb.ROLE_SOURCE,
        state=state,
        source_name="alpha",
        destination_name="beta",
        destination_address="127.0.0.1:7444",
        create_time=Timestamp(seconds=1_700_000_000),
        progress=pb.Progress(
            pages_total=total,
            pages_present=present,
            demand_pages=sum(demand),
            push_pages=sum(push),
            zero_pages=100,
            demand_bytes=sum(demand) * 4096,
            push_bytes=sum(push) * 4096,
            faults=1234,
            faults_waiting=3,
            push_bytes_per_second=200.0 * 1024 * 1024,
        ),
        fault_latencies=[latency("read", 0.1), latency("fetched", 0.8), latency("total", 1)],
        memory_map=pb.MemoryMap(pages_per_cell=MIB_PAGES, demand_pages=demand, push_pages=push),
    )
    if state == pb.MIGRATION_STATE_COMPLETED:
        found.downtime.CopyFrom(Duration(nanos=12_300_000))
        found.postcopy_duration.CopyFrom(Duration(nanos=500_000_000))
        found.end_time.CopyFrom(Timestamp(seconds=1_700_000_001))
    return found


def failed(guest_id: str = "doomed") -> pb.Migration:
    found = example(pb.MIGRATION_STATE_FAILED, 0, guest_id)
    found.error.CopyFrom(
        pb.ErrorDetail(reason="DESTINATION_REFUSED", message=f"beta refused {guest_id}; it runs on at alpha")
    )
    return found


def immovable() -> pb.Migration:
    found = example(pb.MIGRATION_STATE_FAILED, 0, "held")
    found.error.CopyFrom(
        pb.ErrorDetail(reason="GUEST_NOT_MOVABLE", message=f"guest held cannot be moved: {'; '.join(HELD)}")
    )
    return found


def queued(position: int = 3) -> pb.Migration:
    found = example(pb.MIGRATION_STATE_PENDING, 0, "queued")
    found.queue_position = position
    for field in ("fault_latencies", "memory_map"):
        found.ClearField(field)
    return found


def final(guest_id: str) -> pb.Migration:
    if guest_id == "doomed":
        return failed()
    if guest_id == "held":
        return immovable()
    if guest_id == "undone":
        return example(pb.MIGRATION_STATE_CANCELLED, 0, "undone")
    return example(pb.MIGRATION_STATE_COMPLETED, 100, guest_id)


class FakeSidecar(migration_pb2_grpc.MigrationServiceServicer):
    def __init__(self) -> None:
        self.guests = {
            name: pb.Guest(
                guest_id=name,
                driver="vmm",
                vmm_address=f"/run/{name}.sock",
                state=pb.GUEST_STATE_RUNNING,
                memory_bytes=1 << 24,
                pid=4242,
                movable=True,
            )
            for name in ("cut", "doomed", "queued", "slow", "undone", "web", *fake_handovers.IN_DOUBT)
        }
        self.guests["held"] = pb.Guest(
            guest_id="held",
            driver="qemu",
            vmm_address="/run/held.qmp",
            state=pb.GUEST_STATE_PAUSED,
            memory_bytes=1 << 30,
            pid=77,
            obstacles=HELD,
        )
        self.guests["absent"] = pb.Guest(
            guest_id="absent",
            driver="firecracker",
            vmm_address="/run/absent.sock",
            obstacles=["nobody listens at /run/absent.sock: No such file or directory; is the VMM running?"],
        )
        self.limits: dict[str, pb.Limits] = {}

    async def Preflight(self, request, context):
        answer = pb.PreflightResponse(release="9.9", checks=[check("userfaultfd")])
        if request.guest_id:
            answer.checks.append(check("guest", pb.CHECK_STATUS_WARNING, f"{request.guest_id} is large", "be patient"))
        if request.destination_address:
            answer.destination_checks.append(
                check("memory", pb.CHECK_STATUS_FAILED, f"{request.destination_name} has too little", "add some")
            )
        return answer

    async def RegisterGuest(self, request, context):
        if request.vmm_address.endswith("absent.sock"):
            await refuse(context, Reason.VMM_UNREACHABLE, f"no VMM at {request.vmm_address};\nstart it first")
        if request.driver not in DRIVERS:
            known = ", ".join(DRIVERS)
            await refuse(context, Reason.INVALID_ARGUMENT, f"there is no driver {request.driver!r}: use one of {known}")
        guest = pb.Guest(
            guest_id=request.guest_id,
            driver=request.driver,
            vmm_address=request.vmm_address,
            state=pb.GUEST_STATE_INCOMING,
            pid=42,
            obstacles=["its VMM waits for the guest to come"],
        )
        return pb.RegisterGuestResponse(guest=guest)

    async def UnregisterGuest(self, request, context):
        await self._known_guest(request.guest_id, context)
        return pb.UnregisterGuestResponse()

    async def ListGuests(self, request, context):
        return pb.ListGuestsResponse(guests=self.guests.values())

    async def StartMigration(self, request, context):
        await self._known_guest(request.guest_id, context)
        found = example(pb.MIGRATION_STATE_PENDING, 0, request.guest_id)
        found.request_id = request.request_id
        found.destination_name = request.destination_name
        found.destination_address = request.destination_address
        found.limits.CopyFrom(request.limits)
        found.policy.CopyFrom(request.policy)
        self.limits[found.migration_id] = request.limits
        return pb.StartMigrationResponse(migration=found)

    async def GetMigration(self, request, context):
        return pb.GetMigrationResponse(migration=await self._known(request, context))

    async def ListMigrations(self, request, context):
        found = [final("web"), failed(), queued(), example(pb.MIGRATION_STATE_IN_DOUBT, 45, "lost")]
        return pb.ListMigrationsResponse(
            migrations=[one for one in found if request.guest_id in ("", one.guest_id)],
        )

    async def WatchMigration(self, request, context):
        found = await self._known(request, context)
        if found.guest_id == "lost":
            yield pb.WatchMigrationResponse(migration=found)
            yield pb.WatchMigrationResponse(migration=failed("lost"))
            return
        if found.guest_id == "queued":
            for position in (3, 2):
                yield pb.WatchMigrationResponse(migration=queued(position))
        yield pb.WatchMigrationResponse(migration=example(pb.MIGRATION_STATE_PREPARING, 0, found.guest_id))
        yield pb.WatchMigrationResponse(migration=example(guest_id=found.guest_id))
        if found.guest_id == "cut":
            return
        if found.guest_id == "slow":
            await asyncio.Event().wait()
        yield pb.WatchMigrationResponse(migration=final(found.guest_id))

    async def CancelMigration(self, request, context):
        found = await self._known(request, context)
        if found.guest_id == "web":
            await refuse(context, Reason.ALREADY_COMMITTED, "web runs at beta already")
        found.state = pb.MIGRATION_STATE_CANCELLED
        return pb.CancelMigrationResponse(migration=found)

    async def ResumeMigration(self, request, context):
        return pb.ResumeMigrationResponse(migration=await self._known(request, context))

    async def SetLimits(self, request, context):
        found = await self._known(request, context)
        found.limits.CopyFrom(request.limits)
        self.limits[request.migration_id] = request.limits
        return pb.SetLimitsResponse(migration=found)

    async def ResolveMigration(self, request, context):
        guest_id = (await self._known(request, context)).guest_id
        if request.decision == pb.DECISION_UNSPECIFIED:
            return pb.ResolveMigrationResponse(ends=fake_handovers.ends(guest_id))
        if guest_id == "mute":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        try:
            return pb.ResolveMigrationResponse(ends=fake_handovers.decided(guest_id, request))
        except FerryError as error:
            await refuse(context, error.reason, error.message)

    async def _known_guest(self, guest_id, context):
        if guest_id not in self.guests:
            await refuse(context, Reason.UNKNOWN_GUEST, f"{guest_id} is not registered here; register it first")

    async def _known(self, request, context):
        guest_id = request.migration_id.removeprefix("m-")
        if guest_id not in self.guests:
            await refuse(context, Reason.UNKNOWN_MIGRATION, f"there is no migration {request.migration_id}")
        found = self._standing(guest_id)
        found.limits.CopyFrom(self.limits.get(request.migration_id, pb.Limits()))
        return found

    @staticmethod
    def _standing(guest_id: str) -> pb.Migration:
        if guest_id == "slow":
            return example(guest_id=guest_id)
        if guest_id == "queued":
            return queued()
        if guest_id in fake_handovers.IN_DOUBT:
            found = example(pb.MIGRATION_STATE_IN_DOUBT, guest_id=guest_id)
            found.policy.CopyFrom(pb.Policy(on_loss=pb.ON_LOSS_KILL, loss_seconds=600, checksums=True))
            found.progress.checksum_mismatches = 2
            return found
        return final(guest_id)


async def refuse(context, reason: Reason, message: str) -> None:
    await context.abort_with_status(rpc_status.to_status(to_status(FerryError(reason, message))))


async def serve(address: str) -> None:
    server = grpc.aio.server()
    migration_pb2_grpc.add_MigrationServiceServicer_to_server(FakeSidecar(), server)
    port = server.add_insecure_port(address)
    await server.start()
    print(address if address.startswith("unix:") else f"127.0.0.1:{port}", flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
