"""Draining: the sidecar ends, takes nothing new, and sees through what it has."""

from __future__ import annotations

from pageferry.errors import FerryError, Reason


class Drain:
    """Whether the sidecar still takes migrations."""

    def __init__(self) -> None:
        self.begun = False

    def begin(self) -> None:
        """Take nothing new from now on."""
        self.begun = True

    def check(self) -> None:
        """Raise FerryError(SHUTTING_DOWN) once it has begun."""
        if self.begun:
            raise FerryError(Reason.SHUTTING_DOWN, "this sidecar is shutting down and takes no new migrations")
