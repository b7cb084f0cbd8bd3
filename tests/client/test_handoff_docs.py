"""What docs/handoff.md shows is what goes over the wire."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from doc_examples import DOCS, examples
from tiny_pager import receive_handoff

from pageferry.errors import Reason
from pageferry.vmm import HandoffRegion
from pageferry.vmm.handoff import encode_table

REGIONS = [HandoffRegion(0x7F0000000000, 1 << 20, 0), HandoffRegion(0x7F1000000000, 2 << 20, 1 << 20, 2 << 20)]


def test_the_table_in_the_page_is_the_table_that_is_sent() -> None:
    table = examples("handoff.md", "text")[0].replace("\n", "")

    assert table.encode() == encode_table(REGIONS)
    assert f"{len(table)} bytes" in (DOCS / "handoff.md").read_text()


def test_the_control_message_in_the_page_is_that_of_the_c_library() -> None:
    shown = b"".join(bytes.fromhex(line[:24]) for line in examples("handoff.md", "text")[1].splitlines())

    assert shown == struct.pack("<Qiii", socket.CMSG_LEN(4), socket.SOL_SOCKET, socket.SCM_RIGHTS, 5)


def test_the_sender_in_the_page_sends_a_hand_off(short_path: Path) -> None:
    module: dict[str, Any] = {}
    exec(examples("handoff.md", "python")[0], module)
    reading, writing = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_path / "pager.sock"))
        listener.listen(1)

        kept = module["hand_over"](listener.getsockname(), reading, json.loads(encode_table(REGIONS)))
        connection, data, (received,) = receive_handoff(listener)

    with kept, connection:
        assert json.loads(data) == json.loads(encode_table(REGIONS))
        assert os.path.sameopenfile(received, reading)
    for fd in (reading, writing, received):
        os.close(fd)


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason.startswith("HANDOFF_")])
def test_the_page_explains_every_reason_of_a_refused_hand_off(reason: Reason) -> None:
    assert f"`{reason}`" in (DOCS / "handoff.md").read_text()
