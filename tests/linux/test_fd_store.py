"""FdStore against a manager that stands in for systemd; tests/control/test_keeper.py has it against the keeper."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keeper_conformance import CAPACITY, StoreConformance
from keeper_control import Manager, controlled
from keeper_stand_in import StandInManager
from pageferry.errors import FerryError, Reason
from pageferryd.linux import fd_store, notify_wire
from pageferryd.linux.fd_store import FdStore
from pageferryd.linux.notify_wire import Action
from pageferryd.linux.same_file import file_id, same_open_file

PLENTY = 4096


class TestStandInManager(StoreConformance):
    @pytest.fixture
    def manager(self, tmp_path: Path) -> Iterator[Manager]:
        with (
            controlled(tmp_path) as control,
            StandInManager(str(tmp_path / "notify.sock"), CAPACITY, control) as manager,
        ):
            yield manager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[StandInManager]:
    with StandInManager(str(tmp_path / "notify.sock")) as manager:
        yield manager


@pytest.fixture
def memory() -> Iterator[Callable[[], int]]:
    """Make memory that is closed after the test."""
    made: list[int] = []

    def make() -> int:
        made.append(os.memfd_create("stored"))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fd_store, "ANSWER_SECONDS", 0.05)


def test_the_datagrams_are_those_that_systemd_reads(manager: StandInManager, memory: Callable[[], int]) -> None:
    store = FdStore(manager.address, PLENTY)

    store.ready()
    store.keep("guest a/memory 0", memory())
    store.drop("guest a/memory 0")
    store.stopping()
    manager.synchronise()

    assert manager.messages == [
        b"READY=1",
        b"FDSTORE=1\nFDNAME=guest a/memory 0\nFDPOLL=0",
        b"BARRIER=1",
        b"FDSTOREREMOVE=1\nFDNAME=guest a/memory 0",
        b"STOPPING=1",
    ]


def test_the_manager_has_a_descriptor_once_keep_returns(manager: StandInManager, memory: Callable[[], int]) -> None:
    store = FdStore(manager.address, PLENTY)
    fd = memory()

    store.keep("guest", fd)

    [(name, held)] = manager.stored
    assert name == "guest"
    assert same_open_file(held, fd)


def test_an_abstract_address_is_reached(memory: Callable[[], int]) -> None:
    with StandInManager(f"@pageferry-test-{os.getpid()}") as manager:
        FdStore(manager.address, PLENTY).keep("guest", memory())

        assert [name for name, _ in manager.stored] == ["guest"]


@pytest.mark.usefixtures("impatient")
def test_a_manager_that_does_not_answer_is_not_believed_to_store(tmp_path: Path, memory: Callable[[], int]) -> None:
    with StandInManager(str(tmp_path / "notify.sock"), deaf=True) as manager:
        store, fd = FdStore(manager.address, PLENTY), memory()
        with pytest.raises(FerryError, match="has not answered within") as raised:
            store.keep("guest", fd)

    assert raised.value.reason is Reason.INTERNAL


@pytest.mark.usefixtures("impatient")
def test_a_manager_that_does_not_read_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asleep:
        asleep.bind(str(tmp_path / "notify.sock"))
        store = FdStore(asleep.getsockname(), PLENTY)

        def tell_without_end() -> None:
            while True:
                store.ready()

        with pytest.raises(FerryError, match="has not answered within"):
            tell_without_end()


def test_a_manager_that_is_gone_stores_nothing_and_needs_not_be_told(tmp_path: Path, memory: Callable[[], int]) -> None:
    with StandInManager(str(tmp_path / "notify.sock")) as manager:
        store = FdStore(manager.address, PLENTY)
        store.keep("guest", memory())

    with pytest.raises(FerryError, match=r"nobody listens at .* any more") as raised:
        store.keep("another", memory())
    assert raised.value.reason is Reason.INTERNAL
    store.drop("guest")
    store.ready()
    store.stopping()


@pytest.mark.parametrize("name", ["", "a:b", "a\nREADY=1", "\x7f", "gäst", "x" * 256])
def test_a_name_that_a_manager_would_refuse_is_refused(manager: StandInManager, name: str) -> None:
    with pytest.raises(FerryError, match="printable ASCII") as raised:
        FdStore(manager.address, PLENTY).keep(name, 0)

    assert raised.value.reason is Reason.INVALID_ARGUMENT
    assert manager.messages == []


def test_a_descriptor_that_is_not_open_is_refused(manager: StandInManager, memory: Callable[[], int]) -> None:
    store = FdStore(manager.address, 1)

    with pytest.raises(FerryError, match="is not open") as raised:
        store.keep("guest", 1 << 20)

    assert raised.value.reason is Reason.INVALID_ARGUMENT
    store.keep("the place is still free", memory())


def test_names_that_together_no_process_could_be_told_are_refused(
    manager: StandInManager, memory: Callable[[], int]
) -> None:
    store = FdStore(manager.address, PLENTY)
    most = (notify_wire.MAX_NAMES_BYTES + 1) // 256
    fd = memory()
    for number in range(most):
        store.keep(f"{number:0255}", fd)

    with pytest.raises(FerryError, match=r"names of the .* would be longer") as raised:
        store.keep("x" * 255, fd)

    assert raised.value.reason is Reason.NO_SPACE


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "/run/notify"}, {"FDSTORE": "9"}])
def test_without_a_manager_that_stores_nothing_happens(environ: dict[str, str], memory: Callable[[], int]) -> None:
    store = FdStore.from_environment(environ)

    assert not store.available
    store.keep("guest", memory())
    store.drop("guest")
    store.close_untaken()
    store.ready()
    store.stopping()
    assert (store.names(), store.take("guest"), environ) == ([], [], {})


def test_descriptors_meant_for_another_process_are_left_alone() -> None:
    environ = {"LISTEN_PID": str(os.getppid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "guest", "HOME": "/"}

    assert FdStore.from_environment(environ).names() == []
    assert environ == {"HOME": "/"}


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        ({"NOTIFY_SOCKET": "vsock:2:1234"}, "no Unix socket"),
        ({"NOTIFY_SOCKET": "/run/notify", "FDSTORE": "many"}, "FDSTORE is no number"),
        ({"LISTEN_PID": "me"}, "LISTEN_PID is no number"),
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS is no number"),
        ({"LISTEN_FDS": "999999999"}, "more than 65536"),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": "one"}, "LISTEN_FDNAMES names 1"),
        ({"LISTEN_FDS": "0", "LISTEN_FDNAMES": "one"}, "LISTEN_FDNAMES names 1"),
        ({"LISTEN_FDS": "65536"}, "is not open"),
    ],
)
def test_variables_that_cannot_be_are_complained_of(environ: dict[str, str], complaint: str) -> None:
    environ.setdefault("LISTEN_PID", str(os.getpid()))
    # Descriptors that this process has for itself must not be touched: the ones after 3 belong to pytest.
    flags = {int(link.name): os.get_inheritable(int(link.name)) for link in open_descriptors()}
    try:
        with pytest.raises(FerryError, match=complaint) as raised:
            FdStore.from_environment(environ)
    finally:
        for fd, inheritable in flags.items():
            os.set_inheritable(fd, inheritable)

    assert raised.value.reason is Reason.CONFIG_INVALID


def open_descriptors() -> list[Path]:
    return [link for link in Path("/proc/self/fd").iterdir() if link.exists()]


def test_what_was_stored_anew_under_an_untaken_name_is_not_let_go_of(
    manager: StandInManager, memory: Callable[[], int]
) -> None:
    old, new = os.dup(memory()), memory()
    store = FdStore(manager.address, PLENTY, [("guest", old)])
    store.keep("guest", new)

    store.close_untaken()
    manager.synchronise()

    assert store.names() == []
    assert [name for name, _ in manager.stored] == ["guest"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(old)


def test_one_open_file_is_told_from_another_of_the_same_inode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with path.open() as first, path.open() as second:
        again = os.dup(first.fileno())

        assert file_id(first.fileno()) == file_id(second.fileno())
        assert same_open_file(first.fileno(), again)
        assert not same_open_file(first.fileno(), second.fileno())
        os.close(again)


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters=":"), min_size=1, max_size=255)
TAGS = st.sampled_from([b"FDSTORE=1", b"FDSTOREREMOVE=1", b"FDPOLL=0", b"BARRIER=1", b"READY=1", b"FDNAME=", b"\0"])
LINES = st.lists(st.one_of(TAGS, st.binary(max_size=300).map(lambda name: b"FDNAME=" + name), st.binary(max_size=40)))


@given(st.one_of(st.binary(max_size=5000), LINES.map(b"\n".join)))
def test_whatever_comes_is_understood_or_ignored(data: bytes) -> None:
    notice = notify_wire.parse(data)

    if notice is not None:
        assert notice.action in (Action.NOTHING, Action.BARRIER) or notify_wire.is_name(notice.name)
        assert notice.action is not Action.BARRIER or data.strip(b"\n") == b"BARRIER=1"


@given(NAMES)
def test_what_one_end_writes_the_other_reads(name: str) -> None:
    assert notify_wire.parse(notify_wire.store(name)) == (Action.STORE, name, False, False, False)
    assert notify_wire.parse(notify_wire.remove(name)) == (Action.REMOVE, name, True, False, False)


@pytest.mark.parametrize(
    ("data", "action", "name"),
    [
        (b"FDSTORE=1", Action.STORE, "stored"),
        (b"FDSTORE=1\nFDNAME=a:b", Action.STORE, "stored"),
        (b"FDNAME=a\nFDSTORE=1\nFDSTOREREMOVE=1", Action.REMOVE, "a"),
        (b"STATUS=well\n\nFDSTORE=1\nFDNAME=a\nFDNAME=b\n", Action.STORE, "a"),
    ],
)
def test_unusual_datagrams_mean_what_they_mean_to_systemd(data: bytes, action: Action, name: str) -> None:
    notice = notify_wire.parse(data)

    assert notice is not None
    assert (notice.action, notice.name) == (action, name)


@pytest.mark.parametrize(
    "data", [b"", b"FDSTOREREMOVE=1", b"FDSTOREREMOVE=1\nFDNAME=\xff", b"BARRIER=1\nREADY=1", b"READY=1\0", b"x" * 4097]
)
def test_datagrams_that_systemd_ignores_are_ignored(data: bytes) -> None:
    assert notify_wire.parse(data) is None
