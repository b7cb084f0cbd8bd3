"""The keeper as a process of its own, with its log lines read as they come."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from keeper_control import DEADLINE, TESTS, Control, Incarnation

Event = dict[str, Any]
# Short, so that a test can wait for the longest.
PAUSES = {"first": 0.01, "most": 0.04}


Start = Callable[..., "KeeperProcess"]


@contextmanager
def keepers(runtime_dir: Path) -> Iterator[Start]:
    """Start keepers, all in one directory and with the arguments of KeeperProcess, that are ended at last."""
    with ExitStack() as stack:

        def start(*arguments: Any, **options: Any) -> KeeperProcess:
            return stack.enter_context(KeeperProcess(runtime_dir, *arguments, **options))

        yield start


class KeeperProcess:
    """A keeper whose service is keeper_child.py, or `command`."""

    def __init__(
        self, runtime_dir: Path, control: Control | None = None, command: Sequence[str] = (), **options: Any
    ) -> None:
        self.runtime_dir = runtime_dir
        self._control = control
        self._events: list[Event] = []
        self._others: list[str] = []
        self._changed = threading.Condition()
        self._over = False
        if control is not None:
            command = control.command
        chosen = {"command": list(command), "backoff": PAUSES, **options}
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "keeper_host.py"), str(runtime_dir), json.dumps(chosen)],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                try:
                    self._events.append(json.loads(line))
                except ValueError:
                    self._others.append(line)
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def first(self) -> Incarnation:
        assert self._control is not None
        return self._control.accept()

    def next(self) -> Incarnation:
        return self.first()

    def events(self, name: str, count: int = 1) -> list[Event]:
        """Wait until events of a name have come, and return all there are."""
        with self._changed:
            in_time = self._changed.wait_for(lambda: self._over or len(self.said(name)) >= count, DEADLINE)
            found = self.said(name)
        assert in_time, f"{len(found)} {name} in time, not {count}: {self._events[-8:]} {self._others[-8:]}"
        assert len(found) >= count, f"the keeper ended after {len(found)} {name}: {self._events[-8:]} {self._others}"
        return found

    def said(self, name: str) -> list[Event]:
        return [event for event in self._events if event["event"] == name]

    def other_lines(self) -> str:
        """What came that is no event, once all has come."""
        self._reader.join(DEADLINE)
        return "".join(self._others)

    @property
    def socket(self) -> Path:
        return Path(self.events("keeper_ready")[0]["socket"])

    @property
    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def code(self) -> int:
        """Wait for the keeper's end; return its exit code."""
        return self.process.wait(DEADLINE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._control is None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(DEADLINE)
        # A service that ends is started again: hence the keeper first. Its service ends with its control socket.
        self.process.kill()
        self.process.wait(DEADLINE)
        if self._control is not None:
            self._control.end_all()
        self._reader.join(DEADLINE)
        assert self.process.stderr is not None
        self.process.stderr.close()
