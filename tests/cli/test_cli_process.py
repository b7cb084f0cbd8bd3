"""The command as a process: what reaches a pipe, and what Ctrl-C does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

PAGEFERRY = [sys.executable, "-m", "pageferry.cli.main", "--insecure"]


def test_what_is_piped_has_no_escape_codes_and_whole_lines(address):
    done = subprocess.run(
        [*PAGEFERRY, "--address", address, "watch", "m-web"], capture_output=True, text=True, timeout=30, check=True
    )

    assert "\x1b" not in done.stdout
    assert "faults (3 waiting), fault p50 250 us p99 2.50 ms\n" in done.stdout
    assert done.stderr == ""


def test_json_is_one_document_whatever_the_locale(address):
    done = subprocess.run(
        [*PAGEFERRY, "--address", address, "show", "m-web", "--json"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )

    assert json.loads(done.stdout)["guest_id"] == "web"


def test_a_map_on_a_terminal_without_unicode_is_no_error(address):
    done = subprocess.run(
        [*PAGEFERRY, "--address", address, "show", "m-web"],
        capture_output=True,
        timeout=30,
        check=True,
        env={"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )

    assert b"????????" in done.stdout


def test_ctrl_c_stops_watching_and_says_that_the_migration_goes_on(address):
    with subprocess.Popen(
        [*PAGEFERRY, "--address", address, "watch", "m-slow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("preparing: ")
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=30)

    assert process.returncode == 130
    assert complaint == "no longer watched; it goes on: pageferry watch m-slow\n"
