"""Preflight on the wire: the same there and back, in as many pieces as it takes, refused where it is none."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import Blocker, RemoteProtocolError
from migrated.wire.command import Command, check_command
from migrated.wire.preflight import (
    Answer,
    BlockNeed,
    Pieces,
    Requirements,
    SectionNeed,
    answer_pieces,
    encode_requirements,
    parse_answer,
    parse_requirements,
)
from migrated.wire.pull import feed
from migrated.wire.return_path import PreflightPiece, encode_preflight, parse_message
from migrated.wire.section import CommandHeader, parse_element

NEEDS = Requirements(
    protocol=1,
    tool="migrated 0.1.0",
    dry_run=True,
    migration_id="",
    name="kv",
    machine_type="none",
    uuid=None,
    clock_ms=1,
    blocks=[BlockNeed("heap", 8192, 4096, 4096)],
    sections=[SectionNeed("cpu", 1, 2, live=False)],
    capabilities={"postcopy-ram": True},
    parameters={"x-migrated-silence-timeout": 1000},
)
BLOCKER = Blocker("block-size", "destination", "RAM block heap differs", "make it equal")


def received(stream: bytes) -> list[bytes]:
    """Return the payloads of the commands in a stream."""
    payloads = []
    while stream:
        header = feed(parse_element(), [stream])
        assert isinstance(header, CommandHeader)
        assert check_command(header) is Command.X_PREFLIGHT
        payloads.append(header.payload)
        stream = stream[5 + len(header.payload) :]
    return payloads


def put_together(payloads: list[bytes]) -> bytes:
    pieces = Pieces(1 << 24)
    *early, last = [pieces.take(payload) for payload in payloads]
    assert early == [None] * len(early)
    assert last is not None
    return last


def test_requirements_come_back() -> None:
    payloads = received(encode_requirements(NEEDS))
    assert len(payloads) == 1
    assert parse_requirements(put_together(payloads)) == NEEDS
    assert str(NEEDS.sections[0]) == "cpu/1"


def test_long_ones_go_on_in_the_next_command() -> None:
    sections = [SectionNeed("d" * 250, number, 1, live=False) for number in range(600)]
    needs = msgspec.structs.replace(NEEDS, sections=sections)
    payloads = received(encode_requirements(needs))
    assert [payload[0] for payload in payloads] == [1] * (len(payloads) - 1) + [0]
    assert len(payloads) == 3
    assert parse_requirements(put_together(payloads)) == needs


def test_an_answer_comes_back_in_messages() -> None:
    answer = Answer("migrated 0.1.0", "kv", [BLOCKER] * 2000, preempt=True)
    bodies = answer_pieces(answer)
    assert len(bodies) > 1
    messages = [feed(parse_message(), [encode_preflight(body)]) for body in bodies]
    assert messages == [PreflightPiece(body) for body in bodies]
    assert parse_answer(put_together(bodies)) == answer


def test_what_an_answer_says_can_be_shown() -> None:
    evil = Blocker("\x1b[2J", "destination\0", "a\nb", "\x07", warning=True)
    shown = parse_answer(put_together(answer_pieces(Answer("t\r", "n\x9b", [evil]))))
    assert shown == Answer("t?", "n?", [Blocker("?[2J", "destination?", "a?b", "?", warning=True)])


@pytest.mark.parametrize(
    ("payloads", "why"),
    [
        ([b""], "goes on or not, expected 0 or 1, found nothing"),
        ([b"\2"], "goes on or not, expected 0 or 1, found 02"),
        ([b"\0{}", b"\0{}"], "behind the last one"),
        ([b"\1" + bytes(8), b"\0" + bytes(9)], "too long, expected at most 16 bytes"),
    ],
)
def test_what_are_no_pieces(payloads: list[bytes], why: str) -> None:
    pieces = Pieces(16)
    *good, bad = payloads
    for payload in good:
        pieces.take(payload)
    with pytest.raises(RemoteProtocolError, match=why):
        pieces.take(bad)


def changed(**members: Any) -> bytes:
    return json.dumps({**json.loads(msgspec.json.encode(NEEDS)), **members}).encode()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "cannot be understood"),
        (b"\xff", "cannot be understood"),
        (b"[" * 100_000, "cannot be understood"),
        (b"{}", "missing required field `protocol`"),
        (changed(blocks=[{"name": "heap", "size_bytes": -1, "page_size": 4096}]), "size_bytes"),
        (changed(blocks=[{"name": "heap", "size_bytes": 1 << 63, "page_size": 4096}]), "size_bytes"),
        (changed(sections=[{"idstr": "", "instance_id": 0, "version_id": 1, "live": True}]), "idstr"),
        (changed(capabilities={"x": 1}), "capabilities"),
        (changed(name="kv\x1b"), "cannot be printed, found 'kv"),
        (changed(capabilities={"\0": True}), "cannot be printed"),
    ],
)
def test_what_are_no_requirements(raw: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        parse_requirements(raw)


def test_members_of_a_newer_version_are_ignored() -> None:
    assert parse_requirements(changed(colour="red")) == NEEDS


@given(st.binary(max_size=200))
def test_any_bytes_are_requirements_or_refused(noise: bytes) -> None:
    for parse in (parse_requirements, parse_answer):
        try:
            parse(noise)
        except RemoteProtocolError:
            continue
