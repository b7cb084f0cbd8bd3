"""Who owns a guest while it changes hosts: what each end notes, does and may do, in which order.

Nothing here reads a clock, a file or a socket. Both ends ask what to do, and get steps: each is done, durably where it
is a note, before the next is begun. A sidecar may be killed between any two of them; the next one reads its note, and
asks `on_source_restart` or `on_destination_restart`.
"""

from __future__ import annotations

from enum import Enum


class SourceNote(Enum):
    """What a source has on its disk of a guest that leaves."""

    NONE = "none"
    """Nothing: the guest is no business of a migration, and is what its VMM does."""
    LEAVING = "leaving"
    """The guest is this host's. It may stand still."""
    GIVEN = "given"
    """The guest may have run at the destination."""
    ARRIVED = "arrived"
    """The destination has every page."""


class DestinationNote(Enum):
    """What a destination has on its disk of a guest that comes."""

    NONE = "none"
    READY = "ready"
    """A VMM waits for the guest, which has not run here."""
    OWNED = "owned"
    """The guest is this host's; it may run."""
    NEVER = "never"
    """The guest has not run here, and never will."""
    LOST = "lost"
    """The guest was this host's, and its VMM is dead."""


class Told(Enum):
    """What a destination says of a guest, to a Commit or when it is asked."""

    NO_ANSWER = "no answer"
    """It cannot be reached, did not answer in time, or cannot read its notes."""
    UNKNOWN = "unknown"
    """It knows no such migration."""
    READY = "ready"
    """The guest has not run there, but will at the next Commit."""
    OWNED = "owned"
    """The guest is its own, and some pages are still here."""
    WHOLE = "whole"
    """The guest is its own, with every page."""
    NEVER_RAN = "never ran"
    """The guest has not run there, and never will."""
    LOST = "lost"
    """The guest ran there, and its VMM is dead."""


class Verdict(Enum):
    """What an answer to Commit means for the source."""

    GONE = "gone"
    """The guest is the destination's: serve its memory until all of it has arrived."""
    TAKE_BACK = "take back"
    """It has not run there and never will: do `TAKE_BACK`."""
    ASK_AGAIN = "ask again"
    """It may have run there: hold it, serve its memory, and send Commit again."""
    IN_DOUBT = "in doubt"
    """It may have run there, and the destination does not know: hold it, ask at a slow pace; an operator may decide."""
    LOST = "lost"
    """It ran there and is dead: hold what is here. Nobody but an operator may run that, older as it is."""


class Step(Enum):
    """One thing to do. Notes are durable, and answers and calls only sent, when the step is over."""

    NOTE_LEAVING = "note leaving"
    NOTE_GIVEN = "note given"
    NOTE_TAKEN_BACK = "note taken back"
    """The note becomes LEAVING again."""
    NOTE_ARRIVED = "note arrived"
    NOTE_READY = "note ready"
    NOTE_OWNED = "note owned"
    NOTE_NEVER = "note never"
    NOTE_LOST = "note lost"
    FORGET = "forget"
    """Remove the note."""
    STOP = "stop"
    RUN = "run"
    """Have the guest run here; one that runs is left alone."""
    KILL = "kill"
    """End the VMM here; one that has ended is left alone. The next step waits until its process is gone."""
    SEND_HAND_OVER = "send HandOver"
    SEND_COMMIT = "send Commit"
    SEND_ABORT = "send Abort"
    """Once. Unanswered it does no harm: a destination that is not told to commit gives up by itself."""
    ANSWER = "answer"
    """Say `told(note)`."""


Steps = tuple[Step, ...]

# The source

LEAVE: Steps = (Step.NOTE_LEAVING, Step.STOP, Step.SEND_HAND_OVER)
"""The destination is ready: stop the guest."""

GIVE: Steps = (Step.NOTE_GIVEN, Step.SEND_COMMIT)
"""The destination has loaded the state: give the guest away."""

UNDO: Steps = (Step.RUN, Step.SEND_ABORT, Step.FORGET)
"""It failed, or was cancelled, before `GIVE` was begun."""

TAKE_BACK: Steps = (Step.NOTE_TAKEN_BACK, *UNDO)
"""The destination never runs it. Noted first: whoever finds GIVEN must be able to rely on a guest that stands still."""

GIVE_UP_AT_SOURCE: Steps = (Step.KILL, Step.FORGET)
"""An operator gives the guest up here; see `may_give_up_at_source`."""


def after_commit(answer: Told, *, first_in_this_life: bool, arrived: bool = False) -> Verdict:
    """Say what an answer to Commit means for a guest whose note is GIVEN.

    `first_in_this_life`: this process has sent no other Commit for it, and did not find the note when it started.
    `arrived`: the destination has said, by Complete, that it has every page; nothing that it says now weighs more.
    """
    if arrived or answer in (Told.OWNED, Told.WHOLE):
        return Verdict.GONE
    if answer is Told.NEVER_RAN:
        return Verdict.TAKE_BACK
    if answer is Told.LOST:
        return Verdict.LOST
    if answer is not Told.UNKNOWN:
        return Verdict.ASK_AGAIN
    # Who was told once only, and knew nothing then, has run nothing. After any other Commit it may have forgotten.
    return Verdict.TAKE_BACK if first_in_this_life else Verdict.IN_DOUBT


def on_complete(note: SourceNote) -> Steps | None:
    """The destination says that it has every page; None where that cannot be, and is to be refused.

    A source that knows nothing of the guest holds nothing that a whole guest needs: to the destination "unknown
    migration" is as good an ANSWER.
    """
    if note is SourceNote.LEAVING:
        return None
    return (Step.ANSWER,) if note is SourceNote.NONE else (Step.NOTE_ARRIVED, Step.ANSWER, Step.KILL)


def on_source_restart(note: SourceNote) -> Steps:
    """A source has started again. After GIVEN its pages are served again first, and no Commit is the first one."""
    if note is SourceNote.LEAVING:
        # No Commit was sent, or the destination has said since that it never runs the guest.
        return UNDO
    if note is SourceNote.GIVEN:
        return (Step.SEND_COMMIT,)
    return (Step.KILL,) if note is SourceNote.ARRIVED else ()


def may_run_at_source(note: SourceNote, destination: Told, *, peer_fenced: bool) -> str | None:
    """Say why an operator must not have the guest run at its source by `TAKE_BACK`, or None where he may.

    `destination` is its answer now; `note` is looked at after that has come.
    """
    if note is not SourceNote.GIVEN:
        return f"no guest is in doubt here: the note of the handover is {note.value!r}"
    if destination in (Told.NEVER_RAN, Told.LOST):
        return None
    if destination is Told.UNKNOWN:
        # It may have lost its notes, and not the VMM.
        return None if peer_fenced else "the destination knows no such guest, and its VMM may run: make sure it cannot"
    if destination is Told.NO_ANSWER:
        return None if peer_fenced else "the destination cannot be asked, and may run the guest: make sure it cannot"
    if destination is Told.READY:
        return "the destination has not given the guest up, and would run it at the next Commit: abort it there first"
    return "the guest is the destination's: give it up there first"


def may_give_up_at_source(note: SourceNote, destination: Told, *, peer_fenced: bool) -> str | None:
    """Say why an operator must not have what the source holds ended by `GIVE_UP_AT_SOURCE`, or None where he may."""
    if note not in (SourceNote.GIVEN, SourceNote.ARRIVED):
        return f"no guest is in doubt here: the note of the handover is {note.value!r}"
    if note is SourceNote.ARRIVED or destination is Told.WHOLE or peer_fenced:
        return None
    return "the destination has not said that it has every page: what it lacks is here alone"


# The destination


def told(note: DestinationNote, *, whole: bool = False) -> Told:
    """Return what a destination says of a guest; `whole` where every page is in."""
    if note is DestinationNote.OWNED:
        return Told.WHOLE if whole else Told.OWNED
    return {
        DestinationNote.NONE: Told.UNKNOWN,
        DestinationNote.READY: Told.READY,
        DestinationNote.NEVER: Told.NEVER_RAN,
        DestinationNote.LOST: Told.LOST,
    }[note]


def may_prepare(note: DestinationNote) -> bool:
    """Say whether a Prepare may be begun; it ends with NOTE_READY. A migration's id is used once."""
    return note is DestinationNote.NONE


def on_commit(note: DestinationNote, *, loaded: bool) -> Steps:
    """The source gives the guest away; `loaded` where this process has loaded the guest's state. Ends with ANSWER."""
    if note is DestinationNote.READY:
        # What is not loaded was another process's: it cannot be run, and its source waits for a word.
        return (Step.NOTE_OWNED, Step.RUN, Step.ANSWER) if loaded else (*NEVER, Step.ANSWER)
    if note is DestinationNote.OWNED:
        return (Step.RUN, Step.ANSWER)
    return (Step.ANSWER,)


NEVER: Steps = (Step.NOTE_NEVER, Step.KILL)
"""Give up a guest that has not run. Noted first, so that the source is told whatever becomes of this process."""

LOSE: Steps = (Step.KILL, Step.NOTE_LOST)
"""Give up a guest that may run. Its VMM is dead first: on the word "lost" the guest may be run at its source."""

WHOLE: Steps = (Step.FORGET,)
"""The source has answered Complete: the guest needs nobody any more."""


def on_abort(note: DestinationNote) -> Steps | None:
    """The source gives up, or does not commit in time; None where the guest is this host's, and it is to be refused."""
    if note is DestinationNote.READY:
        return NEVER
    return None if note is DestinationNote.OWNED else ()


def on_give_up(note: DestinationNote) -> Steps:
    """An operator, or the policy for lost sources, gives the guest up here."""
    return {DestinationNote.READY: NEVER, DestinationNote.OWNED: LOSE}.get(note, ())


def on_destination_restart(note: DestinationNote, *, vmm_gone: bool = False) -> Steps:
    """A destination has started again. Where it owns the guest, that runs only once its memory is guarded again."""
    if note is DestinationNote.READY:
        return NEVER
    if note is DestinationNote.OWNED:
        return LOSE if vmm_gone else (Step.RUN,)
    # The sidecar before may have been killed between the note and the VMM.
    return (Step.KILL,) if note is DestinationNote.NEVER else ()
