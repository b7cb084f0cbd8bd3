"""Where settings come from, which source wins, and what is said about those that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pageferry.errors import FerryError, Reason
from pageferryd.config import Settings, Template, load, reading, unread_environment


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting from this machine's environment or its own file."""
    import os

    for name in list(os.environ):
        if name.upper().startswith("PAGEFERRY_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(reading, "DEFAULT_PATH", tmp_path / "no-such-file.toml")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(text: str) -> Path:
        path = tmp_path / "pageferryd.toml"
        path.write_text(text)
        return path

    return write_file


def problems(path: Path | None = None, **overrides: Any) -> str:
    with pytest.raises(FerryError) as raised:
        load(path, overrides)
    assert raised.value.reason is Reason.CONFIG_INVALID
    return raised.value.message


# Where they come from


def test_the_defaults_need_only_insecure_or_certificates() -> None:
    settings = load(overrides={"insecure": True})
    assert settings.listen == ["127.0.0.1:7443"]
    assert settings.http == "127.0.0.1:9743"
    assert settings.tls_files() is None


def test_a_file_is_read(write: Any) -> None:
    path = write('host = "a"\ninsecure = true\nlisten = ["127.0.0.1:1"]\n[limits]\ndemand_window = 4\n')
    settings = load(path)
    assert (settings.host, settings.listen, settings.limits.demand_window) == ("a", ["127.0.0.1:1"], 4)


def test_the_file_in_etc_is_read_when_none_is_named(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "DEFAULT_PATH", write('insecure = true\nhost = "from-etc"\n'))
    assert load().host == "from-etc"


def test_the_environment_wins_over_the_file_and_the_command_line_over_both(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write('insecure = true\nhost = "file"\nhttp = "127.0.0.1:1"\nlog_level = "error"\n')
    monkeypatch.setenv("PAGEFERRY_HOST", "environment")
    monkeypatch.setenv("PAGEFERRY_HTTP", "127.0.0.1:2")
    settings = load(path, {"host": "command line"})
    assert (settings.host, settings.http, settings.log_level) == ("command line", "127.0.0.1:2", "error")


def test_tables_are_merged_key_by_key(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("insecure = true\n[limits]\ndemand_window = 4\nmax_migrations = 5\n")
    monkeypatch.setenv("PAGEFERRY_LIMITS__DEMAND_WINDOW", "8")
    limits = load(path, {"limits": {"fault_objective_us": 9}}).limits
    assert (limits.demand_window, limits.max_migrations, limits.fault_objective_us) == (8, 5, 9)


@pytest.mark.parametrize(
    "value", ["127.0.0.1:1,127.0.0.1:2", "127.0.0.1:1, 127.0.0.1:2 ,", '["127.0.0.1:1","127.0.0.1:2"]']
)
def test_a_list_in_the_environment_is_separated_by_commas_or_json(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFERRY_LISTEN", value)
    assert load(overrides={"insecure": True}).listen == ["127.0.0.1:1", "127.0.0.1:2"]


def test_addresses_and_names_come_out_in_one_spelling(tmp_path: Path) -> None:
    tls = dict.fromkeys(("ca", "certificate", "key"), tmp_path / "x.pem")
    settings = load(overrides={"listen": ["[0:0::1]:7443", "unix:///run/a"], "tls": tls, "peers": ["Host-B"]})
    assert settings.listen == ["[::1]:7443", "unix:/run/a"]
    assert settings.peers == ["host-b"]
    files = settings.tls_files()
    assert files is not None
    assert files.key == tmp_path / "x.pem"


def test_the_constructor_does_not_look_at_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFERRY_HOST", "environment")
    assert Settings(insecure=True, host="argument").host == "argument"


def test_misspelt_variables_are_named_for_a_warning() -> None:
    environment = {"PAGEFERRY_HOST": "a", "PAGEFERRY_LIMITS__DEMAND_WINDOW": "1", "PAGEFERRY_HOTS": "b", "HOME": "/"}
    assert unread_environment(environment) == ["PAGEFERRY_HOTS"]


# What is wrong with them


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/absent.toml: cannot be read" in problems(tmp_path / "absent.toml")


def test_a_file_that_is_no_toml_is_named(write: Any) -> None:
    path = write("host = \n")
    assert f"{path}: is not TOML" in problems(path)


def test_an_unknown_setting_is_refused_with_its_file(write: Any) -> None:
    path = write('insecure = true\nhots = "a"\n[limits]\nwindow = 1\n')
    message = problems(path)
    assert f"hots ({path}): no such setting" in message
    assert f"limits.window ({path}): no such setting" in message


def test_a_bad_value_is_traced_to_its_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFERRY_LIMITS__DEMAND_WINDOW", "many")
    assert "limits.demand_window (environment variable PAGEFERRY_LIMITS__DEMAND_WINDOW):" in problems(insecure=True)


def test_all_problems_are_told_at_once() -> None:
    message = problems(insecure=True, http="nowhere", log_level="loud", limits={"demand_window": 0})
    assert len(message.splitlines()) == 4
    assert all(name in message for name in ("http:", "log_level:", "limits.demand_window:"))


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({}, "tls: no certificates"),
        ({"insecure": True, "listen": ["0.0.0.0:1"], "advertise": "a:1"}, "listen: 0.0.0.0:1 is not loopback"),
        ({"insecure": True, "listen": ["example.org:1"]}, "listen: example.org:1 is not loopback"),
        ({"insecure": True, "listen": []}, "listen:"),
        ({"insecure": True, "peers": ["b"]}, "peers: names cannot be checked in insecure mode"),
        ({"insecure": True, "operators": ["b"]}, "operators: names cannot be checked in insecure mode"),
        ({"insecure": True, "tls": {"ca": "a", "certificate": "b", "key": "c"}}, "exclude each other"),
        ({"tls": {"ca": "a", "certificate": "b"}}, "tls.key"),
        ({"tls": {"ca": "a", "certificate": "b", "key": "c"}, "listen": ["0.0.0.0:1"]}, "advertise: destinations"),
        ({"insecure": True, "advertise": "0.0.0.0:1"}, "advertise: 0.0.0.0:1 is nothing to connect to"),
        ({"insecure": True, "advertise": "127.0.0.1:0"}, "is nothing to connect to"),
        ({"insecure": True, "http": "unix:/run/http"}, "http: this one is served over TCP only"),
        ({"insecure": True, "api_socket": "api.sock"}, "api_socket: 'api.sock' is a relative path"),
        ({"insecure": True, "api_socket": "/" + "x" * 200}, "at most 107 bytes"),
        ({"insecure": True, "runtime_dir": "run"}, "runtime_dir: 'run' is a relative path"),
        ({"insecure": True, "runtime_dir": "/" + "x" * 70}, "longer than 60 bytes"),
        ({"insecure": True, "listen": "[nonsense"}, "begins like a JSON list"),
        ({"insecure": True, "drain_seconds": float("inf")}, "drain_seconds"),
        (
            {"insecure": True, "limits": {"reconnect_initial_seconds": 9, "reconnect_max_seconds": 1}},
            "reconnect_initial_seconds is above",
        ),
        ({"insecure": True, "limits": {"lane_silence_timeout": float("nan")}}, "limits.lane_silence_timeout"),
        ({"insecure": True, "limits": {"push_window_bytes": 1}}, "limits.push_window_bytes"),
    ],
)
def test_what_cannot_be_is_refused(overrides: dict[str, Any], what: str) -> None:
    assert what in problems(**overrides)


@pytest.mark.parametrize("listen", [["127.0.0.1:0"], ["127.9.9.9:1"], ["[::1]:1"], ["localhost:1"], ["unix:/run/a"]])
def test_insecure_mode_listens_on_loopback_and_unix_sockets(listen: list[str]) -> None:
    assert load(overrides={"insecure": True, "listen": listen}).listen == listen


# Guests and templates


WEB = {"name": "web", "driver": "vmm", "endpoint": "/run/web.sock"}
START = {"driver": "vmm", "command": ["vmm", "{socket}"]}


def test_guests_and_templates_are_read(write: Any) -> None:
    settings = load(
        write(
            'insecure = true\n[[guests]]\nname = "web"\ndriver = "qemu"\nendpoint = "/run/web.qmp"\n'
            '[[guests]]\nname = "db"\ndriver = "firecracker"\nendpoint = "/run/db.sock"\n'
            '[[templates]]\ndriver = "qemu"\nguests = "web-*"\ncommand = ["qemu", "{guest}", "{socket}"]\n'
        )
    )
    assert [(guest.name, guest.driver, str(guest.endpoint)) for guest in settings.guests] == [
        ("web", "qemu", "/run/web.qmp"),
        ("db", "firecracker", "/run/db.sock"),
    ]
    (template,) = settings.templates
    assert (template.driver, template.guests, template.start_timeout) == ("qemu", "web-*", 10.0)


def test_guests_can_come_from_the_environment_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFERRY_GUESTS", json.dumps([WEB]))
    assert load(overrides={"insecure": True}).guests[0].name == "web"
    monkeypatch.setenv("PAGEFERRY_GUESTS", json.dumps([{**WEB, "driver": "vbox"}]))
    assert "guests.0.driver (environment variable PAGEFERRY_GUESTS): " in problems(insecure=True)


def test_each_problem_of_a_guest_is_told_with_its_file(write: Any) -> None:
    path = write(
        'insecure = true\n[[guests]]\nname = "a b"\ndriver = "vbox"\nendpoint = "web.sock"\nsocket = "x"\n'
        '[[guests]]\nname = "db"\n'
    )
    lines = problems(path).splitlines()
    for name, what in (
        ("guests.0.name", "'a b' is no guest id"),
        ("guests.0.driver", "'qemu', 'cloud-hypervisor'"),
        ("guests.0.endpoint", "'web.sock' is a relative path"),
        ("guests.0.socket", "no such setting"),
        ("guests.1.driver", "Field required"),
    ):
        assert any(line.startswith(f"  {name} ({path}): ") and what in line for line in lines), (name, lines)


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ({"guests": [WEB, {**WEB, "endpoint": "/run/b"}]}, "guests: two have the name web"),
        ({"guests": [WEB, {**WEB, "name": "db"}]}, "guests: two have the endpoint /run/web.sock"),
        ({"guests": [{**WEB, "endpoint": "/" + "x" * 120}]}, "at most 107 bytes"),
        ({"templates": [{**START, "driver": "vbox"}]}, "templates.0.driver"),
        ({"templates": [{**START, "guests": "web/*"}]}, "no pattern of guest ids"),
        ({"templates": [{**START, "command": []}]}, "templates.0.command"),
        ({"templates": [{**START, "command": "vmm {socket}"}]}, "templates.0.command"),
        ({"templates": [{**START, "command": ["", "{socket}"]}]}, "the program, is empty"),
        ({"templates": [{**START, "command": ["vmm", "{socket}", "a\0b"]}]}, "zero byte"),
        ({"templates": [{**START, "command": ["vmm", "{guest}"]}]}, "no argument holds {socket}"),
        ({"templates": [{**START, "command": ["vmm", "{socket} {gest}"]}]}, "there is no placeholder {gest}"),
        ({"templates": [{**START, "start_timeout": 0}]}, "templates.0.start_timeout"),
        ({"templates": [{**START, "start_timeout": 31}]}, "above limits.prepare_timeout"),
    ],
)
def test_guests_and_templates_that_cannot_be_are_refused(setting: dict[str, Any], what: str) -> None:
    assert what in problems(insecure=True, **setting)


def test_a_command_is_filled_in_without_touching_other_braces() -> None:
    command = ["vmm", "--name={guest}", "unix:{socket},id={guest}", '{"a": {}}', "${home}", "{}", "*"]
    template = Template(driver="vmm", command=command)
    assert template.arguments("web", "/run/x.sock") == [
        "vmm",
        "--name=web",
        "unix:/run/x.sock,id=web",
        '{"a": {}}',
        "${home}",
        "{}",
        "*",
    ]


# What follows from them


def test_destinations_are_told_the_advertised_address() -> None:
    settings = load(overrides={"insecure": True, "advertise": "host-a:1"})
    assert settings.page_address(["127.0.0.1:5"]) == "host-a:1"


def test_without_one_they_are_told_the_first_that_is_no_unix_socket() -> None:
    settings = load(overrides={"insecure": True})
    assert settings.page_address(["unix:/run/a", "127.0.0.1:5"]) == "127.0.0.1:5"
    assert settings.page_address(["unix:/run/a"]) == "unix:/run/a"


def test_settings_do_not_change_after_they_were_read() -> None:
    settings = load(overrides={"insecure": True})
    with pytest.raises(ValueError, match="frozen"):
        settings.host = "b"
