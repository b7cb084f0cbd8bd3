"""The handover: every order of events at both ends, with everything that can go wrong between them.

All states that can be reached from the first one are looked at, each once. In each, the guest has one owner; from each,
once no more trouble comes, the guest is sure to run at one end, unless nobody can know any more where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from two_ends import DEAD, RUNNING, Event, May, State, TwoEnds

from pageferryd.core.handover import (
    LOSE,
    UNDO,
    DestinationNote,
    SourceNote,
    Step,
    Steps,
    Told,
    Verdict,
    after_commit,
    may_give_up_at_source,
    may_run_at_source,
    on_abort,
    on_commit,
    on_complete,
    on_destination_restart,
    on_give_up,
    on_source_restart,
    told,
)

TROUBLES = {
    "kills": May(kill_source=2, kill_destination=2, give_up_waiting=1),
    "losses": May(kill_source=1, kill_destination=1, lose=2, give_up_waiting=1),
    "repeats": May(kill_source=1, kill_destination=1, repeat=1),
    "losses and repeats": May(lose=1, repeat=2),
    "lost notes": May(kill_source=1, kill_destination=1, lose=1, reboot_destination=1, give_up_waiting=1),
    "dead VMMs": May(kill_source=1, kill_destination=1, lose=1, kill_vmm=1),
    "operators": May(kill_source=1, kill_destination=1, operator=2),
    "operators in trouble": May(kill_destination=1, kill_vmm=1, reboot_destination=1, operator=1, fence=1),
}
MOST_STATES = 200_000


class Violation(AssertionError):
    """A rule that did not hold, and the events that led there."""


def wrong_with(state: State) -> str | None:
    """Say which rule does not hold in a state, or None."""
    source, end = state.source, state.destination
    if source.guest == RUNNING and end.guest == RUNNING:
        return "the guest runs at both ends"
    if source.guest == RUNNING and state.ran_there and not state.decided:
        return "the guest runs at its source after it ran at the destination"
    if source.guest == RUNNING and source.note in (SourceNote.GIVEN, SourceNote.ARRIVED):
        return "the guest runs at its source, and is noted as given away"
    if end.guest == RUNNING and end.note is not DestinationNote.OWNED and not end.whole:
        return "the guest runs at the destination, and is not noted as its own"
    if source.guest == DEAD and not end.whole and not state.decided:
        return "the source has ended the guest, and the destination lacks pages"
    if source.guest == DEAD and end.guest == DEAD and not (state.died or state.forgotten or state.decided):
        return "the guest is dead at both ends"
    return None


def has_ended_well(state: State) -> bool:
    """Say whether the guest is where it belongs and nothing is left to do; or nobody can know, and it is held."""
    source, end = state.source, state.destination
    if not source.alive or source.steps or end.steps or end.note is DestinationNote.READY:
        return False
    if source.guest == RUNNING:
        return source.note is SourceNote.NONE and end.guest != RUNNING
    if end.guest == RUNNING:
        return source.guest == DEAD and end.note is DestinationNote.NONE
    if state.forgotten or state.died or state.decided:
        # Its source holds it for whoever decides, or it was whole elsewhere, or was given up.
        return source.guest == DEAD or source.note is SourceNote.GIVEN
    return False


class Explored:
    """Every state that can be reached, by number, each with the one that it was reached from."""

    def __init__(self, ends: TwoEnds, may: May) -> None:
        self.states = [State(may=may)]
        self._numbers = {self.states[0]: 0}
        self._came_from: list[tuple[int, str]] = [(0, "")]
        self._before: list[list[int]] = [[]]
        # More states are added at the end meanwhile.
        for number, state in enumerate(self.states):
            if (wrong := wrong_with(state)) is not None:
                raise Violation(f"{wrong}: {self.story(number)}")
            for event in ends.events(state):
                self._follow(number, event)
            assert len(self.states) < MOST_STATES

    def _follow(self, number: int, event: Event) -> None:
        what, progress, state = event
        after = self._numbers.setdefault(state, len(self.states))
        if after == len(self.states):
            self.states.append(state)
            self._came_from.append((number, what))
            self._before.append([])
        if progress:
            self._before[after].append(number)

    def stuck(self) -> int | None:
        """Return a state from which no progress leads to a good end, or None."""
        well = [number for number, state in enumerate(self.states) if has_ended_well(state)]
        reached = set(well)
        while well:
            new = [number for number in self._before[well.pop()] if number not in reached]
            reached.update(new)
            well += new
        return next((number for number in range(len(self.states)) if number not in reached), None)

    def story(self, number: int) -> str:
        """Say by which events a state was reached."""
        events: list[str] = []
        at = number
        while at:
            at, event = self._came_from[at]
            events.append(event)
        return f"{'; '.join(reversed(events))}; {self.states[number]}"


def explore(may: May, **broken: object) -> int:
    """Look at every state that can be reached; return how many there are. Raises Violation."""
    explored = Explored(TwoEnds(**broken), may)
    stuck = explored.stuck()
    if stuck is not None:
        raise Violation(f"the guest waits for ever: {explored.story(stuck)}")
    return len(explored.states)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_guest_has_one_owner_and_ends_with_one(trouble: str) -> None:
    # Fewer would mean that some of the trouble cannot happen.
    assert explore(TROUBLES[trouble]) > 10_000


# What is broken on purpose is found.

TROUBLE = May(kill_source=1, kill_destination=1, lose=1, give_up_waiting=1)
DECIDED = May(kill_destination=1, operator=1)


def sent_before_it_is_noted() -> dict[str, object]:
    return {"GIVE": (Step.SEND_COMMIT, Step.NOTE_GIVEN)}


def run_before_it_is_noted() -> dict[str, object]:
    def commit(note: DestinationNote, *, loaded: bool) -> Steps:
        steps = on_commit(note, loaded=loaded)
        return (Step.RUN, Step.NOTE_OWNED, Step.ANSWER) if Step.NOTE_OWNED in steps else steps

    return {"on_commit": commit}


def who_does_not_know_is_believed() -> dict[str, object]:
    def believe(answer: Told, *, first_in_this_life: bool, arrived: bool) -> Verdict:
        return Verdict.TAKE_BACK if answer is Told.UNKNOWN else after_commit(answer, first_in_this_life=True)

    return {"after_commit": believe}


def silence_means_that_it_never_ran() -> dict[str, object]:
    def guess(answer: Told, *, first_in_this_life: bool, arrived: bool) -> Verdict:
        if answer is Told.NO_ANSWER:
            return Verdict.TAKE_BACK
        return after_commit(answer, first_in_this_life=first_in_this_life, arrived=arrived)

    return {"after_commit": guess}


def complete_is_forgotten_over_a_late_answer() -> dict[str, object]:
    return {
        "after_commit": lambda answer, first_in_this_life, arrived: after_commit(
            answer, first_in_this_life=first_in_this_life
        )
    }


def taken_back_before_it_is_noted() -> dict[str, object]:
    return {"TAKE_BACK": (Step.RUN, Step.NOTE_TAKEN_BACK, Step.FORGET)}


def forgotten_before_it_runs() -> dict[str, object]:
    return {"TAKE_BACK": (Step.FORGET, Step.RUN)}


def a_restarted_source_forgets_that_it_gave() -> dict[str, object]:
    return {"on_source_restart": lambda note: UNDO if note is SourceNote.GIVEN else on_source_restart(note)}


def a_restarted_source_leaves_a_stopped_guest() -> dict[str, object]:
    return {"on_source_restart": lambda note: () if note is SourceNote.LEAVING else on_source_restart(note)}


def a_restarted_destination_forgets_what_never_ran() -> dict[str, object]:
    def restart(note: DestinationNote, *, vmm_gone: bool) -> Steps:
        if note is DestinationNote.READY:
            return (Step.KILL, Step.FORGET)
        return on_destination_restart(note, vmm_gone=vmm_gone)

    return {"on_destination_restart": restart}


def a_source_ends_the_guest_before_complete() -> dict[str, object]:
    def restart(note: SourceNote) -> Steps:
        return (Step.SEND_COMMIT, Step.KILL) if note is SourceNote.GIVEN else on_source_restart(note)

    return {"on_source_restart": restart}


def a_source_that_has_forgotten_refuses_complete() -> dict[str, object]:
    return {"on_complete": lambda note: None if note is SourceNote.NONE else on_complete(note)}


def lost_is_noted_before_the_vmm_is_dead() -> dict[str, object]:
    def give_up(note: DestinationNote) -> Steps:
        return (Step.NOTE_LOST, Step.KILL) if note is DestinationNote.OWNED else on_give_up(note)

    return {"on_give_up": give_up}


def an_operator_may_run_what_is_out_of_reach() -> dict[str, object]:
    return {
        "may_run_at_source": lambda note, destination, peer_fenced: may_run_at_source(
            note, destination, peer_fenced=True
        )
    }


def an_operator_may_run_what_was_not_given_up() -> dict[str, object]:
    def may(note: SourceNote, destination: Told, *, peer_fenced: bool) -> str | None:
        answer = Told.NEVER_RAN if destination is Told.READY else destination
        return may_run_at_source(note, answer, peer_fenced=peer_fenced)

    return {"may_run_at_source": may}


def an_operator_may_run_what_has_arrived() -> dict[str, object]:
    return {
        "may_run_at_source": lambda _note, destination, peer_fenced: may_run_at_source(
            SourceNote.GIVEN, destination, peer_fenced=peer_fenced or destination is Told.UNKNOWN
        )
    }


def an_operator_may_end_what_has_not_arrived() -> dict[str, object]:
    return {"may_give_up_at_source": lambda _note, _destination, peer_fenced: None}


@pytest.mark.parametrize(
    ("broken", "trouble"),
    [
        (sent_before_it_is_noted, TROUBLE),
        (run_before_it_is_noted, TROUBLE),
        (who_does_not_know_is_believed, May(repeat=1)),
        (silence_means_that_it_never_ran, TROUBLE),
        (complete_is_forgotten_over_a_late_answer, May(repeat=1)),
        (taken_back_before_it_is_noted, TROUBLE),
        (forgotten_before_it_runs, May(kill_source=1, kill_destination=1)),
        (a_restarted_source_forgets_that_it_gave, TROUBLE),
        (a_restarted_source_leaves_a_stopped_guest, May(kill_source=1)),
        (a_restarted_destination_forgets_what_never_ran, May(kill_destination=1, give_up_waiting=1)),
        (a_source_ends_the_guest_before_complete, TROUBLE),
        (a_source_that_has_forgotten_refuses_complete, May(kill_destination=1)),
        (lost_is_noted_before_the_vmm_is_dead, DECIDED),
        (an_operator_may_run_what_is_out_of_reach, DECIDED),
        (an_operator_may_run_what_was_not_given_up, DECIDED),
        (an_operator_may_run_what_has_arrived, May(operator=1)),
        (an_operator_may_end_what_has_not_arrived, May(operator=1)),
    ],
)
def test_a_broken_rule_is_found(broken: Callable[[], dict[str, object]], trouble: May) -> None:
    with pytest.raises(Violation):
        explore(trouble, **broken())


# What the two ends tell one another and their operators.


@pytest.mark.parametrize("answer", Told)
@pytest.mark.parametrize("first", [True, False])
def test_an_answer_to_commit_has_one_meaning(answer: Told, first: bool) -> None:
    meaning = {
        Told.NO_ANSWER: Verdict.ASK_AGAIN,
        Told.UNKNOWN: Verdict.TAKE_BACK if first else Verdict.IN_DOUBT,
        Told.READY: Verdict.ASK_AGAIN,
        Told.OWNED: Verdict.GONE,
        Told.WHOLE: Verdict.GONE,
        Told.NEVER_RAN: Verdict.TAKE_BACK,
        Told.LOST: Verdict.LOST,
    }[answer]
    assert after_commit(answer, first_in_this_life=first) is meaning
    assert after_commit(answer, first_in_this_life=first, arrived=True) is Verdict.GONE


@pytest.mark.parametrize("destination", Told)
@pytest.mark.parametrize("fenced", [True, False])
def test_an_operator_runs_at_the_source_only_what_cannot_run_elsewhere(destination: Told, fenced: bool) -> None:
    given_up = destination in (Told.NEVER_RAN, Told.LOST)
    allowed = given_up or (fenced and destination in (Told.NO_ANSWER, Told.UNKNOWN))
    assert (may_run_at_source(SourceNote.GIVEN, destination, peer_fenced=fenced) is None) == allowed
    for note in (SourceNote.NONE, SourceNote.LEAVING, SourceNote.ARRIVED):
        refusal = may_run_at_source(note, destination, peer_fenced=fenced)
        assert refusal is not None
        assert "no guest is in doubt" in refusal


@pytest.mark.parametrize("destination", Told)
@pytest.mark.parametrize("fenced", [True, False])
def test_an_operator_ends_at_the_source_only_what_is_whole_elsewhere(destination: Told, fenced: bool) -> None:
    allowed = fenced or destination is Told.WHOLE
    assert (may_give_up_at_source(SourceNote.GIVEN, destination, peer_fenced=fenced) is None) == allowed
    assert may_give_up_at_source(SourceNote.ARRIVED, destination, peer_fenced=fenced) is None
    for note in (SourceNote.NONE, SourceNote.LEAVING):
        assert may_give_up_at_source(note, destination, peer_fenced=fenced) is not None


def test_a_guest_of_the_destination_is_not_given_up_for_its_source() -> None:
    assert on_abort(DestinationNote.OWNED) is None
    assert on_give_up(DestinationNote.OWNED) == LOSE
    assert on_destination_restart(DestinationNote.OWNED, vmm_gone=True) == LOSE


def test_a_guest_that_is_back_at_its_source_cannot_arrive() -> None:
    assert on_complete(SourceNote.LEAVING) is None


def test_what_a_destination_noted_is_what_it_says() -> None:
    said = {note: told(note) for note in DestinationNote}
    assert len(set(said.values())) == len(DestinationNote)
    assert told(DestinationNote.OWNED, whole=True) is Told.WHOLE
    assert told(DestinationNote.LOST, whole=True) is Told.LOST
