"""The manifest of a snapshot: there and back, and every way in which it is not believed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from migrated.errors import RemoteProtocolError
from migrated.wire import manifest as m

HASHES = [f"{number:032x}" for number in range(8)]
CHUNKS = (m.Chunk(0, 10, HASHES[0]), m.Chunk(10, 20, HASHES[1]), m.Chunk(30, 5, HASHES[2]), m.Chunk(35, 7, HASHES[3]))


def section(offset: int, length: int, **fields: Any) -> m.SavedSection:
    inside = m.chunks_of(CHUNKS, offset, length)
    hashed = m.hash_of(chunk.hash for chunk in inside)
    known = {"kind": "FULL", "idstr": "cpu", "instance_id": 0, "version_id": 1, **fields}
    return m.SavedSection(offset=offset, length=length, hash=hashed, **known)


GOOD = m.Manifest(
    format=m.FORMAT,
    tool="migrated 0.1.0",
    created="2026-01-01T00:00:00+00:00",
    machine=m.SavedMachine("kv", "f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "none", "running"),
    length=42,
    blocks=(m.SavedBlock("heap", 4096, 4096, HASHES[7]),),
    sections=(section(10, 20, kind="START", idstr="ram"), section(30, 5)),
    chunks=CHUNKS,
)


def damaged(**changes: Any) -> bytes:
    """A manifest that is not damaged on its way, but wrong from the beginning."""
    return m.encode_manifest(replace(GOOD, **changes))


def test_there_and_back() -> None:
    raw = m.encode_manifest(GOOD)
    found = m.parse_manifest(raw)
    assert replace(found, hash="") == GOOD
    summary = m.parse_summary(raw)
    assert (summary.length, summary.machine, summary.blocks) == (42, GOOD.machine, GOOD.blocks)
    assert m.parse_manifest(damaged(machine=m.SavedMachine("kv", "", "none", "paused"))).machine.uuid == ""


def test_it_is_json_that_people_can_read() -> None:
    read = json.loads(m.encode_manifest(GOOD))
    assert read["machine"]["run-state"] == "running"
    assert read["chunks"][1] == [10, 20, HASHES[1]]
    assert read["sections"][0]["instance-id"] == 0


@given(st.data())
def test_a_flipped_bit_anywhere_is_found(data: st.DataObject) -> None:
    raw = bytearray(m.encode_manifest(GOOD).rstrip())
    at = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[at // 8] ^= 1 << at % 8
    with pytest.raises(RemoteProtocolError):
        m.parse_manifest(bytes(raw))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_words(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="section manifest"):
        m.parse_manifest(raw)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"format": 2, "more": 1}', "does not read snapshots of that format, expected format 1, found format 2"),
        (b'{"format": 0}', "expected format 1, found format 0"),
        (b'{"format": 1}', "cannot be understood"),
        (b"\xff", "cannot be understood"),
        (damaged(chunks=CHUNKS[1:]), r"do not cover the stream, expected at most \d+ bytes from 0x0"),
        (damaged(chunks=(*CHUNKS, m.Chunk(42, 0, HASHES[0]))), "do not cover the stream"),
        (damaged(chunks=(m.Chunk(0, m.CHUNK_MAX_BYTES + 1, HASHES[0]),)), "do not cover the stream"),
        (damaged(length=43), "expected 43 bytes, found 42 bytes"),
        (damaged(sections=(section(30, 5), section(10, 20))), r"section cpu/0 \(FULL\) is not made of its chunks"),
        (damaged(sections=(replace(section(30, 5), hash=HASHES[0]),)), "is not made of its chunks"),
        (damaged(machine=m.SavedMachine("kv", "no-uuid", "none", "running")), "cannot be understood"),
        (m.encode_manifest(GOOD).replace(b'"kv"', b'"vk"'), "the manifest is damaged"),
        (m.encode_manifest(GOOD).replace(b'"tool"', b'"took"'), "cannot be understood"),
    ],
)
def test_what_is_not_believed(raw: bytes, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        m.parse_manifest(raw)


def test_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "MANIFEST_MAX_BYTES", 100)
    with pytest.raises(RemoteProtocolError, match="the manifest is too long, expected at most 100 bytes"):
        m.parse_summary(m.encode_manifest(GOOD))


@pytest.mark.parametrize(
    ("offset", "name"),
    [
        (0, m.HEADER),
        (9, m.HEADER),
        (10, "ram/0 (START)"),
        (29, "ram/0 (START)"),
        (30, "cpu/0 (FULL)"),
        (35, m.DESCRIPTION),
    ],
)
def test_every_byte_has_a_place(offset: int, name: str) -> None:
    assert m.section_at(GOOD, offset) == name


def test_lengths_and_hashes() -> None:
    m.check_length(GOOD, 42)
    with pytest.raises(
        RemoteProtocolError, match=r"cut short, .*found 31 bytes \(section cpu/0 \(FULL\), stream offset 0x1f"
    ):
        m.check_length(GOOD, 31)
    with pytest.raises(RemoteProtocolError, match="goes on behind its end, expected 42 bytes, found 43 bytes"):
        m.check_length(GOOD, 43)
    m.check_chunk(GOOD, CHUNKS[1], HASHES[1])
    with pytest.raises(
        RemoteProtocolError, match=r"damaged within 20 bytes, .*section ram/0 \(START\), stream offset 0xa"
    ):
        m.check_chunk(GOOD, CHUNKS[1], HASHES[2])
