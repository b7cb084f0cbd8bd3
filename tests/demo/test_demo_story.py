"""What the demonstration tells and how it exits, whatever its sidecars and guests do: played with stand-ins."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pageferry.cli.main import main

MEMORY = ("--memory", "4M")


def play(capsys, *arguments):
    """Run the demonstration; return its exit status and what it wrote."""
    status = main(["demo", "--guest", "process", *MEMORY, *arguments])
    return status, *capsys.readouterr()


def processes_in(directory: Path) -> list[str]:
    """Return the command lines of processes that work in a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(directory) in str((entry / "cwd").readlink()):
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_a_guest_that_crosses_whole_is_a_success(capsys, stand_ins, places):
    status, out, err = play(capsys)

    assert status == 0
    assert out.endswith("The guest crossed whole.\n")
    for heading in ("1. Two sidecars", "2. Preflight", "3. A guest", "4. Migration", "5. The figures", "6. Proof"):
        assert heading in out
    assert "every byte of 1,024 pages checked: 0 bad pages" in out
    assert "7.00 ms" in out
    assert "\x1b" not in out
    assert err == ""
    assert list(places.iterdir()) == []
    assert processes_in(places) == []


def test_a_program_gets_one_document_and_the_story_on_stderr(capsys, stand_ins):
    status, out, err = play(capsys, "--json")

    assert status == 0
    found = json.loads(out)
    assert found["ok"] is True
    assert found["memory_bytes"] == 4 << 20
    assert {proof["name"]: proof["ok"] for proof in found["proofs"]} == {
        "source_gone": True,
        "went_on": True,
        "memory_intact": True,
        "no_errors": True,
    }
    assert found["migration"]["progress"]["push_pages"] == 1024
    assert "6. Proof" in err


@pytest.mark.parametrize(
    ("wrong", "proof", "words"),
    [
        ("memory", "memory_intact", "page 7: is zero"),
        ("errors", "no_errors", "came across 1 wrong pages"),
        ("source stays", "source_gone", "is still there"),
        ("migration", "completed", "LAYOUT_MISMATCH: the guests differ"),
        ("preflight", "preflight ptrace", "run as root"),
    ],
)
def test_what_cannot_be_proved_exits_with_1(capsys, stand_ins, places, wrong, proof, words):
    stand_ins.setenv("STAND_IN", wrong)

    status, out, err = play(capsys, "--json")

    assert status == 1
    assert [one["name"] for one in json.loads(out)["proofs"] if not one["ok"]] == [proof]
    assert words in err
    assert "The demonstration failed" in err
    assert processes_in(places) == []


@pytest.mark.parametrize(
    ("wrong", "reason", "words"),
    [
        ("sidecar", "SIDECAR_UNREACHABLE", "pageferryd: no port is free"),
        ("guest", "VMM_GONE", "no memory for this guest"),
    ],
)
def test_what_does_not_start_shows_its_log(capsys, stand_ins, places, wrong, reason, words):
    stand_ins.setenv("STAND_IN", wrong)

    status, out, err = play(capsys)

    assert status == 2
    assert words in out
    assert err.startswith(f"error: {reason}: ")
    assert list(places.iterdir()) == []
    assert processes_in(places) == []


def test_a_migration_that_never_ends_is_given_up(capsys, stand_ins, places):
    stand_ins.setenv("STAND_IN", "never ends")

    status, _, err = play(capsys, "--timeout", "3")

    assert status == 2
    assert "longer than 3 s" in err
    assert processes_in(places) == []


def test_the_logs_are_kept_when_asked_for(capsys, stand_ins, places):
    status, out, _ = play(capsys, "--keep")

    assert status == 0
    (kept,) = places.iterdir()
    assert str(kept) in out
    assert {path.name for path in kept.glob("*.log")} == {"alpha.log", "beta.log", "guest.log", "incoming.log"}


def test_settings_of_other_sidecars_do_not_reach_it(capsys, stand_ins):
    stand_ins.setenv("PAGEFERRY_LISTEN", "nonsense")

    assert play(capsys)[0] == 0


@pytest.mark.parametrize(
    ("number", "status", "words"), [(signal.SIGINT, 130, ""), (signal.SIGTERM, 2, "error: CANCELLED: ended by SIGTERM")]
)
def test_a_signal_ends_it_with_everything_that_it_started(stand_ins, places, number, status, words):
    stand_ins.setenv("STAND_IN", "never ends")
    start = (
        "import sys; from pageferry.cli.main import main; from pageferry.demo import guests, sidecars;"
        "sidecars.MODULE = 'stand_in_sidecar'; guests.MODULES = dict.fromkeys(guests.Kind, 'stand_in_guest');"
        "sys.exit(main(['demo', '--guest', 'process', '--memory', '4M']))"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", start], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while "preparing: " not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        _, complaint = process.communicate(timeout=30)

    assert process.returncode == status
    assert complaint.startswith(words)
    assert "Traceback" not in complaint
    assert list(places.iterdir()) == []
    assert processes_in(places) == []
