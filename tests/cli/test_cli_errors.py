"""What goes wrong is one line on stderr, `error: REASON: message`, and exit status 2."""

from __future__ import annotations

import pytest


def assert_error(outcome, reason: str, *words: str) -> None:
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith(f"error: {reason}: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


def test_an_unknown_guest(ferry):
    assert_error(ferry("migrate", "nobody", "--to", "127.0.0.1:7444"), "UNKNOWN_GUEST", "nobody", "register it first")
    assert_error(ferry("unregister", "nobody"), "UNKNOWN_GUEST")


@pytest.mark.parametrize("command", ["show", "watch", "cancel", "resume", "limits", "resolve"])
def test_an_unknown_migration(ferry, command):
    assert_error(ferry(command, "m-nobody"), "UNKNOWN_MIGRATION", "m-nobody")


def test_a_migration_that_cannot_be_taken_back(ferry):
    assert_error(ferry("cancel", "m-web"), "ALREADY_COMMITTED", "beta")


def test_a_message_of_several_lines_comes_as_one(ferry):
    assert_error(ferry("register", "new", "/absent.sock"), "VMM_UNREACHABLE", "/absent.sock; start it first")


def test_a_kind_of_vmm_that_the_sidecar_does_not_know(ferry):
    outcome = ferry("register", "new", "/run/new.sock", "--driver", "vbox")

    assert_error(outcome, "INVALID_ARGUMENT", "'vbox'", "vmm, qemu, cloud-hypervisor, firecracker")


def test_errors_are_the_same_when_json_was_asked_for(ferry):
    assert_error(ferry("show", "m-nobody", "--json"), "UNKNOWN_MIGRATION")


@pytest.mark.parametrize(
    "command",
    [
        ("preflight",),
        ("register", "web", "/run/web.sock"),
        ("unregister", "web"),
        ("migrate", "web", "--to", "127.0.0.1:7444"),
        ("list",),
        ("show", "m-web"),
        ("watch", "m-web"),
        ("cancel", "m-web"),
        ("resume", "m-web"),
        ("limits", "m-web"),
        ("resolve", "m-lost"),
        ("resolve", "m-lost", "--give-up", "--yes"),
    ],
)
def test_no_sidecar_at_the_address(pageferry, tmp_path, command):
    socket = f"unix:{tmp_path}/absent.sock"

    assert_error(pageferry("--address", socket, *command), "SIDECAR_UNREACHABLE", socket, "check that pageferryd runs")


def test_no_sidecar_at_a_port_names_what_to_check(pageferry, unused_port):
    outcome = pageferry("--insecure", "--address", f"127.0.0.1:{unused_port}", "list")

    assert_error(outcome, "SIDECAR_UNREACHABLE", f"127.0.0.1:{unused_port}", "--insecure")


def test_neither_certificates_nor_insecure(pageferry):
    assert_error(pageferry("list"), "CONFIG_INVALID", "127.0.0.1:7443", "--ca", "--insecure")


def test_insecure_reaches_no_other_host(pageferry):
    assert_error(pageferry("--insecure", "--address", "192.0.2.1:7443", "list"), "INVALID_ARGUMENT", "192.0.2.1")


def test_certificates_that_cannot_be_read(pageferry, tmp_path):
    files = ("--ca", f"{tmp_path}/ca", "--certificate", f"{tmp_path}/c", "--key", f"{tmp_path}/k")

    assert_error(pageferry(*files, "list"), "CONFIG_INVALID", f"{tmp_path}/ca")


def test_an_address_that_is_none(pageferry):
    assert_error(pageferry("--insecure", "--address", "here", "list"), "INVALID_ARGUMENT", "'here'")


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (("migrate", "web"), "--to"),
        (("migrate", "web", "--to", "x:1", "--push-rate", "fast"), "'fast' is not a size"),
        (("limits", "m", "--fault-objective", "1h"), "'1h' is not a duration"),
        (("migrate", "web", "--to", "x:1", "--on-loss", "pray"), "'pray' is not one of"),
        (("migrate", "web", "--to", "x:1", "--on-loss", "wait", "--loss-seconds", "9"), "leave one of them out"),
        (("migrate", "web", "--to", "x:1", "--loss-seconds", "0"), "--loss-seconds"),
        (("migrate", "web", "--to", "x:1", "--push-weight", "1001"), "--push-weight"),
        (("limits", "m", "--push-weight", "0"), "--push-weight"),
        (("resolve", "m", "--run-at-source", "--give-up"), "opposite decisions"),
        (("resolve", "m", "--peer-fenced"), "--peer-fenced belongs to a decision"),
        (("resolve", "m", "--yes"), "--yes belongs to a decision"),
        (("resolve",), "MIGRATION"),
        (("show",), "MIGRATION"),
        (("fly",), "fly"),
        (("demo", "--guest", "cow"), "cow"),
        (("demo", "--memory", "5000"), "whole pages"),
    ],
)
def test_wrong_usage(pageferry, command, word):
    outcome = pageferry(*command)

    assert outcome.status == 2
    assert outcome.err.startswith("error: INVALID_ARGUMENT: ")
    assert outcome.err.count("\n") == 1
    assert word in outcome.err


def test_the_address_comes_from_the_environment(pageferry, address, monkeypatch):
    monkeypatch.setenv("PAGEFERRY_ADDRESS", address)
    monkeypatch.setenv("PAGEFERRY_INSECURE", "1")

    assert pageferry("list").status == 0
