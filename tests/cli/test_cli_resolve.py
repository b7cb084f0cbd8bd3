"""`pageferry resolve`: both ends shown, a decision asked for, sent and shown."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SECONDS = 30
QUESTION = "[y/N] "
DECISION = ("resolve", "m-lost", "--run-at-source", "--peer-fenced")


def test_without_a_decision_both_ends_are_shown_and_what_can_be_decided(ferry):
    outcome = ferry("resolve", "m-lost")

    words = " ".join(outcome.out.split())
    assert outcome.status == 0
    assert "host alpha beta" in words
    assert "DOES NOT ANSWER" in words
    assert "--run-at-source only with --peer-fenced beta cannot be asked" in words
    assert "decide: pageferry resolve m-lost OPTION" in words


def test_a_program_is_told_what_each_end_knows(ferry):
    outcome = ferry("resolve", "m-asked", "--json")

    found = json.loads(outcome.out)
    assert outcome.err == ""
    assert found["migration_id"] == "m-asked"
    assert [end["role"] for end in found["ends"]] == ["ROLE_SOURCE", "ROLE_DESTINATION"]
    assert found["ends"][0]["state"] == "MIGRATION_STATE_IN_DOUBT"
    assert found["ends"][1]["pages_missing"] == 300


def test_a_decision_shows_both_ends_what_it_means_and_its_outcome(ferry):
    outcome = ferry(*DECISION, "--yes")

    before, after = outcome.out.split("decided: the guest goes on at alpha\n")
    assert outcome.status == 0
    assert "DOES NOT ANSWER" in before
    assert "two of it will run" in before
    assert QUESTION not in before
    assert "runs the guest" in after
    assert "decided by an operator" in after


def test_a_decision_for_a_program_is_one_document(ferry):
    outcome = ferry("resolve", "m-lost", "--give-up", "--peer-fenced", "--yes", "--json")

    found = json.loads(outcome.out)
    assert outcome.err == ""
    assert found["ends"][0]["state"] == "MIGRATION_STATE_FAILED"
    assert found["ends"][0]["vmm_activity"] == ""


def test_a_destination_gives_its_guest_up(ferry):
    outcome = ferry("resolve", "m-coming", "--give-up", "--yes")

    assert outcome.status == 0
    assert "decided: the guest is given up at beta" in outcome.out


def test_a_destination_is_not_asked_to_run_the_guest_at_its_source(ferry):
    outcome = ferry("resolve", "m-coming", "--run-at-source", "--yes")

    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ILLEGAL_STATE: ")
    assert "the sidecar of alpha" in outcome.err


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("m-lost", "--run-at-source"), "make sure that it is off"),
        (("m-asked", "--run-at-source", "--peer-fenced"), "has not given asked up"),
    ],
)
def test_a_decision_that_the_sidecar_refuses_is_an_error(ferry, command, why):
    outcome = ferry("resolve", *command, "--yes")

    assert outcome.status == 2
    assert outcome.err.startswith("error: IN_DOUBT: ")
    assert why in outcome.err
    assert "decided:" not in outcome.out


def test_a_decision_without_an_answer_may_have_been_carried_out(ferry):
    outcome = ferry("resolve", "m-mute", "--run-at-source", "--peer-fenced", "--yes")

    assert outcome.status == 2
    assert outcome.err.startswith("error: SIDECAR_UNREACHABLE: ")
    assert "may have been carried out all the same" in outcome.err


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_decision_without_a_terminal_has_to_be_given_with_yes(address, more):
    done = subprocess.run(
        [sys.executable, "-m", "pageferry.cli.main", "--insecure", "--address", address, *DECISION, *more],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: INVALID_ARGUMENT: ")
    assert "give --yes" in done.stderr


def test_the_help_says_what_each_option_decides(pageferry):
    words = " ".join(pageferry("resolve", "--help").out.split())

    for option in ("--run-at-source", "--give-up", "--peer-fenced", "--yes"):
        assert option in words
    assert "nothing is changed" in words


class Operator:
    """Somebody at a terminal of 120 columns, who runs the command there."""

    def __init__(self, address: str, *arguments: str, json_at: Path | None = None) -> None:
        self._master, slave = os.openpty()
        self.seen = ""
        with open(json_at or os.devnull, "wb") as document:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pageferry.cli.main", "--insecure", "--address", address, *arguments],
                stdin=slave,
                stdout=document if json_at else slave,
                stderr=slave,
                env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"},
            )
        os.close(slave)

    def reads(self, *, until: str | None = None) -> str:
        """Read up to a text, or to the end of the process, and return everything seen."""
        deadline = time.monotonic() + SECONDS
        while until is None or until not in self.seen:
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, self.seen
            try:
                got = os.read(self._master, 65536)
            except OSError:
                # The last one who had the terminal open is gone.
                assert until is None, self.seen
                break
            self.seen += got.decode()
        return self.seen

    def types(self, text: str) -> None:
        os.write(self._master, text.encode())

    def status(self) -> int:
        self.reads()
        return self.process.wait(SECONDS)

    def leave(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(SECONDS)
        os.close(self._master)


@pytest.fixture
def operator(address: str) -> Iterator[Callable[..., Operator]]:
    """Have somebody run the command at a terminal."""
    there: list[Operator] = []

    def sits_down(*arguments: str, json_at: Path | None = None) -> Operator:
        there.append(Operator(address, *arguments, json_at=json_at))
        return there[-1]

    yield sits_down
    for each in there:
        each.leave()


@pytest.mark.parametrize("answer", ["y\n", "YES\n"])
def test_a_confirmed_decision_is_carried_out(operator, answer):
    someone = operator(*DECISION)

    before = someone.reads(until=QUESTION)
    assert "DOES NOT ANSWER" in before
    assert "two of it will run" in before
    assert "decided:" not in before
    someone.types(answer)

    assert someone.status() == 0
    assert "decided: the guest goes on at alpha" in someone.seen


@pytest.mark.parametrize("answer", ["\n", "n\n", "yellow\n", "\x04"], ids=["return", "n", "a word", "end of input"])
def test_whatever_is_no_yes_decides_nothing(operator, answer):
    someone = operator(*DECISION)

    someone.reads(until=QUESTION)
    someone.types(answer)

    assert someone.status() == 2
    assert "error: CANCELLED: not confirmed: nothing was decided" in someone.seen


def test_ctrl_c_at_the_question_decides_nothing(operator):
    someone = operator(*DECISION)

    someone.reads(until=QUESTION)
    someone.process.send_signal(signal.SIGINT)

    assert someone.status() == 130
    assert "decided:" not in someone.seen


def test_yes_asks_nobody_at_a_terminal_either(operator):
    someone = operator(*DECISION, "--yes")

    assert someone.status() == 0
    assert QUESTION not in someone.seen


def test_the_question_stays_out_of_the_document(operator, tmp_path):
    someone = operator(*DECISION, "--json", json_at=tmp_path / "ends.json")

    assert "DOES NOT ANSWER" in someone.reads(until=QUESTION)
    someone.types("y\n")

    assert someone.status() == 0
    assert json.loads((tmp_path / "ends.json").read_text())["ends"][0]["vmm_activity"] == "running"
