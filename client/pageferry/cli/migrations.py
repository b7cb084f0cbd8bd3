"""The commands about migrations: migrate, list, show, watch, cancel, resume, limits."""

from __future__ import annotations

import asyncio
import sys
import uuid
from contextlib import aclosing
from typing import Annotated

import typer

from pageferry.cli import live, options, output, tables
from pageferry.cli.options import (
    Checksums,
    Connection,
    FaultObjective,
    GuestId,
    Json,
    LossSeconds,
    MigrationId,
    OnLoss,
    Push,
    PushRate,
    PushWeight,
    PushWindow,
)
from pageferry.cli.output import console, print_json, to_dict
from pageferry.client import SidecarClient, ended
from pageferry.v1 import migration_pb2 as pb


def migrate(
    context: typer.Context,
    guest: GuestId,
    to: Annotated[str, typer.Option("--to", metavar="ADDRESS", help="Address of the destination's sidecar.")],
    to_name: Annotated[
        str, typer.Option("--to-name", metavar="NAME", help="Name in its certificate; memory goes to no other.")
    ] = "",
    request_id: Annotated[
        str,
        typer.Option("--request-id", metavar="ID", help="The same id means the same start. Default: random."),
    ] = "",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the migration until it ends.")] = True,
    push_rate: PushRate = None,
    push_window: PushWindow = None,
    fault_objective: FaultObjective = None,
    push: Push = None,
    push_weight: PushWeight = None,
    on_loss: OnLoss = None,
    loss_seconds: LossSeconds = None,
    checksums: Checksums = False,
    as_json: Json = False,
) -> None:
    """Move a guest to another host, and follow it there.

    One that cannot be moved runs on where it is, and the error says why; `list` tells before. Where many move at once
    it may have to wait for its turn.

    Exit status 1 when the migration fails or is cancelled.
    """
    limits = options.limits(push_rate, push_window, fault_objective, push, push_weight)
    policy = options.policy(on_loss, loss_seconds, checksums)
    request = request_id or str(uuid.uuid4())

    async def move() -> pb.Migration:
        async with _client(context) as client:
            found = await client.start_migration(
                guest, to, request_id=request, destination_name=to_name, limits=limits, policy=policy
            )
            return await _follow(client, found.migration_id, as_json) if wait else found

    _finish(asyncio.run(move()), as_json)


def list_all(
    context: typer.Context,
    guest: Annotated[str, typer.Option("--guest", metavar="GUEST", help="Only this guest and its migrations.")] = "",
    as_json: Json = False,
) -> None:
    """List the guests that the host can move, and the migrations that the sidecar knows.

    Says of each guest whether it can be moved now, and below the table why not.
    """
    guests, migrations = asyncio.run(_list(context.obj, guest))
    if as_json:
        print_json({"guests": list(map(to_dict, guests)), "migrations": list(map(to_dict, migrations))})
        return
    out = console()
    output.show(out, tables.guests(guests))
    out.print()
    output.show(out, tables.migrations(migrations))


async def _list(connection: Connection, guest: str) -> tuple[list[pb.Guest], list[pb.Migration]]:
    async with connection.client() as client:
        guests = [found for found in await client.list_guests() if guest in ("", found.guest_id)]
        return guests, list(await client.list_migrations(guest))


def show(context: typer.Context, migration: MigrationId, as_json: Json = False) -> None:
    """Show everything that is known of a migration. Ended ones stay readable."""

    async def get() -> pb.Migration:
        async with _client(context) as client:
            return await client.get_migration(migration)

    _print(asyncio.run(get()), as_json)


def watch(context: typer.Context, migration: MigrationId, as_json: Json = False) -> None:
    """Follow a migration until it ends, live on a terminal.

    Exit status 1 when it fails or is cancelled. With --json nothing is printed before its end.
    """

    async def follow() -> pb.Migration:
        async with _client(context) as client:
            return await _follow(client, migration, as_json)

    _finish(asyncio.run(follow()), as_json)


def cancel(context: typer.Context, migration: MigrationId, as_json: Json = False) -> None:
    """Take a migration back, until its guest was handed over."""

    async def take_back() -> pb.Migration:
        async with _client(context) as client:
            return await client.cancel_migration(migration)

    _print(asyncio.run(take_back()), as_json)


def resume(context: typer.Context, migration: MigrationId, as_json: Json = False) -> None:
    """Make a paused migration reconnect now."""

    async def reconnect() -> pb.Migration:
        async with _client(context) as client:
            return await client.resume_migration(migration)

    _print(asyncio.run(reconnect()), as_json)


def limits(
    context: typer.Context,
    migration: MigrationId,
    push_rate: PushRate = None,
    push_window: PushWindow = None,
    fault_objective: FaultObjective = None,
    push: Push = None,
    push_weight: PushWeight = None,
    as_json: Json = False,
) -> None:
    """Show the limits of a migration, or change those given."""
    given = (push_rate, push_window, fault_objective, push, push_weight)

    async def change() -> pb.Migration:
        async with _client(context) as client:
            found = await client.get_migration(migration)
            if all(value is None for value in given):
                return found
            return await client.set_limits(migration, options.limits(*given, base=found.limits))

    found = asyncio.run(change())
    if as_json:
        print_json(to_dict(found.limits))
    else:
        output.show(console(), tables.limits(found.limits))


def _client(context: typer.Context) -> SidecarClient:
    connection: Connection = context.obj
    return connection.client()


async def _follow(client: SidecarClient, migration_id: str, as_json: bool) -> pb.Migration:
    looks = client.watch_migration(migration_id)
    if as_json:
        return await live.last(looks)
    try:
        async with aclosing(looks):
            return await live.follow(looks, console())
    except asyncio.CancelledError:
        print(f"no longer watched; it goes on: pageferry watch {migration_id}", file=sys.stderr)
        raise


def _finish(found: pb.Migration, as_json: bool) -> None:
    """Print a migration that was followed, and exit as it ended; one that was only started goes on."""
    _print(found, as_json)
    if ended(found) and found.state != pb.MIGRATION_STATE_COMPLETED:
        if not as_json:
            reason = found.error.reason or "CANCELLED"
            print(f"error: {reason}: {found.error.message or 'the migration was taken back'}", file=sys.stderr)
        raise typer.Exit(1)


def _print(found: pb.Migration, as_json: bool) -> None:
    if as_json:
        print_json(to_dict(found))
    else:
        out = console()
        output.show(out, tables.migration(found, colours=not out.no_color))
