"""Which spellings of an address are accepted, and what each becomes."""

from __future__ import annotations

import pytest

from pageferry import address as addresses
from pageferry.errors import FerryError, Reason


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("127.0.0.1:7443", "127.0.0.1:7443"),
        (" Host-A.Example.org:0 ", "host-a.example.org:0"),
        ("my_container:65535", "my_container:65535"),
        ("localhost:007", "localhost:7"),
        ("[0:0:0::1]:1", "[::1]:1"),
        ("[FE80::A]:1", "[fe80::a]:1"),
        ("unix:/run/a.sock", "unix:/run/a.sock"),
        ("unix:///run/a.sock", "unix:/run/a.sock"),
        ("unix:/run//./a.sock", "unix:/run/a.sock"),
    ],
)
def test_an_address_has_one_spelling(written: str, normal: str) -> None:
    assert addresses.normalise(written) == normal
    assert addresses.normalise(normal) == normal


@pytest.mark.parametrize(
    "wrong",
    [
        "", "host", "host:", ":1", "host:port", "host:65536", "host:-1", "host:1:2", "::1:7443", "[::1]", "[::1]:",
        "[127.0.0.1]:1", "[host]:1", "256.0.0.1:1", "1.2.3:1", "-host:1", "host-:1", "ho st:1", "höst:1", "a..b:1",
        "host/path:1", "http://host:1", "unix:", "unix:run/a", "unix:/", "unix:/run/", "unix:/a\0b", "unix:@abstract",
        "unix:/" + "x" * 107, "unix:/" + "ö" * 54, "host:\u0661",
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_what_is_expected(wrong: str) -> None:
    with pytest.raises(FerryError, match="expected HOST:PORT") as raised:
        addresses.normalise(wrong)
    assert raised.value.reason is Reason.INVALID_ARGUMENT


def test_the_longest_socket_path_is_accepted() -> None:
    address = "unix:/" + "x" * 106
    assert addresses.normalise(address) == address


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.9.1:1", "[::1]:1", "localhost:1", "LOCALHOST:1", "unix:/a"])
def test_loopback_is_what_only_this_host_reaches(address: str) -> None:
    assert addresses.is_loopback(address)


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "localhost.example.org:1", "127.0.0.1.example.org:1", "[fe80::1]:1"],
)
def test_everything_else_counts_as_reachable_from_outside(address: str) -> None:
    assert not addresses.is_loopback(address)


def test_a_wildcard_means_every_interface() -> None:
    assert addresses.is_wildcard("0.0.0.0:1")
    assert addresses.is_wildcard("[0::0]:1")
    assert not addresses.is_wildcard("127.0.0.1:1")
    assert not addresses.is_wildcard("host:1")
    assert not addresses.is_wildcard("unix:/a")


@pytest.mark.parametrize("address", ["127.0.0.1:7443", "[::1]:7443", "host-a:0"])
def test_split_and_join_are_inverse(address: str) -> None:
    assert addresses.join(*addresses.split(address)) == address
