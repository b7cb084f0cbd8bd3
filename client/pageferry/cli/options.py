"""Options that several commands share, and how to reach the sidecar that they name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from pageferry import address as addresses
from pageferry.cli import units
from pageferry.client import SidecarClient
from pageferry.errors import FerryError, Reason
from pageferry.tls import TlsFiles
from pageferry.v1 import migration_pb2 as pb

DEFAULT_ADDRESS: Final = "127.0.0.1:7443"
MOST_LOSS_SECONDS: Final = 31_536_000
"""A year, as in the settings of a sidecar."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
GuestId = Annotated[str, typer.Argument(metavar="GUEST", help="The guest's id.")]
MigrationId = Annotated[str, typer.Argument(metavar="MIGRATION", help="The migration's id.")]


def _parser(parse: Callable[[str], int]) -> Callable[[Any], int]:
    """Make typer report what `parse` says about a wrong value."""

    def parsed(value: Any) -> int:
        # A default that is an int already comes through here too.
        if isinstance(value, int):
            return value
        try:
            return parse(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parsed


PushRate = Annotated[
    int | None,
    typer.Option(
        "--push-rate",
        parser=_parser(units.parse_rate),
        metavar="SIZE",
        help="Most bytes a second that the push lane moves, as in 200M; 0 is unlimited.",
    ),
]
PushWindow = Annotated[
    int | None,
    typer.Option(
        "--push-window",
        parser=_parser(units.parse_bytes),
        metavar="SIZE",
        help="Most bytes that the push lane may have under way, at least 64K; 0 leaves it to the pacer.",
    ),
]
FaultObjective = Annotated[
    int | None,
    typer.Option(
        "--fault-objective",
        parser=_parser(units.parse_microseconds),
        metavar="DURATION",
        help="Fault latency above which the push lane gives way, as in 1ms; 0 is the sidecar's default.",
    ),
]
Push = Annotated[
    bool | None,
    typer.Option("--push/--no-push", help="Whether pages are pushed at all. Without push the migration cannot end."),
]

PushWeight = Annotated[
    int | None,
    typer.Option(
        "--push-weight",
        min=1,
        max=1000,
        metavar="N",
        help="Share of the destination host's push bandwidth against those of other migrations, 1 to 1000. "
        "Default: 100.",
    ),
]


class OnLossWord(StrEnum):
    """What --on-loss can be."""

    WAIT = "wait"
    KILL = "kill"


_ON_LOSS: Final = {OnLossWord.WAIT: pb.ON_LOSS_WAIT, OnLossWord.KILL: pb.ON_LOSS_KILL}
OnLoss = Annotated[
    OnLossWord | None,
    typer.Option(
        "--on-loss",
        help="What becomes of the guest at its destination when its missing pages cannot be had: it waits for them, or "
        "its VMM is killed. Default: as the destination's sidecar is set.",
    ),
]
LossSeconds = Annotated[
    int | None,
    typer.Option(
        "--loss-seconds",
        min=1,
        max=MOST_LOSS_SECONDS,
        metavar="N",
        help="How long the source may be gone before that happens. Default: as the destination's sidecar is set.",
    ),
]
Checksums = Annotated[
    bool,
    typer.Option(
        "--checksums", help="Have every page carry a checksum; one that comes damaged is fetched again, and counted."
    ),
]


@dataclass(frozen=True)
class Connection:
    """How the command reaches its sidecar, as the global options say."""

    address: str = DEFAULT_ADDRESS
    insecure: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    def client(self) -> SidecarClient:
        """Return the client. Raises FerryError where the options do not say how to trust the sidecar."""
        return SidecarClient(self.address, self._tls(), self.server_name)

    def _tls(self) -> TlsFiles | None:
        address = addresses.normalise(self.address)
        # A sidecar guards its Unix socket by the file's mode, and speaks no TLS on it.
        if addresses.is_unix(address):
            return None
        if self.insecure:
            if not addresses.is_loopback(address):
                raise FerryError(
                    Reason.INVALID_ARGUMENT,
                    f"--insecure reaches only a sidecar on this host, and {address} is not: give --ca, --certificate "
                    "and --key instead",
                )
            return None
        if self.ca is None or self.certificate is None or self.key is None:
            raise FerryError(
                Reason.CONFIG_INVALID,
                f"no certificates for {address}: give --ca, --certificate and --key (or PAGEFERRY_CA, "
                "PAGEFERRY_CERTIFICATE and PAGEFERRY_KEY), a Unix socket with --address unix:/PATH, or --insecure for "
                "a sidecar on this host that runs without TLS",
            )
        return TlsFiles(ca=self.ca, certificate=self.certificate, key=self.key)


def limits(
    push_rate: int | None,
    push_window: int | None,
    fault_objective: int | None,
    push: bool | None,
    push_weight: int | None,
    base: pb.Limits | None = None,
) -> pb.Limits:
    """Return `base`, or no limits at all, changed by those options that were given."""
    changed = pb.Limits()
    if base is not None:
        changed.CopyFrom(base)
    if push_rate is not None:
        changed.push_bytes_per_second = push_rate
    if push_window is not None:
        changed.push_window_bytes = push_window
    if fault_objective is not None:
        changed.fault_objective_us = fault_objective
    if push is not None:
        changed.push_disabled = not push
    if push_weight is not None:
        changed.push_weight = push_weight
    return changed


def policy(on_loss: OnLossWord | None, loss_seconds: int | None, checksums: bool) -> pb.Policy:
    """Return the policy that the options say; what they leave out is left to the sidecars' settings.

    Raises FerryError for a time after which nothing would happen.
    """
    if on_loss is OnLossWord.WAIT and loss_seconds is not None:
        raise FerryError(
            Reason.INVALID_ARGUMENT,
            "--loss-seconds says when a guest is killed, and with --on-loss wait it never is: leave one of them out",
        )
    return pb.Policy(
        on_loss=_ON_LOSS[on_loss] if on_loss is not None else pb.ON_LOSS_UNSPECIFIED,
        loss_seconds=loss_seconds or 0,
        checksums=checksums,
    )
