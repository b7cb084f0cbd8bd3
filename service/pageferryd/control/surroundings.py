"""What every migration of a sidecar works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from pageferryd.access import make_refusals
from pageferryd.control.turns import Turns
from pageferryd.linux.fd_store import FdStore

if TYPE_CHECKING:
    from pageferry.tls import TlsFiles
    from pageferryd.config import Settings
    from pageferryd.control.journal import Journal
    from pageferryd.control.registry import GuestRegistry
    from pageferryd.core.push_share import PushShare
    from pageferryd.core.refusals import Refusals


@dataclass(frozen=True)
class Surroundings:
    """What every migration of this sidecar works with."""

    settings: Settings
    tls: TlsFiles | None
    guests: GuestRegistry
    journal: Journal
    turns: Turns = field(default_factory=Turns)
    """Whose turn it is to leave."""
    share: PushShare | None = None
    """What the guests that come push together."""
    store: FdStore = field(default_factory=partial(FdStore, "", 0))
    """Where descriptors outlive this process."""
    refusals: Refusals = field(default_factory=make_refusals)
    """Who was refused."""
