"""Each command, as text and as JSON, against a sidecar that plays its part."""

from __future__ import annotations

import json

import pytest

from pageferry import __version__


def document(outcome):
    """Return the one JSON document on stdout."""
    assert outcome.err == ""
    return json.loads(outcome.out)


def test_preflight_lists_the_checks_and_their_remedies(ferry):
    outcome = ferry("preflight", "--guest", "web")

    assert outcome.status == 0
    assert "pageferryd 9.9" in outcome.out
    assert "userfaultfd" in outcome.out
    assert "remedy: be patient" in outcome.out


def test_preflight_of_a_destination_that_cannot_exits_with_1(ferry):
    outcome = ferry("preflight", "--to", "127.0.0.1:1", "--to-name", "beta")

    assert outcome.status == 1
    assert "beta has too little" in outcome.out


def test_preflight_tells_a_program_the_same(ferry):
    outcome = ferry("preflight", "--to", "127.0.0.1:1", "--json")

    assert outcome.status == 1
    found = document(outcome)
    assert found["checks"] == [{"name": "userfaultfd", "status": "CHECK_STATUS_OK", "detail": "in order", "remedy": ""}]
    assert found["destination_checks"][0]["status"] == "CHECK_STATUS_FAILED"


def test_register_sends_the_absolute_path_of_the_socket(ferry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    found = document(ferry("register", "new", "vmm.sock", "--json"))

    assert found["vmm_address"] == str(tmp_path / "vmm.sock")
    assert found["state"] == "GUEST_STATE_INCOMING"
    assert found["pid"] == 42


def test_register_shows_the_guest(ferry):
    outcome = ferry("register", "new", "/run/new.sock")

    assert outcome.status == 0
    assert "incoming" in outcome.out
    assert "/run/new.sock" in outcome.out


def test_register_names_the_kind_of_vmm(ferry):
    found = document(ferry("register", "new", "/run/new.qmp", "--driver", "qemu", "--json"))

    assert (found["driver"], found["movable"]) == ("qemu", False)
    assert found["obstacles"] == ["its VMM waits for the guest to come"]


def test_the_help_of_register_names_every_kind_of_vmm(pageferry):
    words = " ".join(pageferry("register", "--help").out.split())

    for driver in ("vmm (", "qemu (", "cloud-hypervisor", "firecracker"):
        assert driver in words


def test_unregister_says_that_the_guest_is_forgotten(ferry):
    assert ferry("unregister", "web").out == "web is forgotten\n"
    assert document(ferry("unregister", "web", "--json")) == {"guest_id": "web"}


def test_list_shows_guests_and_migrations(ferry):
    outcome = ferry("list")

    assert outcome.status == 0
    assert "/run/web.sock" in outcome.out
    assert "16.0 MiB" in outcome.out
    assert "m-web" in outcome.out
    assert "12.3 ms" in outcome.out


def test_list_says_of_each_guest_whether_it_can_be_moved(ferry):
    lines = [line.split() for line in ferry("list").out.splitlines()]

    assert ["GUEST", "STATE", "MOVABLE", "MEMORY", "PID", "DRIVER", "VMM"] in lines
    assert ["web", "running", "yes", "16.0", "MiB", "4242", "vmm", "/run/web.sock"] in lines
    assert ["held", "paused", "no", "1.0", "GiB", "77", "qemu", "/run/held.qmp"] in lines
    assert ["absent", "no", "answer", "no", "-", "-", "firecracker", "/run/absent.sock"] in lines


def test_list_says_in_sentences_why_a_guest_cannot_be_moved(ferry):
    out = ferry("list", "--guest", "held").out

    reasons = [line for line in out.splitlines() if line.startswith("held ") and "/run/" not in line]
    assert [line.split(maxsplit=1)[1] for line in reasons[:2]] == [
        "it is paused: only a running guest can be moved",
        "a host device is passed through to it: net0",
    ]
    assert "WHY NOT" in out


def test_list_gives_no_reasons_where_every_guest_can_be_moved(ferry):
    assert "WHY NOT" not in ferry("list", "--guest", "web").out


def test_list_tells_a_program_what_is_in_the_way(ferry):
    guests = {guest["guest_id"]: guest for guest in document(ferry("list", "--json"))["guests"]}

    assert (guests["web"]["movable"], guests["web"]["obstacles"]) == (True, [])
    assert guests["held"]["movable"] is False
    assert guests["held"]["obstacles"][1] == "a host device is passed through to it: net0"
    assert guests["absent"]["state"] == "GUEST_STATE_UNSPECIFIED"


def test_list_of_one_guest_leaves_the_others_out(ferry):
    found = document(ferry("list", "--guest", "doomed", "--json"))

    assert [guest["guest_id"] for guest in found["guests"]] == ["doomed"]
    assert [migration["guest_id"] for migration in found["migrations"]] == ["doomed"]


def test_integers_are_integers_in_json(ferry):
    found = document(ferry("list", "--json"))

    assert found["guests"][0]["memory_bytes"] == 1 << 24
    assert found["migrations"][0]["progress"]["pages_total"] == 4096
    assert found["migrations"][0]["memory_map"]["pages_per_cell"] == 256
    assert found["migrations"][0]["fault_latencies"][0]["latency"]["count"] == 1000


def test_migrate_follows_the_guest_to_its_destination(ferry):
    outcome = ferry("migrate", "web", "--to", "127.0.0.1:7444", "--to-name", "beta")

    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["preparing", "postcopy", "completed"]
    assert "downtime" in outcome.out
    assert "m-web" in outcome.out


def test_migrate_without_waiting_returns_what_was_started(ferry):
    limits = ("--push-rate", "200M", "--push-window", "1MiB", "--fault-objective", "2ms", "--no-push")

    found = document(
        ferry("migrate", "web", "--to", "127.0.0.1:7444", "--request-id", "r1", "--no-wait", "--json", *limits)
    )

    assert found["state"] == "MIGRATION_STATE_PENDING"
    assert found["request_id"] == "r1"
    assert found["destination_address"] == "127.0.0.1:7444"
    assert found["limits"] == {
        "push_bytes_per_second": 200 << 20,
        "push_window_bytes": 1 << 20,
        "fault_objective_us": 2000,
        "push_disabled": True,
        "push_weight": 0,
    }


def test_migrate_sends_the_policy_and_the_weight(ferry):
    policy = ("--on-loss", "kill", "--loss-seconds", "600", "--checksums", "--push-weight", "250")

    found = document(ferry("migrate", "web", "--to", "127.0.0.1:7444", "--no-wait", "--json", *policy))

    assert found["policy"] == {"on_loss": "ON_LOSS_KILL", "loss_seconds": 600, "checksums": True}
    assert found["limits"]["push_weight"] == 250


def test_migrate_leaves_to_the_sidecars_what_is_not_given(ferry):
    found = document(ferry("migrate", "web", "--to", "127.0.0.1:7444", "--no-wait", "--json"))

    assert found["policy"] == {"on_loss": "ON_LOSS_UNSPECIFIED", "loss_seconds": 0, "checksums": False}


def test_migrate_can_have_a_guest_wait_for_its_source(ferry):
    outcome = ferry("migrate", "web", "--to", "127.0.0.1:7444", "--no-wait", "--on-loss", "wait")

    assert "source lost: the guest waits for it; no checksums" in outcome.out


def test_migrate_shows_how_the_guest_comes_nearer_to_its_turn(ferry):
    lines = ferry("migrate", "queued", "--to", "127.0.0.1:7444").out.splitlines()

    assert lines[:2] == ["pending: waits for its turn: 3rd", "pending: waits for its turn: 2nd"]
    assert lines[2].startswith("preparing: ")


def test_list_tells_the_place_of_who_waits_for_a_turn(ferry):
    assert ["m-queued", "queued", "leaves", "alpha", "beta", "pending,", "3rd", "0", "%", "-"] in [
        line.split() for line in ferry("list").out.splitlines()
    ]


def test_list_names_what_to_do_about_a_migration_in_doubt(ferry):
    last = ferry("list").out.splitlines()[-1]

    assert last == "m-lost is in doubt; see what both ends know, and decide: pageferry resolve m-lost"
    assert "resolve" not in ferry("list", "--guest", "web").out


def test_show_of_a_migration_in_doubt_names_what_to_do_and_how_it_is_carried_out(ferry):
    words = " ".join(ferry("show", "m-lost").out.split())

    assert "decide: pageferry resolve m-lost" in words
    assert "policy source lost for 600 s: the guest is killed; every page carries a checksum" in words
    assert "came damaged 2 by their checksums" in words


def test_show_tells_of_damaged_pages_only_where_there_are_some(ferry):
    out = ferry("show", "m-web").out

    assert "damaged" not in out
    assert "source lost: as the destination's sidecar is set; no checksums" in out


def test_show_of_who_waits_for_a_turn_has_no_figures(ferry):
    out = ferry("show", "m-queued").out

    assert "waits for its turn: 3rd" in out
    assert "throughput" not in out


def test_watch_goes_on_while_a_migration_is_in_doubt_and_names_what_to_do(ferry):
    outcome = ferry("watch", "m-lost")

    first, second, *_ = outcome.out.splitlines()
    assert first.startswith("in doubt: 44 %")
    assert "pageferry resolve m-lost" in first
    assert second.startswith("failed: ")
    assert outcome.status == 1


def test_migrate_chooses_another_request_id_each_time(ferry):
    first, second = (
        document(ferry("migrate", "web", "--to", "127.0.0.1:7444", "--no-wait", "--json")) for _ in range(2)
    )

    assert first["request_id"] != second["request_id"]


@pytest.mark.parametrize("command", [("migrate", "doomed", "--to", "127.0.0.1:7444"), ("watch", "m-doomed")])
def test_a_failed_migration_exits_with_1_and_its_error(ferry, command):
    outcome = ferry(*command)

    assert outcome.status == 1
    assert outcome.err == "error: DESTINATION_REFUSED: beta refused doomed; it runs on at alpha\n"


def test_a_guest_that_cannot_be_moved_exits_with_1_and_what_is_in_the_way(ferry):
    outcome = ferry("migrate", "held", "--to", "127.0.0.1:7444")

    assert outcome.status == 1
    assert outcome.err.startswith("error: GUEST_NOT_MOVABLE: guest held cannot be moved: ")
    assert "passed through" in outcome.err


def test_a_failed_migration_exits_with_1_in_json_too(ferry):
    outcome = ferry("migrate", "doomed", "--to", "127.0.0.1:7444", "--json")

    assert outcome.status == 1
    assert document(outcome)["error"]["reason"] == "DESTINATION_REFUSED"


def test_a_cancelled_migration_exits_with_1(ferry):
    outcome = ferry("watch", "m-undone")

    assert outcome.status == 1
    assert outcome.err.startswith("error: CANCELLED: ")


def test_watch_prints_one_document_when_the_migration_has_ended(ferry):
    found = document(ferry("watch", "m-web", "--json"))

    assert found["state"] == "MIGRATION_STATE_COMPLETED"
    assert found["downtime"] == "0.012300s"


def test_a_watch_that_ends_early_is_an_error(ferry):
    outcome = ferry("watch", "m-cut")

    assert outcome.status == 2
    assert outcome.err.startswith("error: SIDECAR_UNREACHABLE: ")
    assert "watch it again" in outcome.err


def test_show_of_a_failed_migration_is_no_failure(ferry):
    outcome = ferry("show", "m-doomed")

    assert outcome.status == 0
    assert "DESTINATION_REFUSED" in outcome.out


def test_show_tells_a_program_everything(ferry):
    found = document(ferry("show", "m-web", "--json"))

    assert found["migration_id"] == "m-web"
    assert sum(found["memory_map"]["demand_pages"]) == 256


def test_cancel_shows_the_migration_taken_back(ferry):
    assert "cancelled" in ferry("cancel", "m-slow").out
    assert document(ferry("cancel", "m-slow", "--json"))["state"] == "MIGRATION_STATE_CANCELLED"


def test_resume_shows_the_migration(ferry):
    assert "postcopy" in ferry("resume", "m-slow").out
    assert document(ferry("resume", "m-slow", "--json"))["migration_id"] == "m-slow"


def test_limits_changes_only_what_is_given(ferry):
    ferry("limits", "m-slow", "--push-rate", "1G", "--no-push")

    found = document(ferry("limits", "m-slow", "--push", "--fault-objective", "500", "--json"))

    assert found["push_bytes_per_second"] == 1 << 30
    assert found["fault_objective_us"] == 500
    assert found["push_disabled"] is False
    assert "push weight 100" in ferry("limits", "m-slow").out
    assert "push weight 1,000" in ferry("limits", "m-slow", "--push-weight", "1000").out
    assert "push rate 1.0 GiB/s" in ferry("limits", "m-slow").out


def test_the_release_is_told_without_a_sidecar(pageferry):
    assert pageferry("--version") == (0, f"pageferry {__version__}\n", "")


def test_without_arguments_the_help_is_shown(pageferry):
    outcome = pageferry()

    assert outcome.status == 0
    assert "migrate" in outcome.out
