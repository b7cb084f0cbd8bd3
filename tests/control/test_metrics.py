"""What Prometheus reads, letter for letter, for figures that are known."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pageferry import __version__
from pageferry.errors import Reason
from pageferryd.core.figures import Figures, Gauges
from pageferryd.core.lifecycle import State
from pageferryd.core.refusals import PLACES
from pageferryd.metrics import LATENCY_BUCKETS, FiguresCollector, make_registry

ROOT = Path(__file__).resolve().parents[2]


class Known:
    """Figures that a test sets."""

    def __init__(self) -> None:
        self.counted, self.now = Figures(), Gauges()

    def figures(self) -> Figures:
        return self.counted

    def gauges(self) -> Gauges:
        return self.now


@pytest.fixture
def known() -> Known:
    return Known()


def text_of(known: Known) -> str:
    registry = CollectorRegistry()
    registry.register(FiguresCollector(known))
    return generate_latest(registry).decode()


def samples(text: str) -> dict[str, str]:
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_known_figures_read_exactly_like_this(known: Known) -> None:
    known.counted = Figures(
        faults=Counter({("uffd", "missing"): 7, ("exit", "joined"): 2}),
        pages=Counter({("demand", "raw"): 11, ("push", "zero"): 13}),
        bytes=Counter(demand=45056, push=1 << 40),
        served_pages=Counter({("push", "poisoned"): 1}),
        served_bytes=Counter(push=8192),
        duplicate_pages=3,
        prefetch_issued=31,
        prefetch_used=21,
        prefetch_late=5,
        push_held_seconds=1.25,
        reconnects=2,
        discarded_pages=17,
        checksum_mismatches=4,
        refusals=Counter({("api", "ROLE_MISSING"): 19, ("lane", "PEER_NOT_ALLOWED"): 23}),
    )
    known.counted.latencies.observe(read=30e-6, queued=30e-6, fetched=250e-6, installed=30e-6, total=340e-6)
    known.counted.latencies.observe(read=30e-6, queued=30e-6, fetched=20.0, installed=30e-6, total=20.1)
    known.now = Gauges(
        migrations=Counter(
            {("source", "completed"): 4, ("destination", "postcopy_paused"): 1, ("source", "in_doubt"): 2}
        ),
        queued=8,
        faults_waiting=6,
        push_window_bytes=1 << 20,
        push_under_way_bytes=65536,
        demand_requests_under_way=9,
        pages_missing=1000,
        last_downtime_seconds=0.012,
        last_postcopy_seconds=3.5,
        last_pages=131072,
        last_faults=250,
    )
    text = text_of(known)
    nonzero = [
        line
        for line in text.splitlines()
        if not line.startswith("#") and not line.endswith(" 0.0") and "latency" not in line and "build" not in line
    ]
    assert nonzero == [
        'pageferry_faults_total{class="missing",door="uffd"} 7.0',
        'pageferry_faults_total{class="joined",door="exit"} 2.0',
        'pageferry_pages_total{kind="raw",lane="demand"} 11.0',
        'pageferry_pages_total{kind="zero",lane="push"} 13.0',
        'pageferry_received_bytes_total{lane="demand"} 45056.0',
        'pageferry_received_bytes_total{lane="push"} 1.099511627776e+12',
        'pageferry_served_pages_total{kind="poisoned",lane="push"} 1.0',
        'pageferry_served_bytes_total{lane="push"} 8192.0',
        'pageferry_refusals_total{reason="ROLE_MISSING",where="api"} 19.0',
        'pageferry_refusals_total{reason="PEER_NOT_ALLOWED",where="lane"} 23.0',
        "pageferry_duplicate_pages_total 3.0",
        "pageferry_discarded_pages_total 17.0",
        "pageferry_prefetch_issued_pages_total 31.0",
        "pageferry_prefetch_used_pages_total 21.0",
        "pageferry_prefetch_late_pages_total 5.0",
        "pageferry_push_paced_seconds_total 1.25",
        "pageferry_lane_reconnects_total 2.0",
        "pageferry_checksum_mismatches_total 4.0",
        'pageferry_migrations{role="source",state="completed"} 4.0',
        'pageferry_migrations{role="source",state="in_doubt"} 2.0',
        'pageferry_migrations{role="destination",state="postcopy_paused"} 1.0',
        "pageferry_migrations_queued 8.0",
        "pageferry_faults_waiting 6.0",
        "pageferry_pages_missing 1000.0",
        "pageferry_push_window_bytes 1.048576e+06",
        "pageferry_push_under_way_bytes 65536.0",
        "pageferry_demand_requests_under_way 9.0",
        "pageferry_last_migration_downtime_seconds 0.012",
        "pageferry_last_migration_postcopy_seconds 3.5",
        "pageferry_last_migration_pages 131072.0",
        "pageferry_last_migration_faults 250.0",
    ]
    fetched = [line for line in text.splitlines() if 'stage="fetched"' in line and not line.endswith(" 0.0")]
    assert fetched == [
        *(
            f'pageferry_fault_latency_seconds_bucket{{le="{bound}",stage="fetched"}} 1.0'
            for bound in LATENCY_BUCKETS
            if bound > 250e-6
        ),
        'pageferry_fault_latency_seconds_bucket{le="+Inf",stage="fetched"} 2.0',
        'pageferry_fault_latency_seconds_count{stage="fetched"} 2.0',
        'pageferry_fault_latency_seconds_sum{stage="fetched"} 20.00025',
    ]


def test_the_latency_buckets_reach_from_25_microseconds_to_10_seconds() -> None:
    assert LATENCY_BUCKETS[0] == 25e-6
    assert LATENCY_BUCKETS[-1] == 10.0
    assert list(LATENCY_BUCKETS) == sorted(set(LATENCY_BUCKETS))


def test_every_series_exists_from_the_start(known: Known) -> None:
    before = set(samples(text_of(known)))
    known.counted.faults["exit", "poisoned"] += 1
    known.counted.pages["push", "raw"] += 1
    known.counted.bytes["push"] += 1
    known.counted.latencies.observe(1.0, 1.0, 1.0, 1.0, 4.0)
    known.counted.refusals["handoff", "MEMORY_NOT_ITS_OWN"] += 1
    known.now.migrations["destination", "failed"] += 1
    known.now.last_downtime_seconds = 1.0
    assert set(samples(text_of(known))) == before


def test_all_states_of_both_roles_are_there_at_zero(known: Known) -> None:
    values = samples(text_of(known))
    for role in ("source", "destination"):
        for state in State:
            assert values[f'pageferry_migrations{{role="{role}",state="{state.name.lower()}"}}'] == "0.0"


def test_before_a_migration_has_ended_its_figures_are_no_number(known: Known) -> None:
    values = samples(text_of(known))
    last = {name: value for name, value in values.items() if name.startswith("pageferry_last_migration_")}
    assert len(last) == 4
    assert set(last.values()) == {"NaN"}


def test_a_count_under_an_unforeseen_label_is_shown_all_the_same(known: Known) -> None:
    known.counted.faults["uffd", "strange"] += 1
    assert samples(text_of(known))['pageferry_faults_total{class="strange",door="uffd"}'] == "1.0"


def test_the_refusals_that_are_known_beforehand_have_places_and_reasons_that_exist(known: Known) -> None:
    pairs = re.findall(r'pageferry_refusals_total{reason="(\w+)",where="(\w+)"} 0.0', text_of(known))
    assert len(pairs) > 10
    assert {where for _, where in pairs} == set(PLACES)
    assert {reason for reason, _ in pairs} <= set(Reason)


def test_the_release_is_a_label_of_build_info(known: Known) -> None:
    assert re.search(
        rf'^pageferry_build_info{{.*version="{re.escape(__version__)}"}} 1.0$', text_of(known), re.MULTILINE
    )


def test_no_label_can_name_a_guest_or_a_migration(known: Known) -> None:
    labels = set(re.findall(r'[{,]([a-z_]+)="', text_of(known)))
    assert labels == {
        "door", "class", "stage", "lane", "kind", "role", "state", "le", "version", "python", "where", "reason",
    }  # fmt: skip


def test_the_registry_adds_the_process_itself(known: Known) -> None:
    values = samples(generate_latest(make_registry(known)).decode())
    assert float(values["process_resident_memory_bytes"]) > 0
    assert "pageferry_faults_waiting" in values


def test_counts_of_several_migrations_fold_into_one() -> None:
    total = Figures(faults=Counter({("uffd", "missing"): 1}), reconnects=1)
    other = Figures(faults=Counter({("uffd", "missing"): 2, ("uffd", "zero"): 1}), push_held_seconds=0.5)
    other.latencies.observe(1.0, 1.0, 1.0, 1.0, 4.0)
    total.add(other)
    total.add(other)
    assert total.faults == {("uffd", "missing"): 5, ("uffd", "zero"): 2}
    assert (total.reconnects, total.push_held_seconds) == (1, 1.0)
    assert total.latencies.by_stage["total"].count == 2
    assert other.latencies.by_stage["total"].count == 1


PROMTOOL = shutil.which("promtool", path=f"{ROOT / '.make' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is in the Debian package prometheus")
def test_promtool_has_nothing_to_say(known: Known) -> None:
    known.counted.latencies.observe(1e-4, 1e-4, 1e-4, 1e-4, 4e-4)
    text = generate_latest(make_registry(known))
    checked = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=text, capture_output=True, timeout=30, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
