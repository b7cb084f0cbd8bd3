from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from pageferryd.core.figures import Figures, Gauges
from pageferryd.metrics import make_registry

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "deploy" / "prometheus"
METRICS = ROOT / "docs" / "metrics.md"
SELECTOR = re.compile(r"\b(pageferry_\w+|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*=\s*"([^"]*)"')
# What Prometheus itself adds to each series.
ADDED = {"job", "instance"}


class NothingYet:
    def figures(self) -> Figures:
        return Figures()

    def gauges(self) -> Gauges:
        return Gauges()


@pytest.fixture(scope="module")
def families() -> list[Metric]:
    return list(make_registry(NothingYet()).collect())


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DIRECTORY / "alerts.yaml").read_text())["groups"]
    return group["rules"]


@pytest.fixture
def promtool() -> str:
    # `make test` puts it there when the machine has none.
    program = shutil.which("promtool") or shutil.which("promtool", path=str(ROOT / ".make" / "bin"))
    if program is None:
        pytest.skip("promtool is missing; it is in the package prometheus")
    return program


def run(*command: str) -> str:
    ran = subprocess.run(command, cwd=DIRECTORY, capture_output=True, text=True, timeout=30, check=False)
    output = ran.stdout + ran.stderr
    assert ran.returncode == 0, output
    return output


def has_series(families: list[Metric], name: str, labels: dict[str, str]) -> bool:
    return any(
        sample.name == name and labels.items() <= sample.labels.items()
        for family in families
        for sample in family.samples
    )


def unknown_series(families: list[Metric], query: str) -> list[str]:
    """Return the selectors of a query that no sidecar could ever match."""
    unknown = []
    for name, matchers in SELECTOR.findall(query):
        labels = {label: value for label, value in MATCHER.findall(matchers) if label not in ADDED}
        if name != "up" and not has_series(families, name, labels):
            unknown.append(f"{name}{labels or ''}")
    return unknown


def test_every_alert_looks_at_series_that_a_sidecar_exports(
    families: list[Metric], rules: list[dict[str, Any]]
) -> None:
    assert {rule["alert"]: unknown for rule in rules if (unknown := unknown_series(families, rule["expr"]))} == {}


@pytest.mark.parametrize(
    "query", ["rate(pageferry_fautls_total[1m])", 'pageferry_migrations{role="source", state="dozing"} > 0']
)
def test_a_query_of_series_that_no_sidecar_exports_is_found(families: list[Metric], query: str) -> None:
    assert len(unknown_series(families, query)) == 1


def test_every_query_of_the_metrics_document_looks_at_series_that_a_sidecar_exports(families: list[Metric]) -> None:
    queries = re.findall(r"(?s)```promql\n(.*?)```", METRICS.read_text())

    assert queries
    assert [unknown for query in queries for unknown in unknown_series(families, query)] == []


def test_the_metrics_document_lists_every_metric_with_its_type_and_labels(families: list[Metric]) -> None:
    documented = {}
    for line in METRICS.read_text().splitlines():
        if line.startswith("| `pageferry_"):
            name, kind, labels, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            documented[name.strip("`")] = (kind, set(re.findall(r"\w+", labels)))

    exported = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in families
        if family.name.startswith("pageferry_")
    }
    assert documented == exported


def test_the_metrics_document_explains_every_label_value(families: list[Metric]) -> None:
    text = METRICS.read_text()
    values = {
        value
        for family in families
        for sample in family.samples
        for label, value in sample.labels.items()
        if label in {"door", "class", "lane", "kind", "role", "stage", "where", "reason"}
    }

    assert [value for value in sorted(values) if f"`{value}`" not in text and not value.startswith("HANDOFF_")] == []


def test_every_alert_says_how_bad_it_is_and_what_to_do(rules: list[dict[str, Any]]) -> None:
    for rule in rules:
        assert rule["labels"]["severity"] in {"warning", "critical"}, rule["alert"]
        assert {"summary", "description", "runbook"} == set(rule["annotations"]), rule["alert"]
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert f"\n## {anchor.replace('-', ' ')}\n" in (ROOT / file).read_text().lower(), rule["alert"]


def test_every_alert_is_tested_to_fire_and_not_to_fire(rules: list[dict[str, Any]]) -> None:
    fires, stays_quiet = set(), set()
    for case in yaml.safe_load((DIRECTORY / "alerts_test.yaml").read_text())["tests"]:
        for check in case["alert_rule_test"]:
            (fires if check["exp_alerts"] else stays_quiet).add(check["alertname"])
    names = {rule["alert"] for rule in rules}

    assert fires == names
    assert stays_quiet == names


def test_the_alerts_pass_their_unit_tests(promtool: str) -> None:
    assert "SUCCESS" in run(promtool, "test", "rules", "alerts_test.yaml")


def test_prometheus_accepts_the_scrape_configuration(promtool: str) -> None:
    run(promtool, "check", "config", "scrape.yaml")


def test_the_scraped_job_is_the_one_that_the_alerts_look_for(rules: list[dict[str, Any]]) -> None:
    scrape = yaml.safe_load((DIRECTORY / "scrape.yaml").read_text())
    jobs = {job["job_name"] for job in scrape["scrape_configs"]}
    wanted = {value for rule in rules for name, value in MATCHER.findall(rule["expr"]) if name == "job"}

    assert wanted == jobs
    assert scrape["rule_files"] == ["alerts.yaml"]
