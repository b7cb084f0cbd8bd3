"""The demonstration for real: its own sidecars, its own guests, the kernel's faults."""

from __future__ import annotations

import json

import pytest

from pageferry.cli.main import main

MIB = 1 << 20


@pytest.mark.root
@pytest.mark.userfaultfd
@pytest.mark.parametrize(
    ("guest", "backing"),
    [
        ("process", "anonymous"),
        pytest.param("kvm", "anonymous", marks=pytest.mark.kvm),
        pytest.param("kvm", "guest_memfd", marks=pytest.mark.kvm),
    ],
)
def test_a_running_guest_crosses_whole(capsys, places, guest, backing):
    status = main(["demo", "--guest", guest, "--memory", f"{backing}:64M", "--seed", "5", "--json"])

    out, story = capsys.readouterr()
    assert status == 0, story
    found = json.loads(out)
    assert found["ok"] is True
    assert (found["guest"], found["memory_bytes"], found["seed"]) == (guest, 64 * MIB, 5)
    assert found["backing"] == backing
    assert all(proof["ok"] for proof in found["proofs"])
    moved = found["migration"]
    assert moved["state"] == "MIGRATION_STATE_COMPLETED"
    assert (moved["source_name"], moved["destination_name"]) == ("alpha", "beta")
    assert moved["progress"]["pages_total"] == moved["progress"]["pages_present"] == 64 * MIB // 4096
    assert moved["progress"]["demand_pages"] > 0
    assert moved["progress"]["push_pages"] > 0
    if backing == "guest_memfd":
        assert 0 < moved["progress"]["exit_faults"] == moved["progress"]["faults"]
        assert "faults came as exits of the vCPU, 0 by userfaultfd" in story
    else:
        assert moved["progress"]["exit_faults"] == 0
    assert moved["progress"]["zero_pages"] > 0
    assert moved["downtime"] != "0s"
    assert {stage["stage"] for stage in moved["fault_latencies"]} == {"read", "queued", "fetched", "installed", "total"}
    brought = sum(moved["memory_map"]["demand_pages"]) + sum(moved["memory_map"]["push_pages"])
    assert brought == moved["progress"]["pages_total"]
    assert "The guest crossed whole." in story
    assert list(places.iterdir()) == []
