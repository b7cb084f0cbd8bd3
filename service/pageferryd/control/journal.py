"""What a sidecar must know again after it was killed: one file a migration and step, in its runtime directory.

Like the VMMs that it is about, that directory outlives the sidecar, but no restart of the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageferryd.control.arrivals_journal import ArrivalsJournal
from pageferryd.control.departures_journal import DeparturesJournal
from pageferryd.control.note_files import NoteFiles

if TYPE_CHECKING:
    from pathlib import Path


class Journal:
    """Both halves: of guests that come, and of those that leave."""

    def __init__(self, directory: Path) -> None:
        """Begin with what an earlier sidecar has left; the directory is made when something is written."""
        notes = NoteFiles(directory)
        notes.sweep()
        self.arrivals = ArrivalsJournal(notes)
        self.departures = DeparturesJournal(notes)

    def close(self) -> None:
        """Let files go; what they say stays."""
        self.arrivals.close()
