"""The message of pages that is written and read by hand, against the generated classes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.v1 import page_pb2
from pageferryd.core.checksums import checksums_of
from pageferryd.core.errors import MalformedPagesError
from pageferryd.core.layout import PAGE_SIZE
from pageferryd.core.runs import MAX_RUNS, POISONED, PRIVATE, RAW, ZERO, Batch, Run, decode, encode

GENERATED = [page_pb2.FetchPagesResponse, page_pb2.PushPagesResponse]


@st.composite
def messages(draw: st.DrawFn) -> tuple[list[Run], list[bytes], bool]:
    runs = []
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from([RAW, ZERO, POISONED]))
        pages = draw(st.integers(1, 3) if kind == RAW else st.integers(1, (1 << 32) - 1))
        runs.append(Run(draw(st.integers(0, (1 << 64) - 1)), pages, kind))
    raw = sum(run.pages for run in runs if run.kind == RAW)
    data = [bytes([draw(st.integers(0, 255))]) * PAGE_SIZE for _ in range(raw)]
    return runs, data, draw(st.booleans())


def generated(kind: type, runs: list[Run], data: list[bytes], *, last: bool) -> object:
    message = kind(
        first_pages=[run.first for run in runs],
        page_counts=[run.pages for run in runs],
        kinds=bytes(run.kind for run in runs),
        data=b"".join(data),
    )
    if last:
        message.last = True
    return message


@given(messages())
def test_what_was_written_is_read_again(message: tuple[list[Run], list[bytes], bool]) -> None:
    runs, data, last = message
    batch = decode(encode(runs, data, last=last))
    assert batch.runs == runs
    assert batch.last == last
    assert batch.message[batch.offset : batch.offset + PAGE_SIZE * len(data)] == b"".join(data)


@pytest.mark.parametrize("kind", GENERATED)
@given(messages())
def test_the_bytes_are_those_of_the_generated_class(kind: type, message: tuple[list[Run], list[bytes], bool]) -> None:
    runs, data, last = message
    last = last and kind is page_pb2.PushPagesResponse
    expected = generated(kind, runs, data, last=last)
    assert encode(runs, [memoryview(part) for part in data], last=last) == expected.SerializeToString()
    assert kind.FromString(encode(runs, data, last=last)) == expected
    batch = decode(expected.SerializeToString())
    assert (batch.runs, batch.last) == (runs, last)


@pytest.mark.parametrize("kind", GENERATED)
@given(messages())
def test_checksums_are_written_and_read_as_the_generated_class_does(
    kind: type, message: tuple[list[Run], list[bytes], bool]
) -> None:
    runs, data, last = message
    last = last and kind is page_pb2.PushPagesResponse
    column = checksums_of(data)
    expected = generated(kind, runs, data, last=last)
    expected.checksums.extend(struct.unpack(f"<{len(data)}Q", column))
    written = encode(runs, data, last=last, checksums=column)
    assert written == expected.SerializeToString()

    batch = decode(written, checksums=True)
    assert (batch.runs, batch.last) == (runs, last)
    assert batch.message[batch.offset : batch.offset + PAGE_SIZE * len(data)] == b"".join(data)
    if data:
        assert batch.message[batch.checksums : batch.checksums + len(column)] == column
    else:
        assert batch.checksums == 0


def outcome(message: bytes, *, checksums: bool = False) -> Batch | None:
    try:
        return decode(message, checksums=checksums)
    except MalformedPagesError:
        return None


def test_no_bytes_are_an_empty_message() -> None:
    assert decode(b"") == Batch([], b"", 0, last=False)


@settings(max_examples=500)
@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_give_a_batch_or_are_malformed(message: bytes, checksums: bool) -> None:
    outcome(message, checksums=checksums)


# Tags and lengths that are nearly right reach deeper than random bytes.
field = st.builds(
    lambda tag, length, body: bytes([tag]) + length + body,
    st.sampled_from([0x0A, 0x12, 0x1A, 0x22, 0x28, 0x08, 0x10, 0x18, 0x20, 0x2A, 0x09, 0x32, 0x30, 0x80, 0x02, 0x00]),
    st.one_of(st.integers(0, 20).map(lambda n: bytes([n])), st.binary(min_size=1, max_size=11)),
    st.sampled_from([b"", b"\x01", bytes(4), b"\x01\x00\x00\x00", bytes(8), b"\x02\x02", bytes(12)]),
)


@settings(max_examples=500)
@given(st.lists(field, max_size=6).map(b"".join), st.booleans())
def test_fields_that_are_nearly_right_give_a_batch_or_are_malformed(message: bytes, checksums: bool) -> None:
    agrees_with_generated(message, checksums=checksums)


@settings(max_examples=300)
@given(messages(), st.data())
def test_a_message_with_some_bytes_changed_gives_what_the_generated_class_reads_or_is_malformed(
    message: tuple[list[Run], list[bytes], bool], data: st.DataObject
) -> None:
    runs, parts, last = message
    checksums = data.draw(st.booleans())
    changed = bytearray(encode(runs, parts, last=last, checksums=checksums_of(parts) if checksums else b""))
    for _ in range(data.draw(st.integers(0, 3))):
        if changed:
            # Most of the form is in the first bytes; the pages are the rest.
            at = data.draw(st.integers(0, min(len(changed), 120) - 1))
            changed[data.draw(st.sampled_from([at, -1 - at]))] = data.draw(st.integers(0, 255))
    agrees_with_generated(bytes(changed[: data.draw(st.integers(0, len(changed)))]), checksums=checksums)


def agrees_with_generated(message: bytes, *, checksums: bool) -> None:
    batch = outcome(message, checksums=checksums)
    if batch is None:
        return
    expected = page_pb2.PushPagesResponse.FromString(message)
    assert [run.first for run in batch.runs] == list(expected.first_pages)
    assert [run.pages for run in batch.runs] == list(expected.page_counts)
    assert bytes(run.kind for run in batch.runs) == expected.kinds
    assert batch.message[batch.offset : batch.offset + len(expected.data)] == expected.data
    assert batch.last == expected.last
    assert len(expected.checksums) == (len(expected.data) // PAGE_SIZE if checksums else 0)
    column = struct.pack(f"<{len(expected.checksums)}Q", *expected.checksums)
    assert batch.message[batch.checksums : batch.checksums + len(column)] == column


PAGE = bytes(PAGE_SIZE)
GOOD = encode([Run(1, 1, RAW)], [PAGE])


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(GOOD[:-1], id="a page one byte short"),
        pytest.param(GOOD[:3], id="the end in a column"),
        pytest.param(GOOD[:1], id="the end behind a tag"),
        pytest.param(encode([Run(1, 1, RAW)], [PAGE, PAGE]), id="a page too many"),
        pytest.param(encode([Run(1, 1, RAW)], []), id="no page"),
        pytest.param(encode([Run(1, 1, ZERO)], [PAGE]), id="bytes for a page of zeroes"),
        pytest.param(encode([Run(1, 0, ZERO)], []), id="a run of no pages"),
        pytest.param(encode([Run(1, 1, 0)], []), id="no kind"),
        pytest.param(encode([Run(1, 1, 9)], []), id="an unknown kind"),
        pytest.param(GOOD + GOOD, id="each field twice"),
        pytest.param(b"\x1a\x01\x02", id="a kind without its run"),
        pytest.param(b"\x08\xe8\x07", id="a number instead of a column"),
        pytest.param(b"\x2a\x01\x01", id="bytes instead of the last flag"),
        pytest.param(b"\x0a" + b"\xff" * 12, id="a length without end"),
        pytest.param(b"\x80\x80\x80\x80\x80\x0a\x00", id="a field number beyond 32 bits"),
        pytest.param(b"\xb0\x80\x80\x80\x80\x00\x00", id="a field number in six bytes"),
        pytest.param(b"\x30" + b"\xff" * 9 + b"\x7f", id="a value beyond 64 bits"),
        pytest.param(b"\x32\x81\x80\x80\x80\x80\x00\x01", id="a length in six bytes"),
        pytest.param(b"\x0a\xff\xff\xff\xff\x0f", id="a length beyond the message"),
        pytest.param(encode([Run(1, 1, ZERO)] * (MAX_RUNS + 1), []), id="more runs than allowed"),
    ],
)
def test_a_malformed_message_is_refused(message: bytes) -> None:
    with pytest.raises(MalformedPagesError) as raised:
        decode(message)
    assert raised.value.reason == "MALFORMED_PAGES"


def test_fields_of_a_later_version_are_skipped() -> None:
    later = GOOD + b"\x38\x05" + b"\x42\x02hi" + b"\x82\x01\x01x"
    assert decode(later).runs == decode(GOOD).runs


CHECKSUM = checksums_of([PAGE])
CHECKED = encode([Run(1, 1, RAW)], [PAGE], checksums=CHECKSUM)
TWO = [Run(1, 1, RAW), Run(7, 1, PRIVATE)]


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(GOOD, id="a page without"),
        pytest.param(encode(TWO, [PAGE, PAGE]), id="two pages without"),
        pytest.param(encode(TWO, [PAGE, PAGE], checksums=CHECKSUM), id="one for two pages"),
        pytest.param(encode([Run(1, 1, RAW)], [PAGE], checksums=CHECKSUM * 2), id="two for one page"),
        pytest.param(encode([Run(1, 1, RAW)], [PAGE], checksums=CHECKSUM[:-1]), id="a short one"),
        pytest.param(encode([Run(1, 1, ZERO)], [], checksums=CHECKSUM), id="one for a page of zeroes"),
        pytest.param(CHECKED + b"\x32\x00", id="the column twice"),
        pytest.param(GOOD + b"\x30\x05", id="a number instead of the column"),
        pytest.param(CHECKED[:-1], id="the end in the column"),
        pytest.param(CHECKED[: -len(CHECKSUM)], id="the end before the column"),
    ],
)
def test_pages_that_must_carry_checksums_and_do_not_are_refused(message: bytes) -> None:
    with pytest.raises(MalformedPagesError):
        decode(message, checksums=True)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(CHECKED, id="a page"),
        pytest.param(encode(TWO, [PAGE, PAGE], checksums=CHECKSUM * 2), id="two pages"),
        pytest.param(encode([Run(1, 1, RAW)], [PAGE], last=True, checksums=CHECKSUM), id="the last of an answer"),
    ],
)
def test_checksums_that_nobody_asked_for_are_refused(message: bytes) -> None:
    assert decode(message, checksums=True).checksums
    with pytest.raises(MalformedPagesError):
        decode(message)


def test_pages_of_zeroes_and_poisoned_ones_need_no_checksums() -> None:
    runs = [Run(3, 5, ZERO), Run(9, 1, POISONED)]
    for message in (encode(runs, []), encode(runs, []) + b"\x32\x00"):
        assert decode(message, checksums=True) == Batch(runs, message, 0, last=False)
