"""The command resolve: who owns a guest when its two hosts cannot settle it."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from pageferry.cli import handover, output
from pageferry.cli.options import Connection, Json, MigrationId
from pageferry.cli.output import console, print_json, to_dict
from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2 as pb

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console

    from pageferry.cli.handover import Ends


def resolve(
    context: typer.Context,
    migration: MigrationId,
    run_at_source: Annotated[
        bool, typer.Option(handover.RUN_AT_SOURCE, help="Decide that the guest goes on here, at its source.")
    ] = False,
    give_up: Annotated[
        bool,
        typer.Option(
            handover.GIVE_UP,
            help="Decide that this host gives the guest up: its VMM is killed, and it never runs here again.",
        ),
    ] = False,
    peer_fenced: Annotated[
        bool,
        typer.Option(
            "--peer-fenced",
            help="You have made sure that the guest cannot run at the other host any more, or never needs to: that "
            "host is off, say.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before a decision is carried out.")] = False,
    as_json: Json = False,
) -> None:
    """Show what both hosts know of a guest's owner, and decide.

    For migrations that are in doubt: the guest may have run at its destination, which cannot say. Without an option
    for a decision nothing is changed. With one, both hosts are shown, you are asked, and then it is carried out by the
    sidecar that the command talks to.
    """
    decision = _decision(run_at_source, give_up)
    _check_usage(migration, decision, peer_fenced, yes)
    if decision == pb.DECISION_UNSPECIFIED:
        _show(context.obj, migration, as_json)
        return
    story = sys.stderr if as_json else sys.stdout
    if not yes:
        _check_terminal(migration, story)
    before = asyncio.run(_ask_sidecar(context.obj, migration))
    _check_role(decision, before, migration)
    if not (as_json and yes):
        _tell_before(console(story), migration, decision, before, peer_fenced=peer_fenced)
    if not yes and not _confirmed(story):
        raise FerryError(Reason.CANCELLED, f"not confirmed: nothing was decided about migration {migration}")
    after = asyncio.run(_decide(context.obj, migration, decision, peer_fenced))
    if as_json:
        _print_json(migration, after)
        return
    out = console()
    out.print(Text(handover.done(decision, after)))
    output.show(out, handover.both(after))


def _decision(run_at_source: bool, give_up: bool) -> pb.Decision.ValueType:
    if run_at_source and give_up:
        raise FerryError(
            Reason.INVALID_ARGUMENT,
            f"{handover.RUN_AT_SOURCE} and {handover.GIVE_UP} are opposite decisions: give one of them",
        )
    if run_at_source:
        return pb.DECISION_RUN_AT_SOURCE
    return pb.DECISION_GIVE_UP if give_up else pb.DECISION_UNSPECIFIED


def _check_usage(migration: str, decision: pb.Decision.ValueType, peer_fenced: bool, yes: bool) -> None:
    if decision == pb.DECISION_UNSPECIFIED and (peer_fenced or yes):
        option = "--peer-fenced" if peer_fenced else "--yes"
        raise FerryError(
            Reason.INVALID_ARGUMENT,
            f"{option} belongs to a decision: give {handover.RUN_AT_SOURCE} or {handover.GIVE_UP} with it, or look "
            f"first with `pageferry resolve {migration}`",
        )


def _check_terminal(migration: str, story: TextIO) -> None:
    if not (sys.stdin.isatty() and story.isatty()):
        raise FerryError(
            Reason.INVALID_ARGUMENT,
            "a decision has to be confirmed, and there is no terminal to ask at: look with `pageferry resolve "
            f"{migration}`, then give --yes with the decision",
        )


def _check_role(decision: pb.Decision.ValueType, ends: Ends, migration: str) -> None:
    if decision == pb.DECISION_RUN_AT_SOURCE and ends.here.role != pb.ROLE_SOURCE:
        raise FerryError(
            Reason.ILLEGAL_STATE,
            f"{handover.RUN_AT_SOURCE} is decided at the source of migration {migration}, and this sidecar is its "
            f"destination: give the option to the sidecar of {ends.source.host or 'the source'}, with --address",
        )


def _show(connection: Connection, migration: str, as_json: bool) -> None:
    ends = asyncio.run(_ask_sidecar(connection, migration))
    if as_json:
        _print_json(migration, ends)
        return
    out = console()
    output.show(out, handover.both(ends))
    out.print()
    output.show(out, handover.options(ends, migration))


def _tell_before(
    out: Console, migration: str, decision: pb.Decision.ValueType, ends: Ends, *, peer_fenced: bool
) -> None:
    output.show(out, handover.both(ends))
    out.print()
    output.show(out, handover.options(ends, migration))
    out.print()
    for sentence in handover.consequences(decision, ends, peer_fenced=peer_fenced):
        out.print(Text(sentence, style="bold"), soft_wrap=True)
    out.print()


def _confirmed(story: TextIO) -> bool:
    """Ask; only a yes is a yes, and the end of the input is none."""
    story.write("Carry this out? [y/N] ")
    story.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _print_json(migration: str, ends: Ends) -> None:
    print_json({"migration_id": migration, "ends": list(map(to_dict, ends))})


async def _ask_sidecar(connection: Connection, migration: str) -> Ends:
    async with connection.client() as client:
        return handover.ends_of(await client.resolve_migration(migration))


async def _decide(connection: Connection, migration: str, decision: pb.Decision.ValueType, peer_fenced: bool) -> Ends:
    try:
        async with connection.client() as client:
            return handover.ends_of(await client.resolve_migration(migration, decision, peer_fenced=peer_fenced))
    except FerryError as error:
        if error.reason is not Reason.SIDECAR_UNREACHABLE:
            raise
        raise FerryError(
            error.reason,
            f"{error.message}; the decision may have been carried out all the same: look with `pageferry resolve "
            f"{migration}`",
        ) from error
