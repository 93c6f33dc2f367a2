"""Every attach message there and back, every field refused where it is wrong."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire import attach
from migrated.wire.attach_fields import shown

ids = st.integers(0, attach.MAX_ID)
uint32 = st.integers(0, attach.MAX_UINT32)
names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=50)
errors = st.text(st.characters(exclude_categories=["Cs"]), max_size=1000)
priorities = st.integers(0, attach.MAX_PRIORITY)
sizes = st.integers(1, attach.MAX_BLOCK_BYTES)

FROM_WORKLOAD = st.one_of(
    st.builds(
        attach.Hello,
        version=st.integers(1, attach.MAX_UINT32),
        name=names,
        pause=st.sampled_from(attach.PAUSES),
        state=st.sampled_from(attach.CLIENT_STATES),
        fds=st.sampled_from([(), ("pagemap",), ("pagemap", "tracking"), attach.HELLO_FDS]),
        features=st.lists(names, max_size=3, unique=True).map(tuple),
    ),
    st.builds(attach.BlockRequest, id=ids, name=names, size=sizes, page_size=st.integers(1, 1 << 20)),
    st.builds(attach.MapRequest, id=ids, name=names, address=st.integers(0, attach.MAX_ADDRESS), size=sizes),
    st.builds(attach.DeviceRequest, id=ids, name=names, instance_id=uint32, version_id=uint32, priority=priorities),
    st.sampled_from([attach.Ready, attach.Standby, attach.Stopped, attach.Running, attach.Loaded]).flatmap(
        lambda cls: st.builds(cls, id=ids)
    ),
    st.builds(attach.Saved, id=ids, description=names),
    st.just(attach.Bye()),
    st.builds(attach.Failed, id=ids, error=errors),
)
FROM_DAEMON = st.one_of(
    st.builds(
        attach.Welcome, version=st.just(1), machine=names, state=st.sampled_from(attach.MACHINE_STATES), peer=names
    ),
    st.builds(attach.Refused, error=errors, again=st.booleans()),
    st.builds(attach.BlockAnswer, id=ids, exists=st.booleans(), size=sizes),
    st.builds(attach.Ok, id=ids),
    st.builds(attach.Error, id=ids, error=errors, again=st.booleans()),
    st.builds(attach.Stop, id=ids, deadline_ms=uint32),
    st.builds(attach.Cont, id=ids),
    st.builds(attach.Save, id=ids, device=names, instance_id=uint32),
    st.builds(
        attach.Load,
        id=ids,
        device=names,
        instance_id=uint32,
        version_id=uint32,
        size=st.integers(0, attach.MAX_STATE_BYTES),
    ),
    st.builds(attach.Throttle, percent=st.integers(0, 99)),
    st.builds(attach.Moved, peer=names),
)


@given(FROM_WORKLOAD)
def test_workload_messages_come_back_as_they_were(message: attach.FromWorkload) -> None:
    assert attach.parse_from_workload(attach.encode_message(message)) == message


@given(FROM_DAEMON)
def test_daemon_messages_come_back_as_they_were(message: attach.FromDaemon) -> None:
    assert attach.parse_from_daemon(attach.encode_message(message)) == message


@pytest.mark.parametrize("character", ['"', "\\", "ü", "a"])
def test_a_description_fits_a_message_whatever_is_in_it(character: str) -> None:
    text = character * (attach.MAX_DESCRIPTION_BYTES // len(character.encode()))
    saved = attach.Saved(attach.MAX_ID, text)
    packet = attach.encode_message(saved)
    assert len(packet) <= attach.MAX_MESSAGE_BYTES
    assert attach.parse_from_workload(packet) == saved


def test_an_older_client_says_nothing_of_what_came_later() -> None:
    assert attach.parse_from_workload(b'{"type":"saved","id":1}') == attach.Saved(1, "")
    device = attach.parse_from_workload(b'{"type":"device","id":1,"name":"cpu"}')
    assert device == attach.DeviceRequest(1, "cpu", 0, 1, 0)


def test_the_strategies_cover_every_message() -> None:
    assert len(attach.FROM_WORKLOAD) == 12
    assert len(attach.FROM_DAEMON) == 11


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(FROM_WORKLOAD | FROM_DAEMON, st.data(), json_values)
def test_one_wrong_field_is_refused_by_name_or_is_still_right(
    message: attach.FromWorkload | attach.FromDaemon, data: st.DataObject, value: Any
) -> None:
    content = json.loads(attach.encode_message(message))
    victim = data.draw(st.sampled_from(sorted(content)))
    content[victim] = value
    parse = attach.parse_from_workload if type(message) in attach.FROM_WORKLOAD.values() else attach.parse_from_daemon
    refusal = None
    try:
        parse(json.dumps(content).encode())
    except RemoteProtocolError as error:
        refusal = error
    if refusal is not None:
        assert f"field '{victim}'" in refusal.what
        assert refusal.expected
        assert refusal.found
        assert refusal.section == "attach"


@given(st.binary(max_size=300))
def test_any_bytes_give_a_message_or_a_refusal(packet: bytes) -> None:
    for parse in (attach.parse_from_workload, attach.parse_from_daemon):
        with pytest.raises(RemoteProtocolError):
            parse(packet)


@pytest.mark.parametrize(
    ("packet", "found"),
    [
        (b"", "b''"),
        (b"[]", "a JSON list of 0"),
        (b"7", "7"),
        (b"[" * 60000, "[["),
        (b'{"type":"ready","id":' + b"9" * 5000 + b"}", "b'{"),
        (b" " * (attach.MAX_MESSAGE_BYTES + 1), f"{attach.MAX_MESSAGE_BYTES + 1} bytes"),
        (b"{}", "no such field"),
        (b'{"type":"nonsense"}', "'nonsense'"),
        (b'{"type":["ready"]}', "a JSON list of 1"),
        (b'{"type":"welcome"}', "'welcome'"),
    ],
)
def test_what_is_no_message_is_refused(packet: bytes, found: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        attach.parse_from_workload(packet)
    assert found in caught.value.found


@pytest.mark.parametrize(
    ("content", "field", "found"),
    [
        ({"type": "ready"}, "id", "no such field"),
        ({"type": "ready", "id": None}, "id", "None"),
        ({"type": "ready", "id": True}, "id", "True"),
        ({"type": "ready", "id": 1.0}, "id", "1.0"),
        ({"type": "ready", "id": "1"}, "id", "'1'"),
        ({"type": "ready", "id": -1}, "id", "-1"),
        ({"type": "ready", "id": 1 << 300}, "id", "an integer of 301 bits"),
        ({"type": "device", "id": 1, "name": ""}, "name", "''"),
        ({"type": "device", "id": 1, "name": "a" * 256}, "name", "'aaa"),
        ({"type": "device", "id": 1, "name": "ä" * 128}, "name", "'ää"),
        ({"type": "device", "id": 1, "name": "a\nb"}, "name", r"'a\nb'"),
        ({"type": "device", "id": 1, "name": "\ud800"}, "name", r"'\ud800'"),
        ({"type": "block", "id": 1, "name": "a", "size": (1 << 46) + 1}, "size", "70368744177665"),
        ({"type": "error", "id": 1, "error": "x" * 5000}, "error", "'xxx"),
    ],
)
def test_a_wrong_field_says_what_was_found(content: dict[str, Any], field: str, found: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        attach.parse_from_workload(json.dumps(content).encode())
    assert f"field '{field}'" in caught.value.what
    assert caught.value.found.startswith(found)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("fds", ["pagemap", ["pagemap", "pagemap"], ["x"] * 17, [1], {"pagemap": 1}])
def test_lists_of_names_are_checked(fds: Any) -> None:
    hello = {"type": "hello", "version": 1, "name": "a", "pause": "signal", "state": "fresh", "fds": fds}
    with pytest.raises(RemoteProtocolError, match="field 'fds'"):
        attach.parse_from_workload(json.dumps(hello).encode())


def test_unknown_fields_are_ignored_and_absent_ones_have_their_default() -> None:
    message = attach.parse_from_workload(b'{"type":"device","id":1,"name":"cpu","colour":{"a":[1]}}')
    assert message == attach.DeviceRequest(1, "cpu", 0, 1)


def test_our_own_wrong_messages_are_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match=r"field 'percent'.*from 0 to 99, found 100"):
        attach.encode_message(attach.Throttle(100))


def test_every_message_fits_a_packet() -> None:
    worst = attach.Error(attach.MAX_ID, "\x01" * attach.MAX_ERROR_BYTES)
    assert len(attach.encode_message(worst)) <= attach.MAX_MESSAGE_BYTES
    assert all(item.metadata["check"].expected for cls in attach.FROM_DAEMON.values() for item in fields(cls))


@given(st.text(), st.integers(1, 50))
def test_texts_and_names_are_cut_to_what_may_be_sent(text: str, limit: int) -> None:
    assert len(attach.cut_text(text, limit).encode()) <= limit
    attach.encode_message(attach.Failed(1, attach.cut_text(text)))
    attach.encode_message(attach.DeviceRequest(1, attach.cut_name(text)))


def test_shown_never_grows() -> None:
    assert len(shown("x" * 10_000)) <= 80
    assert len(shown("\x00" * 60)) == 80
