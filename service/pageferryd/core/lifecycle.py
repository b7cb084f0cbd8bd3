"""The states of a migration, and the one table of changes between them that are legal."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from pageferryd.core.errors import IllegalTransitionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class State(Enum):
    """Where a migration stands. Values are those of MigrationState in migration.proto."""

    PENDING = 1
    """Accepted, not begun; the guest runs at the source."""
    PREPARING = 2
    """The destination readies its VMM; the guest runs at the source."""
    HANDING_OVER = 3
    """The guest stands still; its device state crosses."""
    POSTCOPY = 4
    """The guest belongs to the destination; its memory follows."""
    POSTCOPY_PAUSED = 5
    """The other host is out of reach; the guest waits where it touches a missing page."""
    COMPLETED = 6
    """Every page is installed, and the source has let go."""
    FAILED = 7
    """It failed; the record says why and where the guest is."""
    CANCELLED = 8
    """It was taken back; the guest runs at the source."""
    IN_DOUBT = 9
    """The guest may have run at the destination, which cannot say; it stands still at the source."""

    @property
    def final(self) -> bool:
        """Whether the migration has ended."""
        return self in (State.COMPLETED, State.FAILED, State.CANCELLED)

    @property
    def owned_by_destination(self) -> bool:
        """Whether the guest may have run at the destination, so that the source must never run it again."""
        return self in (State.POSTCOPY, State.POSTCOPY_PAUSED, State.COMPLETED, State.IN_DOUBT)


LEGAL: Mapping[State, frozenset[State]] = {
    State.PENDING: frozenset({State.PREPARING, State.FAILED, State.CANCELLED}),
    # Back again where the destination has no room yet.
    State.PREPARING: frozenset({State.PENDING, State.HANDING_OVER, State.FAILED, State.CANCELLED}),
    State.HANDING_OVER: frozenset({State.POSTCOPY, State.POSTCOPY_PAUSED, State.FAILED, State.CANCELLED}),
    State.POSTCOPY: frozenset({State.POSTCOPY_PAUSED, State.IN_DOUBT, State.COMPLETED, State.FAILED}),
    State.POSTCOPY_PAUSED: frozenset({State.POSTCOPY, State.IN_DOUBT, State.COMPLETED, State.FAILED}),
    State.IN_DOUBT: frozenset({State.POSTCOPY, State.POSTCOPY_PAUSED, State.COMPLETED, State.FAILED}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


class Lifecycle:
    """One migration's state. `moved` is called after each change, with the old and the new state."""

    def __init__(self, moved: Callable[[State, State], None] = lambda _old, _new: None) -> None:
        self.state = State.PENDING
        self._moved = moved

    def to(self, state: State) -> None:
        """Change the state, or raise IllegalTransitionError and change nothing."""
        if state not in LEGAL[self.state]:
            raise IllegalTransitionError(f"a migration in {self.state.name} cannot become {state.name}")
        old, self.state = self.state, state
        self._moved(old, state)

    def require(self, *states: State) -> None:
        """Raise IllegalTransitionError unless the migration is in one of the states."""
        if self.state not in states:
            needed = " or ".join(state.name for state in states)
            raise IllegalTransitionError(f"the migration is in {self.state.name}; this needs {needed}")
