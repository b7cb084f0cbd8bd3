"""The shell around the pager, as a session is one: it reads the kernel, asks, installs, and reconnects."""

from __future__ import annotations

import random
from collections import deque
from typing import NamedTuple

from pageferryd.core.demand import FaultTimes
from pageferryd.core.pager import Answer, Lane, Pager
from pageferryd.core.runs import POISONED, RAW, ZERO, Run

from .clock import Clock, Violation
from .fate import Hands
from .kernel import Placed
from .source import POISON, ZEROES, Content, Message
from .staging import Staging
from .watch import Watch
from .wire import Wire


class Piece(NamedTuple):
    run: Run
    contents: list[Content]
    lane: Lane


class Shell:
    def __init__(self, rng: random.Random, clock: Clock, pager: Pager, hands: Hands, wire: Wire, watch: Watch) -> None:
        self._rng = rng
        self.clock = clock
        self.pager = pager
        self.kernel, self.journal = hands
        self.wire = wire
        self.watch = watch
        self.connected = False
        self.completing = False
        self.done = False
        self.reconnects = 0
        self._backoff = 0.01
        self._reading = False
        self._retrying = False
        self._timer = float("inf")
        self.backlog: deque[Piece] = deque()
        self.zeroes: deque[int] = deque()
        self.staging = Staging(pager.layout)
        wire.deliver, wire.lost, wire.completed = self._deliver, self._lost, self._completed

    def begin(self) -> None:
        """Serve."""
        self.clock.after(0, self._connect)
        self.readable()

    # After an earlier sidecar's end

    def recover(self) -> None:
        """Go on where an earlier sidecar ended: what is there is there, and who waits touches again."""
        self.look_what_is_there()
        self.restore_discards()
        self.wake_all()

    def look_what_is_there(self) -> None:
        for first, pages in self.kernel.present():
            self.pager.found(first, pages)

    def restore_discards(self) -> None:
        now = self.clock.now
        for first, pages in self.journal.open():
            self.pager.discard(first, pages, now)
        if self.journal.whole:
            # Every page had been here once: those that are not were given away.
            for first, pages in list(self.pager.map.missing_runs(0, self.pager.layout.page_count)):
                self.pager.discard(first, pages, now)

    def wake_all(self) -> None:
        self.kernel.wake(0, self.pager.layout.page_count)

    # Connections

    def _connect(self) -> None:
        if self.done:
            return
        if self.wire.connect():
            self.clock.note("connected")
            self.connected = True
            self._backoff = 0.01
            self.pump()
        else:
            self._backoff = min(2 * self._backoff, 0.5)
            self.clock.after(self._backoff * (0.75 + self._rng.random() / 2), self._connect)

    def _lost(self) -> None:
        if not self.connected or self.done:
            return
        self.clock.note("lanes lost")
        self.connected = self.completing = False
        self.reconnects += 1
        self.wire.drop()
        self.lose_lanes()
        self.clock.after(self._backoff, self._connect)

    def lose_lanes(self) -> None:
        self.watch.lost()
        for lane in Lane:
            self.pager.lane_lost(lane)

    # What comes in

    def readable(self) -> None:
        if not self._reading:
            self._reading = True
            self.clock.after(self._rng.random() * 0.0005, self._read)

    def _read(self) -> None:
        self._reading = False
        if self.done:
            return
        self._take_events()
        self.pump()

    def _take_events(self) -> None:
        for what, first, pages in self.kernel.read():
            if what == "discard":
                self.discard(first, pages)
            else:
                self.fault(first)

    def fault(self, page: int) -> None:
        now = self.clock.now
        answer = self.pager.fault(page, now, now - 0.0001)
        self.clock.note("fault", page, answer.value)
        self.watch.faulted(answer)
        if answer is Answer.ZERO:
            self.serve_zero(page)
        elif answer in (Answer.WAKE, Answer.POISON):
            self.kernel.wake(page, 1)

    def discard(self, first: int, pages: int) -> None:
        self.clock.note("discard", first, "to", first + pages)
        self.journal.note(first, pages)
        self.drop(first, pages)

    def drop(self, first: int, pages: int) -> None:
        """What is under way of pages that were given away is of no use."""
        self.staging.drop(first, pages)
        ended = self.pager.discard(first, pages, self.clock.now)
        self.ended(ended)
        for times in ended:
            self.serve_zero(times.page)

    def _deliver(self, lane: Lane, message: Message) -> None:
        now = self.clock.now
        self.clock.note(lane.value, "brings", message.runs, "last" if message.last else "")
        if lane is Lane.DEMAND:
            self.watch.answered(message)
            self.pager.demand_arrived(message.runs, now)
        else:
            self.watch.pushed(message)
            self.pager.push_arrived(message.runs, now, last=message.last)
        at = 0
        for run in message.runs:
            contents = {RAW: message.contents[at : at + run.pages], ZERO: [ZEROES] * run.pages}.get(run.kind)
            at += run.pages if run.kind == RAW else 0
            self.place(Piece(run, contents or [POISON] * run.pages, lane))
        self.pump()

    # Installing

    def place(self, piece: Piece) -> None:
        run = piece.run
        wanted = self.wanted(run)
        surplus = run.pages - sum(pages for _, pages in wanted)
        if surplus:
            self.pager.duplicate(surplus)
        for first, pages in wanted:
            contents = piece.contents[first - run.first : first - run.first + pages]
            part = Piece(Run(first, pages, run.kind), contents, piece.lane)
            if self.pager.layout.granule(first)[1] == 1:
                self.put(part)
            else:
                for whole, held in self.staging.add(part.run, contents):
                    self.put(Piece(whole, held, piece.lane))

    def wanted(self, run: Run) -> list[tuple[int, int]]:
        return self.pager.wanted(run)

    def put(self, piece: Piece) -> None:
        (first, left, kind), contents, lane = piece
        whole = self.pager.layout.granule(first)[1] > 1
        while left:
            done, how = self.kernel.install(first, contents, whole=whole)
            if how is Placed.EXISTS:
                # What was there before is as good; whoever sleeps on it has to be woken.
                self.kernel.wake(first, left if whole else done + 1)
                done = left if whole else done + 1
            if done:
                self.settle(Run(first, done, kind), lane)
            first, left, contents = first + done, left - done, contents[done:]
            if how is Placed.RETRY:
                self.defer(Piece(Run(first, left, kind), contents, lane))
                return

    def settle(self, run: Run, lane: Lane) -> None:
        if run.kind == POISONED:
            self.ended(self.pager.poisoned(run, self.clock.now))
        else:
            self.ended(self.pager.installed(run, lane, self.clock.now))

    def ended(self, ended: list[FaultTimes]) -> None:
        self.watch.ended(ended)

    def serve_zero(self, page: int) -> None:
        first, pages = self.pager.layout.granule(page)
        for zero in range(first, first + pages):
            if self.kernel.install_zero(zero) is Placed.RETRY:
                self.zeroes.append(page)
                self._retry_later()
                return

    def defer(self, piece: Piece) -> None:
        self.clock.note("defer", piece.run)
        self.backlog.append(piece)
        self._retry_later()

    def _retry_later(self) -> None:
        if not self._retrying:
            self._retrying = True
            self.clock.after(0.0005, self._retry)

    def _retry(self) -> None:
        self._retrying = False
        if self.done:
            return
        self._take_events()
        for _ in range(len(self.backlog)):
            self.place(self.backlog.popleft())
        for _ in range(len(self.zeroes)):
            self.serve_zero(self.zeroes.popleft())
        self.pump()

    # What goes out

    def pump(self) -> None:
        """Send what is due, set the timer, and say when all is in."""
        if self.done or not self.connected:
            return
        now = self.clock.now
        while (runs := self.pager.next_fetch(now)) is not None:
            self.clock.note("ask on demand", runs)
            self.watch.asked(runs)
            self.wire.fetch(runs)
        while (request := self.pager.next_push(now)) is not None:
            self.clock.note("ask on push", request.runs, "for", request.credit)
            self.watch.asked_to_push(request)
            self.wire.push(request.runs, request.credit)
        if self.is_complete() and not self.completing:
            self.clock.note("complete")
            self.completing = True
            self.note_whole()
            self.clock.after(1.0, self._check_completion, self.reconnects)
            self.wire.complete(self.pager.layout.page_count)
        self._set_timer(now)

    def note_whole(self) -> None:
        self.journal.note_whole()

    def is_complete(self) -> bool:
        return self.pager.complete and not self.backlog and not self.zeroes

    def _set_timer(self, now: float) -> None:
        due = self.pager.next_timer(now)
        if due is None:
            self._timer = float("inf")
        elif due != self._timer:
            if due <= now and self.pager.silent_lane(now) is None:
                raise Violation("the pager wants to be asked again at once")
            self._timer = due
            self.clock.at(due, self._tick, due)

    def _tick(self, due: float) -> None:
        if due != self._timer or self.done or not self.connected:
            return
        self._timer = float("inf")
        lane = self.pager.silent_lane(self.clock.now)
        if lane is None:
            self.pump()
        else:
            self.clock.note(f"{lane.value} is silent")
            self._lost()

    def _check_completion(self, reconnects: int) -> None:
        if not self.done and reconnects == self.reconnects:
            self._lost()

    def _completed(self) -> None:
        self.clock.note("completed")
        self._take_events()
        self.done = True
        self.kernel.unregister()
