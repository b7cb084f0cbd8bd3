"""The directory that a sidecar shares with one VMM: of its user, in its root directory, and nowhere else."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pageferry.errors import FerryError, Reason
from pageferryd.linux.vmm_directory import VmmDirectory

NOBODY, GROUP = 65534, 65533
DEADLINE = 20.0

WAITING = """
import os, sys
root, uid, gid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if root:
    os.chroot(root)
    os.chdir("/")
if uid:
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
print("ready", flush=True)
for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


class Vmm:
    """A process of some user, in some root directory, that does what it is told."""

    def __init__(self, root: Path | None = None, uid: int = 0, gid: int = 0) -> None:
        command = [sys.executable, "-c", WAITING, str(root or ""), str(uid), str(gid)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def does(self, expression: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=DEADLINE)


@pytest.fixture
def start() -> Iterator[Callable[..., Vmm]]:
    started: list[Vmm] = []

    def make(root: Path | None = None, uid: int = 0, gid: int = 0) -> Vmm:
        started.append(Vmm(root, uid, gid))
        return started[-1]

    yield make
    for vmm in started:
        vmm.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that others can reach."""
    for one in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        one.chmod(one.stat().st_mode | 0o011)
    return tmp_path


@pytest.fixture
def jail(place: Path) -> Path:
    """A root directory whose /run is the VMM's own."""
    made = place / "jail"
    (made / "run").mkdir(parents=True)
    os.chown(made / "run", NOBODY, GROUP)
    return made


def descriptors() -> set[str]:
    return {one.name for one in Path("/proc/self/fd").iterdir()}


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() <= before


def refusal(runtime_dir: Path, pid: int) -> FerryError:
    with pytest.raises(FerryError) as refused:
        VmmDirectory.make(runtime_dir, "one", pid)
    return refused.value


Start = Callable[..., Vmm]


def test_a_vmm_of_the_same_user_gets_a_private_directory(tmp_path: Path) -> None:
    made = VmmDirectory.make(tmp_path / "run" / "ferry", "one", os.getpid())
    assert made.path == made.seen == tmp_path / "run" / "ferry" / "one"
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    (made.path / "socket").touch()
    made.remove()
    made.remove()
    assert list((tmp_path / "run" / "ferry").iterdir()) == []


def test_what_an_earlier_one_left_is_not_found_in_it(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "old").touch()
    made = VmmDirectory.make(tmp_path, "one", os.getpid())
    assert list(made.path.iterdir()) == []
    made.remove()


def test_a_vmm_that_is_gone_gets_none(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait(DEADLINE)
    assert refusal(tmp_path, ended.pid).reason is Reason.VMM_GONE
    assert list(tmp_path.iterdir()) == []


def test_a_vmm_that_nobody_has_reaped_is_gone_too(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert refusal(tmp_path, ended.pid).reason is Reason.VMM_GONE
    ended.wait(DEADLINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_a_vmm_of_another_user_owns_its_directory_and_passes_through_the_one_above(place: Path, start: Start) -> None:
    vmm = start(uid=NOBODY, gid=GROUP)
    runtime_dir = place / "run"
    runtime_dir.mkdir(0o700)
    made = VmmDirectory.make(runtime_dir, "one", vmm.pid)
    found = made.path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOBODY, GROUP, 0o700)
    assert vmm.does(f"os.mkdir({str(made.seen / 'mine')!r})") == "None"
    # It sees neither what else there is, nor can it add to that.
    assert vmm.does(f"os.listdir({str(runtime_dir)!r})") == "PermissionError"
    assert vmm.does(f"os.mkdir({str(runtime_dir / 'two')!r})") == "PermissionError"
    made.remove()
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.root
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_jailed_vmm_finds_its_directory_in_its_own_root(jail: Path, start: Start, umask: int) -> None:
    vmm = start(jail, NOBODY, GROUP)
    before = os.umask(umask)
    try:
        made = VmmDirectory.make(jail.parent / "run", "one", vmm.pid)
    finally:
        os.umask(before)
    assert made.seen == Path("/run/pageferry/one")
    (made.path / "from-outside").touch()
    assert vmm.does("os.listdir('/run/pageferry/one')") == "['from-outside']"
    assert vmm.does("os.mkdir('/run/pageferry/one/from-inside')") == "None"
    assert sorted(one.name for one in made.path.iterdir()) == ["from-inside", "from-outside"]
    assert (jail / "run" / "pageferry" / "one").samefile(made.path)
    assert len(str(made.path / "handoff.sock")) < 60
    made.remove()
    made.remove()
    assert list((jail / "run" / "pageferry").iterdir()) == []
    assert not (jail.parent / "run").exists()


@pytest.mark.root
def test_a_jail_without_anything_in_it_gets_what_it_needs(place: Path, start: Start) -> None:
    (place / "empty").mkdir()
    vmm = start(place / "empty", NOBODY, GROUP)
    before = os.umask(0o077)
    try:
        made = VmmDirectory.make(place / "run", "one", vmm.pid)
    finally:
        os.umask(before)
    assert vmm.does("os.listdir('/run/pageferry/one')") == "[]"
    made.remove()


@pytest.mark.root
@pytest.mark.parametrize("link", ["run", "run/pageferry"])
def test_a_link_that_leads_out_of_the_jail_is_not_followed(jail: Path, start: Start, link: str) -> None:
    outside = jail.parent / "outside"
    (outside / "pageferry").mkdir(parents=True)
    if link == "run":
        (jail / "run").rmdir()
    (jail / link).symlink_to(outside)
    vmm = start(jail, NOBODY, GROUP)
    assert refusal(jail.parent / "runtime", vmm.pid).reason is Reason.PERMISSION_MISSING
    assert [one.name for one in outside.rglob("*")] == ["pageferry"]
    assert outside.stat().st_uid == 0


@pytest.mark.root
def test_a_directory_in_which_the_vmm_could_put_links_is_not_used(jail: Path, start: Start) -> None:
    secret = jail.parent / "secret"
    secret.mkdir()
    mine = jail / "run" / "pageferry"
    mine.mkdir()
    os.chown(mine, NOBODY, GROUP)
    (mine / "one").symlink_to(secret)
    vmm = start(jail, NOBODY, GROUP)
    refused = refusal(jail.parent / "runtime", vmm.pid)
    assert refused.reason is Reason.PERMISSION_MISSING
    assert "somebody else's" in refused.message
    os.chown(mine, 0, 0)
    mine.chmod(0o777)
    assert refusal(jail.parent / "runtime", vmm.pid).reason is Reason.PERMISSION_MISSING
    assert secret.stat().st_uid == 0


@pytest.mark.root
def test_a_vmm_that_moves_its_directory_away_keeps_nothing_and_gets_nothing(jail: Path, start: Start) -> None:
    secret = jail.parent / "secret"
    secret.mkdir()
    (secret / "kept").touch()
    vmm = start(jail, NOBODY, GROUP)
    made = VmmDirectory.make(jail.parent / "run", "one", vmm.pid)
    # /run is its own: it may rename what lies there.
    assert vmm.does("os.rename('/run/pageferry', '/run/elsewhere')") == "None"
    (jail / "run" / "pageferry").mkdir()
    (jail / "run" / "pageferry" / "one").symlink_to(secret)
    (made.path / "state").touch()
    assert (jail / "run" / "elsewhere" / "one" / "state").exists()
    made.remove()
    assert not (jail / "run" / "elsewhere" / "one").exists()
    assert [one.name for one in secret.iterdir()] == ["kept"]


@pytest.mark.root
def test_links_that_the_vmm_leaves_are_removed_and_not_followed(jail: Path, start: Start) -> None:
    secret = jail.parent / "secret"
    secret.mkdir()
    (secret / "kept").touch()
    vmm = start(jail, NOBODY, GROUP)
    made = VmmDirectory.make(jail.parent / "run", "one", vmm.pid)
    assert vmm.does(f"os.symlink({str(secret)!r}, '/run/pageferry/one/link')") == "None"
    made.remove()
    assert [one.name for one in secret.iterdir()] == ["kept"]


@pytest.mark.root
def test_a_jailed_vmm_that_ends_leaves_a_directory_that_can_be_removed(jail: Path, start: Start) -> None:
    vmm = start(jail, NOBODY, GROUP)
    made = VmmDirectory.make(jail.parent / "run", "one", vmm.pid)
    os.kill(vmm.pid, signal.SIGKILL)
    vmm.process.wait(DEADLINE)
    made.remove()
    assert list((jail / "run" / "pageferry").iterdir()) == []
