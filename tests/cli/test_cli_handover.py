"""What both ends say of a guest's owner, in words, and what can be decided about it."""

from __future__ import annotations

import io

import pytest
from fake_handovers import destination, source, unreachable
from rich.console import Console

from pageferry.cli import handover
from pageferry.cli.handover import Ends
from pageferry.errors import FerryError, Reason
from pageferry.v1 import migration_pb2 as pb

POSSIBLE, REFUSED, FENCED = "possible", "refused now", "only with --peer-fenced"


def words(what) -> str:
    out = Console(file=io.StringIO(), width=200, color_system=None)
    out.print(what)
    return " ".join(out.file.getvalue().split())


def verdicts(here: pb.HandoverView, there: pb.HandoverView) -> dict[str, str]:
    return {choice.option: choice.verdict for choice in handover.choices(Ends(here, there))}


def test_a_guest_that_a_failed_migration_left_behind_can_be_decided_on() -> None:
    failed = {"state": pb.MIGRATION_STATE_FAILED}
    given_up = destination(handed_over=False, **failed)
    assert verdicts(source(**failed), given_up) == {handover.RUN_AT_SOURCE: POSSIBLE, handover.GIVE_UP: FENCED}
    assert verdicts(destination(**failed), unreachable(pb.ROLE_SOURCE))[handover.GIVE_UP] == POSSIBLE
    assert verdicts(given_up, unreachable(pb.ROLE_SOURCE)) == {}


def test_a_guest_that_is_well_at_its_destination_is_not_given_up_there() -> None:
    running = destination(state=pb.MIGRATION_STATE_POSTCOPY)
    assert verdicts(running, source())[handover.GIVE_UP] == REFUSED


@pytest.mark.parametrize(
    ("there", "run_at_source", "give_up"),
    [
        (unreachable(), FENCED, FENCED),
        (pb.HandoverView(role=pb.ROLE_DESTINATION, host="beta", reachable=True), FENCED, FENCED),
        (destination(), REFUSED, FENCED),
        (destination(pages_missing=0), REFUSED, FENCED),
        (destination(pages_missing=0, state=pb.MIGRATION_STATE_COMPLETED), REFUSED, POSSIBLE),
        (destination(state=pb.MIGRATION_STATE_FAILED), REFUSED, FENCED),
        (destination(handed_over=False, pages_missing=0), REFUSED, FENCED),
        (destination(state=pb.MIGRATION_STATE_FAILED, handed_over=False), POSSIBLE, FENCED),
    ],
)
def test_a_source_decides_by_what_the_destination_says(there, run_at_source, give_up):
    assert verdicts(source(), there) == {"--run-at-source": run_at_source, "--give-up": give_up}


def test_a_destination_can_only_give_the_guest_up():
    there = unreachable(pb.ROLE_SOURCE, "alpha")

    assert verdicts(destination(), there) == {"--run-at-source": REFUSED, "--give-up": POSSIBLE}


@pytest.mark.parametrize(
    ("here", "why"),
    [
        (source(state=pb.MIGRATION_STATE_COMPLETED), "nothing is left to decide"),
        (source(state=pb.MIGRATION_STATE_PREPARING, handed_over=False), "pageferry cancel m"),
        (source(known=False), "knows nothing of the migration"),
    ],
)
def test_where_nothing_has_to_be_decided_it_says_why(here, why):
    ends = Ends(here, destination())

    assert handover.choices(ends) == []
    assert why in words(handover.options(ends, "m"))


def test_an_end_that_does_not_answer_is_not_spoken_for():
    said = words(handover.both(Ends(source(), unreachable())))

    assert "state in doubt DOES NOT ANSWER" in said
    assert "record handed over: it may have run at the destination -" in said
    assert "its VMM has the guest, which stands still -" in said
    assert "connection refused" in said


def test_an_end_that_does_not_know_the_migration_says_so():
    there = pb.HandoverView(role=pb.ROLE_DESTINATION, host="beta", reachable=True)

    assert "knows nothing of this migration" in words(handover.both(Ends(source(), there)))


def test_a_record_that_is_not_there_claims_nothing():
    said = words(handover.both(Ends(source(handed_over=False), destination(handed_over=False))))

    assert "record no handover on record no takeover on record: the guest is not its own" in said


def test_what_the_destination_lacks_is_told_in_pages_and_bytes():
    assert "lacks - 300 pages, 1.2 MiB" in words(handover.both(Ends(source(), destination())))
    assert "lacks - no page" in words(handover.both(Ends(source(), destination(pages_missing=0))))


def test_a_vmm_that_says_something_new_is_quoted_and_a_silent_one_named():
    said = words(handover.both(Ends(source(vmm_activity="dreaming"), destination(vmm_activity=""))))

    assert "its VMM dreaming does not answer" in said


def test_two_running_guests_are_an_alarm():
    both_run = Ends(source(vmm_activity="running"), destination())

    assert "BOTH HOSTS SAY THAT THEY RUN THE GUEST" in words(handover.both(both_run))
    assert "BOTH HOSTS" not in words(handover.both(Ends(source(), destination())))


@pytest.mark.parametrize(
    "views",
    [[], [source()], [source(), source()], [source(), destination(), destination()]],
    ids=["none", "one", "two sources", "three"],
)
def test_ends_that_are_not_two_are_an_answer_of_something_else(views):
    with pytest.raises(FerryError, match="not one source and one destination") as caught:
        handover.ends_of(views)

    assert caught.value.reason is Reason.PROTOCOL_MISMATCH


@pytest.mark.parametrize(
    ("decision", "here", "there", "lost", "promise"),
    [
        (pb.DECISION_RUN_AT_SOURCE, source(), unreachable(), "did at beta since then is lost", "two of it will run"),
        (pb.DECISION_GIVE_UP, source(), unreachable(), "Pages that beta lacks", "needs nothing of it from here"),
        (pb.DECISION_GIVE_UP, destination(), source(), "What it did there is lost", "made sure of alpha"),
    ],
)
def test_a_decision_names_what_is_lost_and_fencing_what_is_promised(decision, here, there, lost, promise):
    plain = handover.consequences(decision, Ends(here, there), peer_fenced=False)
    fenced = handover.consequences(decision, Ends(here, there), peer_fenced=True)

    assert lost in " ".join(plain)
    assert promise not in " ".join(plain)
    assert fenced[:-1] == plain
    assert promise in fenced[-1]


def test_a_host_without_a_name_is_called_by_its_role():
    nameless = Ends(source(host=""), unreachable(host=""))

    assert "the destination cannot be asked" in words(handover.options(nameless, "m"))
    assert handover.done(pb.DECISION_RUN_AT_SOURCE, nameless).endswith("at the source")
