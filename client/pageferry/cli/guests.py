"""The commands about a host and its guests: preflight, register, unregister."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from pageferry.cli import tables
from pageferry.cli.options import Connection, GuestId, Json
from pageferry.cli.output import console, print_json, show, to_dict
from pageferry.client import DRIVER_VMM
from pageferry.v1 import migration_pb2 as pb


def preflight(
    context: typer.Context,
    guest: Annotated[str, typer.Option("--guest", metavar="GUEST", help="Check this guest as well.")] = "",
    to: Annotated[str, typer.Option("--to", metavar="ADDRESS", help="Check this destination's sidecar as well.")] = "",
    to_name: Annotated[str, typer.Option("--to-name", metavar="NAME", help="Name in its certificate.")] = "",
    as_json: Json = False,
) -> None:
    """Check what a host needs, and name the remedies.

    Looks at permissions, devices, sysctls and limits, and says what to do about those that are in the way.

    Exit status 1 when a check failed.
    """
    found = asyncio.run(_preflight(context.obj, guest, to, to_name))
    if as_json:
        print_json(to_dict(found))
    else:
        _print_checks(found)
    if any(check.status == pb.CHECK_STATUS_FAILED for check in (*found.checks, *found.destination_checks)):
        raise typer.Exit(1)


async def _preflight(connection: Connection, guest: str, to: str, to_name: str) -> pb.PreflightResponse:
    async with connection.client() as client:
        return await client.preflight(guest, to, to_name)


def _print_checks(found: pb.PreflightResponse) -> None:
    out = console()
    out.print(f"pageferryd {found.release}", markup=False)
    show(out, tables.checks(found.checks))
    if found.destination_checks:
        out.print("destination:")
        show(out, tables.checks(found.destination_checks))


def register(
    context: typer.Context,
    guest: GuestId,
    vmm: Annotated[Path, typer.Argument(metavar="SOCKET", help="The Unix socket of its VMM's API.")],
    driver: Annotated[
        str,
        typer.Option(
            metavar="DRIVER",
            help="The kind of VMM: vmm (one that serves VmmService), qemu (SOCKET is a QMP monitor of its own), "
            "cloud-hypervisor or firecracker (SOCKET is its HTTP API).",
        ),
    ] = DRIVER_VMM,
    as_json: Json = False,
) -> None:
    """Tell the sidecar of a guest.

    Either of one that runs, and can be moved away, or of a VMM that waits for one to come. The same again is harmless.
    Guests that the sidecar shall know after each of its starts belong into its configuration.
    """
    # The sidecar's working directory is not the caller's.
    found = asyncio.run(_register(context.obj, guest, str(vmm.absolute()), driver))
    if as_json:
        print_json(to_dict(found))
    else:
        show(console(), tables.guests([found]))


async def _register(connection: Connection, guest: str, vmm: str, driver: str) -> pb.Guest:
    async with connection.client() as client:
        return await client.register_guest(guest, vmm, driver)


def unregister(context: typer.Context, guest: GuestId, as_json: Json = False) -> None:
    """Make the sidecar forget a guest. The guest itself is not touched."""
    asyncio.run(_unregister(context.obj, guest))
    if as_json:
        print_json({"guest_id": guest})
    else:
        console().print(f"{guest} is forgotten", markup=False)


async def _unregister(connection: Connection, guest: str) -> None:
    async with connection.client() as client:
        await client.unregister_guest(guest)
