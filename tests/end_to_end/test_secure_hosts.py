"""Memory goes only to the host whose certificate bears the name in the migration."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from crossing import Crossing, Stage
from sidecar_process import Sidecar

from certificates import Authority
from pageferry.errors import FerryError, Reason
from pageferry.tls import TlsFiles

pytestmark = [pytest.mark.root, pytest.mark.userfaultfd]


class Realm:
    """A CA, and two hosts with certificates of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority()

    def files(self, name: str, *dns_names: str) -> TlsFiles:
        return self.authority.write(self.directory / f"tls-{name}", *(dns_names or (name,)))

    async def hosts(self, stage: Stage, names: tuple[str, str] = ("east", "west"), **settings: Any) -> list[Sidecar]:
        return list(await asyncio.gather(*(stage.sidecar(n, tls=self.files(n), **settings) for n in names)))


@pytest.fixture
def realm(short_path: Path) -> Realm:
    return Realm(short_path)


async def test_a_guest_crosses_between_hosts_that_prove_their_names(stage: Stage, realm: Realm) -> None:
    operator = realm.files("ops")
    east, west = await realm.hosts(stage, operators=["ops"], peers=["east", "west"])
    crossing = await stage.crossing(east, west, tls=operator)
    await crossing.start()
    left, came = await crossing.arrives()
    assert (left.source_name, left.destination_name) == (came.source_name, came.destination_name) == ("east", "west")


async def test_guest_memory_goes_to_nobody_with_another_name(stage: Stage, realm: Realm) -> None:
    east, west = await realm.hosts(stage)
    crossing = await stage.crossing(east, west)
    await crossing.start(destination_name="north")
    await crossing.fails(Reason.DESTINATION_UNREACHABLE)
    assert await crossing.at_destination.list_migrations() == []
    # Under its right name the same host is welcome.
    await crossing.start()
    await crossing.arrives()


async def test_a_host_of_another_ca_is_not_talked_to(stage: Stage, realm: Realm) -> None:
    east = await stage.sidecar("east", tls=realm.files("east"))
    stranger = await stage.sidecar("west", tls=Authority("another CA").write(realm.directory / "other", "west"))
    crossing = await stage.crossing(east, stranger)
    await crossing.start()
    await crossing.fails(Reason.DESTINATION_UNREACHABLE)


async def test_a_host_that_is_no_peer_may_send_nothing(stage: Stage, realm: Realm) -> None:
    east = await stage.sidecar("east", tls=realm.files("east"))
    west = await stage.sidecar("west", tls=realm.files("west"), peers=["north"])
    crossing = await stage.crossing(east, west)
    await crossing.start()
    await crossing.fails(Reason.PEER_NOT_ALLOWED)


async def test_a_source_that_does_not_let_its_destination_fetch_pages_keeps_its_guest(
    stage: Stage, realm: Realm
) -> None:
    east = await stage.sidecar("east", tls=realm.files("east"), peers=["north"])
    west = await stage.sidecar("west", tls=realm.files("west"))
    crossing = await stage.crossing(east, west)
    await crossing.start()
    await crossing.fails(Reason.PEER_NOT_ALLOWED)


async def test_who_is_no_operator_may_not_use_the_api(stage: Stage, realm: Realm) -> None:
    east, _ = await realm.hosts(stage, operators=["ops"])
    client = await stage.client(east, realm.files("visitor"))
    with pytest.raises(FerryError) as caught:
        await client.list_guests()
    assert caught.value.reason is Reason.PEER_NOT_ALLOWED
    assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert "visitor" in caught.value.message


async def test_certificates_may_be_renewed_while_sidecars_run(stage: Stage, realm: Realm) -> None:
    """With another CA: hosts that still showed or trusted the old certificates could not talk to one another."""
    east, west = await realm.hosts(stage)
    await moved(await stage.crossing(east, west, tls=realm.files("ops")))

    realm.authority = Authority("the next CA")
    for name in ("east", "west"):
        realm.files(name)

    await moved(await stage.crossing(east, west, tls=realm.files("ops-renewed", "ops")))


async def moved(crossing: Crossing) -> None:
    await crossing.start()
    await crossing.arrives()


async def test_operators_of_the_same_host_use_a_socket_without_certificates(
    stage: Stage, realm: Realm, short_path: Path
) -> None:
    socket = short_path / "api.sock"
    east = await stage.sidecar("east", tls=realm.files("east"), api_socket=str(socket), operators=["ops"])
    assert socket.stat().st_mode & 0o777 == 0o600
    east.tls, east.address = None, f"unix:{socket}"
    client = await stage.client(east)
    assert await client.list_guests() == []
