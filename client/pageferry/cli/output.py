"""Where the command writes: data to stdout, everything else to stderr, and JSON whose numbers are numbers."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from rich.console import Console

if TYPE_CHECKING:
    from typing import TextIO

    from google.protobuf.message import Message
    from rich.console import RenderableType

    from pageferry.errors import FerryError

# What protobuf's JSON writes as strings, since JavaScript has no such integers.
_LONG: Final = frozenset({FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64})
_PLAIN_WIDTH: Final = 160


def console(stream: TextIO | None = None) -> Console:
    """Return a console for a stream, stdout when None: live and coloured on a terminal, bare lines anywhere else."""
    stream = stream if stream is not None else sys.stdout
    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    return Console(
        file=stream,
        force_terminal=terminal,
        no_color=not terminal or bool(os.environ.get("NO_COLOR")),
        # Lines of a file must not depend on the width of some terminal.
        width=None if terminal else _PLAIN_WIDTH,
        highlight=False,
    )


def show(out: Console, what: RenderableType) -> None:
    """Print something; what is no terminal gets it without the blanks that fill tables up to their width."""
    if out.is_terminal:
        out.print(what)
        return
    with out.capture() as captured:
        out.print(what)
    for line in captured.get().splitlines():
        out.out(line.rstrip(), highlight=False)


def print_json(document: object) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def print_error(error: FerryError) -> None:
    """Print an error as one line on stderr."""
    print(f"error: {error.reason}: {' '.join(error.message.split())}", file=sys.stderr)


def to_dict(message: Message) -> dict[str, Any]:
    """Return a message as JSON would hold it: names as in the contract, integers as integers, nothing left out."""
    document = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    _restore_integers(message, document)
    return document


def _restore_integers(message: Message, document: dict[str, Any]) -> None:
    for field in message.DESCRIPTOR.fields:
        if field.name not in document:
            continue
        value = document[field.name]
        if field.cpp_type in _LONG:
            document[field.name] = [int(item) for item in value] if isinstance(value, list) else int(value)
        elif isinstance(value, dict):
            _restore_integers(getattr(message, field.name), value)
        elif isinstance(value, list) and field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            for inner, inner_document in zip(getattr(message, field.name), value, strict=True):
                _restore_integers(inner, inner_document)
