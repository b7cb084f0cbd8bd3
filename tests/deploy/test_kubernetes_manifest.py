from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pageferryd import config

MANIFEST = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "daemonset.yaml"
NODE = {"status.hostIP": "192.0.2.10", "spec.nodeName": "node-1"}


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture(scope="module")
def pod(objects: dict[str, Any]) -> dict[str, Any]:
    return objects["DaemonSet"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    return only


@pytest.fixture
def loaded(
    objects: dict[str, Any], container: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> config.Settings:
    """The settings as the sidecar reads them on one node."""
    values: dict[str, str] = {}
    for variable in container["env"]:
        source = variable.get("valueFrom")
        text = NODE[source["fieldRef"]["fieldPath"]] if source else variable["value"]
        for name, value in values.items():
            text = text.replace(f"$({name})", value)
        values[variable["name"]] = text
        monkeypatch.setenv(variable["name"], text)
    file = tmp_path / "pageferryd.toml"
    file.write_text(objects["ConfigMap"]["data"]["pageferryd.toml"])
    return config.load(file)


def mounts(container: dict[str, Any]) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_objects_are_all_there_and_in_one_namespace(objects: dict[str, Any]) -> None:
    assert set(objects) == {"Namespace", "ServiceAccount", "ConfigMap", "DaemonSet"}
    namespace = objects["Namespace"]["metadata"]["name"]
    assert {o["metadata"].get("namespace", namespace) for o in objects.values()} == {namespace}


def test_the_sidecar_accepts_the_configuration_on_a_node(loaded: config.Settings) -> None:
    assert loaded.host == "node-1"
    assert loaded.listen == ["192.0.2.10:7443"]
    assert loaded.page_address(loaded.listen) == "192.0.2.10:7443"
    assert not loaded.insecure


def test_no_variable_is_misspelt(loaded: config.Settings, container: dict[str, Any]) -> None:
    assert config.unread_environment({variable["name"]: "" for variable in container["env"]}) == []


def test_every_file_and_directory_of_the_configuration_is_mounted(
    loaded: config.Settings, container: dict[str, Any]
) -> None:
    mounted = mounts(container)
    assert loaded.tls is not None
    for file in (loaded.tls.ca, loaded.tls.certificate, loaded.tls.key):
        assert file.parent == Path(mounted["tls"])
    assert loaded.runtime_dir == Path(mounted["runtime"])
    assert container["args"] == ["--config", mounted["config"]]


def test_every_mount_has_its_volume(pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert set(mounts(container)) == {volume["name"] for volume in pod["volumes"]}


def test_sockets_have_the_same_path_in_the_pod_and_on_the_host(pod: dict[str, Any], container: dict[str, Any]) -> None:
    on_host = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    assert {name: mounts(container)[name] for name in on_host} == on_host
    assert {"runtime", "vmm-sockets", "userfaultfd"} <= set(on_host)


def test_the_container_has_two_capabilities_and_gains_no_more(pod: dict[str, Any], container: dict[str, Any]) -> None:
    security = container["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["SYS_PTRACE", "SYS_NICE"]}
    assert security["privileged"] is False
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert pod["hostPID"] is True
    assert pod["automountServiceAccountToken"] is False


def test_probes_and_scrapes_reach_the_http_port(
    objects: dict[str, Any], container: dict[str, Any], loaded: config.Settings
) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert loaded.http.endswith(f":{ports['metrics']}")
    assert loaded.listen[0].endswith(f":{ports['grpc']}")
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    annotations = objects["DaemonSet"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])
    assert annotations["prometheus.io/scrape"] == "true"


def test_a_pod_is_never_replaced_unasked_nor_killed_before_it_has_drained(
    objects: dict[str, Any], pod: dict[str, Any], loaded: config.Settings
) -> None:
    assert objects["DaemonSet"]["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert pod["terminationGracePeriodSeconds"] > loaded.drain_seconds
    assert pod["priorityClassName"] == "system-node-critical"


def test_the_selector_finds_the_pods(objects: dict[str, Any]) -> None:
    spec = objects["DaemonSet"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
