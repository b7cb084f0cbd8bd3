"""Executes a command as systemd does, with descriptors from 3 on: keeper_launch.py FD,FD,… NAME:NAME:… COMMAND."""

from __future__ import annotations

import fcntl
import os
import sys

_, listed, names, *command = sys.argv
given = [int(fd) for fd in listed.split(",") if fd]
# The duplicates lie behind all places, so that no place is taken from one that is still to be moved.
fds = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3 + len(given)) for fd in given]
for place, fd in enumerate(fds, 3):
    os.dup2(fd, place)
if fds:
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
os.execv(command[0], command)
