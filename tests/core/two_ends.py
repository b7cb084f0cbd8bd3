"""Both ends of one handover, and all that can happen to them: every event gives a new state, none is left out.

The steps of an end are events of their own, so that it can be killed between any two. Messages wait until they are
delivered, lost, or delivered once more; a sidecar's end does not touch its VMM, nor what is on the way to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

from pageferryd.core import handover
from pageferryd.core.handover import DestinationNote, SourceNote, Step, Steps, Told, Verdict

RUNNING, STOPPED, WAITING, DEAD = "running", "stopped", "waiting", "dead"
COMMIT, STALE_COMMIT = "commit", "commit of an older call"
TO_DESTINATION = ("prepare", "hand over", COMMIT, STALE_COMMIT, "abort", "complete is heard")

RULES = {name: getattr(handover, name) for name in dir(handover) if not name.startswith("_")}


class Source(NamedTuple):
    alive: bool = True
    note: SourceNote = SourceNote.NONE
    guest: str = RUNNING
    steps: Steps = ()
    doing: str = "preparing"
    calling: bool = False
    """Whether a Commit is unanswered."""
    commits: int = 0
    """Commits of this life; more than one counts as two, and so does a life that began with a note."""
    view: Told | None = None
    """What an operator was shown."""


class Destination(NamedTuple):
    alive: bool = True
    note: DestinationNote = DestinationNote.NONE
    guest: str = WAITING
    steps: Steps = ()
    asked: str = ""
    """The message that the steps answer."""
    loaded: bool = False
    whole: bool = False


class May(NamedTuple):
    """How often each trouble may still happen."""

    kill_source: int = 0
    kill_destination: int = 0
    lose: int = 0
    repeat: int = 0
    give_up_waiting: int = 0
    reboot_destination: int = 0
    kill_vmm: int = 0
    operator: int = 0
    fence: int = 0


class State(NamedTuple):
    source: Source = Source()
    destination: Destination = Destination()
    wire: tuple[str | Told, ...] = ("prepare",)
    may: May = May()
    ran_there: bool = False
    forgotten: bool = False
    """The destination's notes were lost."""
    died: bool = False
    """The destination's VMM died otherwise than by this protocol."""
    decided: bool = False
    """An operator has decided."""
    fenced: bool = False


Event = tuple[str, bool, State]
"""What happens, whether it is progress (which comes sooner or later) or trouble, and the state after it."""


class TwoEnds:
    """The events of both ends under `rules`: those of core/handover.py, or with some of them broken."""

    def __init__(self, **broken: object) -> None:
        self.rules = SimpleNamespace(**(RULES | broken))

    def events(self, state: State) -> Iterator[Event]:
        yield from self._at_source(state)
        yield from self._at_destination(state)
        yield from self._on_the_wire(state)
        yield from self._trouble(state)
        yield from self._operator(state)

    # The source

    def _at_source(self, state: State) -> Iterator[Event]:
        source = state.source
        if not source.alive:
            yield "source restarts", True, self._source_restarts(state)
            return
        if source.steps:
            yield f"source: {source.steps[0].value}", True, _source_step(state)
        elif source.note is SourceNote.ARRIVED:
            yield "source forgets what has arrived", True, _source(state, steps=(Step.FORGET,))
        elif source.doing == "asking" and not source.calling:
            yield "source asks again", True, _source(state, steps=(Step.SEND_COMMIT,))
        if source.doing in ("preparing", "leaving"):
            yield "source gives up", not self._answer_comes(state), self._undo(state)
        elif source.calling and not source.steps:
            if not self._answer_comes(state):
                yield "no answer to Commit", True, self._commit_answered(state, Told.NO_ANSWER)
            elif state.may.give_up_waiting:
                late = _spend(state, "give_up_waiting")
                yield "source waits no longer for Commit", False, self._commit_answered(late, Told.NO_ANSWER)

    def _source_restarts(self, state: State) -> State:
        note = state.source.note
        doing = {SourceNote.GIVEN: "asking", SourceNote.ARRIVED: "over"}.get(note, "undone")
        return _source(state, alive=True, steps=self.rules.on_source_restart(note), doing=doing, commits=2)

    def _undo(self, state: State) -> State:
        return _source(state, steps=self.rules.UNDO, doing="undone")

    def _answer_comes(self, state: State) -> bool:
        """Whether anything on its way may still become an answer that the source waits for."""
        waited_for = ("prepare", "prepared", "hand over", "handed over", "refused", COMMIT)
        on_the_way = any(message in waited_for or isinstance(message, Told) for message in state.wire)
        return on_the_way or (state.destination.asked in waited_for)

    def _commit_answered(self, state: State, answer: Told) -> State:
        source = state.source
        arrived = source.doing == "over"
        verdict = self.rules.after_commit(answer, first_in_this_life=source.commits == 1, arrived=arrived)
        state = _stale(_source(state, calling=False))
        if verdict is Verdict.TAKE_BACK:
            return _source(state, steps=self.rules.TAKE_BACK, doing="undone")
        over = "over" if arrived else "serving"
        doing = {Verdict.GONE: over, Verdict.LOST: "holding"}.get(verdict, "asking")
        return _source(state, doing=doing)

    # The destination

    def _at_destination(self, state: State) -> Iterator[Event]:
        end = state.destination
        if state.fenced:
            return
        if not end.alive:
            gone = end.guest == DEAD
            steps = self.rules.on_destination_restart(end.note, vmm_gone=gone)
            yield "destination restarts", True, _destination(state, alive=True, steps=steps)
            return
        if end.steps:
            yield f"destination: {end.steps[0].value}", True, self._destination_step(state)
            return
        if end.guest == DEAD and end.note in (DestinationNote.OWNED, DestinationNote.READY):
            yield "destination sees its VMM dead", True, _destination(state, steps=self.rules.on_give_up(end.note))
        elif end.note is DestinationNote.READY:
            yield "destination was not committed", True, _destination(state, steps=self.rules.on_abort(end.note))
        elif end.note is DestinationNote.OWNED and end.guest == RUNNING:
            if not end.whole:
                if state.source.alive and state.source.guest == STOPPED:
                    yield "every page is in", True, _destination(state, whole=True)
            elif not {"complete", "complete is heard"} & set(state.wire) and Step.ANSWER not in state.source.steps:
                yield "destination says Complete", True, _send(state, "complete")

    def _destination_step(self, state: State) -> State:
        end = state.destination
        step, steps = end.steps[0], end.steps[1:]
        state = _destination(state, steps=steps)
        notes = {
            Step.NOTE_READY: DestinationNote.READY,
            Step.NOTE_OWNED: DestinationNote.OWNED,
            Step.NOTE_NEVER: DestinationNote.NEVER,
            Step.NOTE_LOST: DestinationNote.LOST,
            Step.FORGET: DestinationNote.NONE,
        }
        if step in notes:
            state = _destination(state, note=notes[step])
        elif step is Step.RUN and end.guest == WAITING:
            state = _destination(state, guest=RUNNING)._replace(ran_there=True)
        elif step is Step.KILL:
            state = _destination(state, guest=DEAD)
        elif step is Step.ANSWER and end.asked == "prepare":
            state = _send(state, "prepared")
        elif step is Step.ANSWER and end.asked == COMMIT:
            # To a call that nobody waits for any more, the answer is dropped.
            state = _send(state, self.rules.told(end.note, whole=end.whole))
        return state if steps else _destination(state, asked="")

    # The wire

    def _on_the_wire(self, state: State) -> Iterator[Event]:
        for message in sorted(set(state.wire), key=str):
            end = state.destination if message in TO_DESTINATION else state.source
            rest = list(state.wire)
            rest.remove(message)
            without = state._replace(wire=tuple(rest))
            if end.alive and not end.steps:
                yield f"{message} arrives", True, self._deliver(without, message)
            elif not end.alive:
                yield f"{message} finds nobody", True, without
            if state.may.lose:
                yield f"{message} is lost", False, _spend(without, "lose")
            if state.may.repeat and end.alive and not end.steps and message in TO_DESTINATION:
                yield f"{message} arrives, and will again", False, _spend(self._deliver(state, message), "repeat")

    def _deliver(self, state: State, message: str | Told) -> State:
        if isinstance(message, Told):
            return self._commit_answered(state, message) if state.source.calling else state
        return (
            self._destination_hears(state, message) if message in TO_DESTINATION else self._source_hears(state, message)
        )

    def _destination_hears(self, state: State, message: str) -> State:
        end, rules = state.destination, self.rules
        waits = end.guest == WAITING
        if message == "prepare" and waits and rules.may_prepare(end.note):
            return _destination(state, steps=(Step.NOTE_READY, Step.ANSWER), asked=message)
        if message == "hand over" and waits and end.note is DestinationNote.READY:
            return _send(_destination(state, loaded=True), "handed over")
        if message in ("prepare", "hand over"):
            return _send(state, "refused")
        if message == "abort":
            return _destination(state, steps=rules.on_abort(end.note) or ())
        if message in (COMMIT, STALE_COMMIT):
            return _destination(state, steps=rules.on_commit(end.note, loaded=end.loaded), asked=message)
        done = end.note is DestinationNote.OWNED and end.whole
        return _destination(state, steps=rules.WHOLE) if done else state

    def _source_hears(self, state: State, message: str) -> State:
        doing, rules = state.source.doing, self.rules
        if message == "complete":
            steps = rules.on_complete(state.source.note)
            return state if steps is None else _source(state, steps=steps, doing="over")
        if message == "prepared" and doing == "preparing":
            return _source(state, steps=rules.LEAVE, doing="leaving")
        if message == "handed over" and doing == "leaving":
            return _source(state, steps=rules.GIVE, doing="giving")
        if message == "refused" and doing in ("preparing", "leaving"):
            return self._undo(state)
        return state

    # Trouble

    def _trouble(self, state: State) -> Iterator[Event]:
        if state.may.kill_source and state.source.alive:
            killed = _source(state, alive=False, steps=(), calling=False, view=None)
            yield "source is killed", False, _spend(_stale(killed), "kill_source")
        if state.may.kill_destination and state.destination.alive and not state.fenced:
            killed = _destination(state, alive=False, steps=(), asked="", loaded=False)
            yield "destination is killed", False, _spend(killed, "kill_destination")
        if state.may.reboot_destination and not state.fenced:
            yield "destination's host restarts", False, _spend(_off(state, alive=True), "reboot_destination")
        if state.may.kill_vmm and state.destination.guest in (WAITING, RUNNING):
            dead = _destination(state, guest=DEAD)._replace(died=True)
            yield "destination's VMM dies", False, _spend(dead, "kill_vmm")

    def _operator(self, state: State) -> Iterator[Event]:
        source, end = state.source, state.destination
        if state.may.fence and not state.fenced:
            yield "destination is fenced", False, _spend(_off(state, alive=False)._replace(fenced=True), "fence")
        if not state.may.operator:
            return
        if source.alive and source.view is None and source.note in (SourceNote.GIVEN, SourceNote.ARRIVED):
            answers = end.alive and not end.steps
            view = self.rules.told(end.note, whole=end.whole) if answers else Told.NO_ANSWER
            yield f"operator is shown {view.value!r}", False, _source(state, view=view)
        decided = _spend(state, "operator")._replace(decided=True)
        if end.alive and not end.steps and (steps := self.rules.on_give_up(end.note)):
            yield "operator gives up at the destination", False, _destination(decided, steps=steps)
        if not source.alive or source.steps or source.view is None:
            return
        shown = source.note, source.view
        if self.rules.may_run_at_source(*shown, peer_fenced=state.fenced) is None:
            taken = _stale(_source(decided, steps=self.rules.TAKE_BACK, doing="undone", calling=False))
            yield "operator runs it at the source", False, taken
        if self.rules.may_give_up_at_source(*shown, peer_fenced=state.fenced) is None:
            ended = _stale(_source(decided, steps=self.rules.GIVE_UP_AT_SOURCE, doing="ended", calling=False))
            yield "operator gives up at the source", False, ended


def _source(state: State, **changes: object) -> State:
    return state._replace(source=state.source._replace(**changes))


def _destination(state: State, **changes: object) -> State:
    return state._replace(destination=state.destination._replace(**changes))


def _send(state: State, message: str | Told) -> State:
    return state._replace(wire=tuple(sorted((*state.wire, message), key=str)))


def _spend(state: State, what: str) -> State:
    return state._replace(may=state.may._replace(**{what: getattr(state.may, what) - 1}))


def _stale(state: State) -> State:
    """Nobody waits for an answer any more: a Commit on its way may arrive still, its answer is dropped."""
    wire = [STALE_COMMIT if message == COMMIT else message for message in state.wire if not isinstance(message, Told)]
    state = state._replace(wire=tuple(sorted(wire, key=str)))
    return _destination(state, asked=STALE_COMMIT) if state.destination.asked == COMMIT else state


def _off(state: State, *, alive: bool) -> State:
    """The destination's host goes down with its VMMs, its notes and its connections."""
    lost = Destination(alive=alive, guest=DEAD, whole=state.destination.whole)
    return state._replace(destination=lost, wire=(), forgotten=True)


def _source_step(state: State) -> State:
    source = state.source
    step, state = source.steps[0], _source(state, steps=source.steps[1:])
    notes = {
        Step.NOTE_LEAVING: SourceNote.LEAVING,
        Step.NOTE_GIVEN: SourceNote.GIVEN,
        Step.NOTE_TAKEN_BACK: SourceNote.LEAVING,
        Step.NOTE_ARRIVED: SourceNote.ARRIVED,
        Step.FORGET: SourceNote.NONE,
    }
    guests = {Step.STOP: STOPPED, Step.RUN: RUNNING, Step.KILL: DEAD}
    messages = {Step.SEND_HAND_OVER: "hand over", Step.SEND_ABORT: "abort", Step.ANSWER: "complete is heard"}
    if step in notes:
        return _source(state, note=notes[step])
    if step in guests:
        return _source(state, guest=guests[step])
    if step is Step.SEND_COMMIT:
        return _send(_source(state, calling=True, doing="asking", commits=min(source.commits + 1, 2)), COMMIT)
    return _send(state, messages[step])
