"""A directory that a sidecar shares with one VMM: for the sockets and files of one migration."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Self

from pageferry.errors import FerryError, Reason

_IN_JAIL = ("run", "pageferry")
_BENEATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class VmmDirectory:
    """A private directory of the VMM's user. `path` is where the sidecar finds it, `seen` where the VMM does.

    The two differ where the VMM lives in a root directory of its own, as the jailer of Firecracker gives it.
    """

    def __init__(self, parent: int, path: Path, seen: Path) -> None:
        """Own `parent`, an open directory, or -1."""
        self._parent = parent
        self.path = path
        self.seen = seen

    @classmethod
    def make(cls, runtime_dir: Path, name: str, pid: int) -> Self:
        """Make the directory `name` for the VMM of process `pid`: below `runtime_dir`, or in the VMM's own root.

        FerryError: VMM_GONE, PERMISSION_MISSING.
        """
        try:
            uid, gid = _owner(pid)
            root = Path(f"/proc/{pid}/root")
            if root.samefile("/"):
                made = cls(-1, runtime_dir / name, runtime_dir / name)
                runtime_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
            else:
                made = cls._in_jail(root, name)
            made.begin(uid, gid)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise FerryError(Reason.VMM_GONE, f"the VMM (process {pid}) is gone") from error
        except OSError as error:
            raise FerryError(
                Reason.PERMISSION_MISSING,
                f"cannot make a directory for the sockets of the VMM (process {pid}): {error}; run pageferryd as root, "
                "or as the VMM's user",
            ) from error
        return made

    @classmethod
    def _in_jail(cls, root: Path, name: str) -> Self:
        """Go down without following links: a VMM could make them lead out of its jail."""
        parent = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for step in _IN_JAIL:
            above = parent
            try:
                parent = _step_down(above, step)
            finally:
                os.close(above)
        try:
            _refuse_foreign(parent)
        except BaseException:
            os.close(parent)
            raise
        # Short, as the path of a socket must be.
        return cls(parent, Path(f"/proc/self/fd/{parent}") / name, Path("/", *_IN_JAIL, name))

    def begin(self, uid: int, gid: int) -> None:
        """Make it anew, the given user's. Raises OSError."""
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            self.path.mkdir(mode=0o700)
            if uid != os.geteuid():
                _let_pass(self.path.parent, uid)
                os.chown(self.path, uid, gid, follow_symlinks=False)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove it with all that is in it. Twice does nothing."""
        parent, self._parent = self._parent, -1
        if parent >= 0 or self.path.parent == self.seen.parent:
            shutil.rmtree(self.path, ignore_errors=True)
        if parent >= 0:
            os.close(parent)


def _owner(pid: int) -> tuple[int, int]:
    """Return user and group of a process, as files see them (proc_pid_status(5)).

    Not the owner of /proc/PID: that is root for a process that changed its user.
    """
    lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(told["Uid"].split()[3]), int(told["Gid"].split()[3])


def _step_down(above: int, step: str) -> int:
    """Return the directory `step` of an open one; it is made, for all to pass, where there is none."""
    try:
        os.mkdir(step, dir_fd=above)
    except FileExistsError:
        return os.open(step, _BENEATH, dir_fd=above)
    made = os.open(step, _BENEATH, dir_fd=above)
    Path(f"/proc/self/fd/{made}").chmod(0o711)
    return made


def _refuse_foreign(directory: int) -> None:
    """Raise PermissionError where others can put links in the place of what is made, and have them followed."""
    found = os.fstat(directory)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{Path('/', *_IN_JAIL)} in its root directory is somebody else's, or others may write")


def _let_pass(parent: Path, uid: int) -> None:
    """Let other users through, not look: each directory inside belongs to one of them alone."""
    found = parent.stat()
    if found.st_uid != uid and not found.st_mode & 0o001:
        parent.chmod(found.st_mode & 0o777 | 0o011)


def give_to_owner_of_directory(path: Path) -> None:
    """Make a file or socket the property of whom its directory belongs to. Raises OSError."""
    owner = path.parent.stat()
    if owner.st_uid != os.geteuid():
        # That user may have put a link in its place.
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
