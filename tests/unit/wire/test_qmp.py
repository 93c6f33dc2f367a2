"""QMP framing: what arrives in any pieces comes out as the same values, and nothing makes it grow or stop."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.wire import qmp
from migrated.wire.qmp import ABSENT, JsonStream, Malformed, Message

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def whole(data: bytes) -> list[Message | Malformed]:
    return JsonStream().feed(data)


def byte_by_byte(data: bytes) -> list[Message | Malformed]:
    stream = JsonStream()
    return [event for i in range(len(data)) for event in stream.feed(data[i : i + 1])]


def values(data: bytes) -> list[object]:
    events = whole(data)
    assert all(isinstance(event, Message) for event in events), events
    return [event.value for event in events if isinstance(event, Message)]


def only_error(data: bytes) -> str:
    (event,) = whole(data)
    assert isinstance(event, Malformed)
    assert byte_by_byte(data) == [event]
    return event.desc


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"execute": "stop"}\n', [{"execute": "stop"}]),
        (b'{"execute":"stop"}', [{"execute": "stop"}]),  # the bracket ends it, not a newline
        (b'{"a":1}{"b":2} {"c":3}\r\n\r\n', [{"a": 1}, {"b": 2}, {"c": 3}]),
        (b'{"a":\n {"b":\r\n\t[1,2,{"c":[]}]}}', [{"a": {"b": [1, 2, {"c": []}]}}]),
        (b'{"a":"}]{[,:\'"}', [{"a": "}]{[,:'"}]),
        (b'{"a":"\\"}\\\\"}', [{"a": '"}\\'}]),
        (b"{'a':'b'}", [{"a": "b"}]),
        (b"{'it\\'s':'say \"hi\" \\\\'}", [{"it's": 'say "hi" \\'}]),
        (b"{\"it\\'s\":'\"'}", [{"it's": '"'}]),
        (b"{'a':'\\\"'}", [{"a": '"'}]),
        (b"'x' \"y\"", ["x", "y"]),
        (b"3 null true\n-1.5e3[]", [3, None, True, -1500.0, []]),
        (b'{"a":"\\u00e9\\ud83d\\ude00"}', [{"a": "é😀"}]),
        ('{"a":"é😀"}'.encode(), [{"a": "é😀"}]),
        (b"", []),
        (b" \t\r\n", []),
        (b'{"a":123456789012345678901234}', [{"a": 123456789012345678901234}]),
    ],
)
def test_values(data: bytes, expected: list[object]) -> None:
    assert values(data) == expected
    assert byte_by_byte(data) == [Message(value) for value in expected]


@pytest.mark.parametrize(
    ("data", "desc"),
    [
        (b"hello world, nice {day}\n", "JSON parse error, expecting value"),
        (b"}\n", "JSON parse error, expecting value"),
        (b"{]\n", "JSON parse error, expecting value"),
        (b"[}\n", "JSON parse error, expecting value"),
        (b"@ @ @\n", "JSON parse error, expecting value"),
        (b"\xff", "JSON parse error, stray byte 0xFF"),
        (b"\x04", "JSON parse error, stray byte 0x04"),
        (b'{"a":\x01\n', "JSON parse error, stray byte 0x01"),
        (b'{"a\n', "JSON parse error, stray byte 0x0A"),
        (b'{"a\\\n', "JSON parse error, stray byte 0x0A"),
        (b'{"a\\\xff', "JSON parse error, stray byte 0xFF"),
        (b'{"a\tb":1}\n', "JSON parse error, stray byte 0x09"),
        (b'{"a":1,}', "JSON parse error, expecting property name enclosed in double quotes"),
        (b'{"a" 1}', "JSON parse error, expecting ':' delimiter"),
        (b'{"a":1 "b":2}', "JSON parse error, expecting ',' delimiter"),
        (b'{"a":nope}', "JSON parse error, expecting value"),
        (b'{"a":1,"a":2}', "JSON parse error, duplicate key"),
        (b'{"a":NaN}', "JSON parse error, invalid keyword 'NaN'"),
        (b'{"a":1e999}', "JSON parse error, number out of range"),
        (b'{"a":01}', "JSON parse error, expecting ',' delimiter"),
        (b'{"a":"\xc3("}', "JSON parse error, invalid UTF-8 sequence in string"),
        (b'{"a":"\\q"}', "JSON parse error, invalid \\escape"),
        (b'{"a":["\\ud800"]}', "JSON parse error, invalid Unicode escape in string"),
        (b'{"a\\u0000":1}', "JSON parse error, invalid Unicode escape in string"),
    ],
)
def test_garbage_is_one_error(data: bytes, desc: str) -> None:
    assert only_error(data).startswith(desc)


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello {\n",
        b"}}}}\n",
        b'{"a":[}]\n',
        b'{"unterminated\n',
        b"\xff",  # how a client asks for a fresh parser
        b'{"a":[[["half a command\x04',
        b"[" * (qmp.MAX_DEPTH + 1) + b'"]}\n',
        b'{"a":1,}',  # brackets closed: nothing to resynchronise
    ],
)
def test_the_next_command_after_garbage_is_understood(garbage: bytes) -> None:
    events = whole(garbage + b'{"execute":"stop"}')
    assert [type(event) for event in events] == [Malformed, Message]
    assert byte_by_byte(garbage + b'{"execute":"stop"}') == events


def test_depth_limit_is_exact() -> None:
    deepest = b"[" * qmp.MAX_DEPTH + b"]" * qmp.MAX_DEPTH
    (event,) = whole(deepest)
    assert isinstance(event, Message)
    assert json.loads(qmp.encode_return({}, event.value))["id"] == json.loads(deepest)
    assert only_error(b"[" + deepest + b"]\n") == "JSON nesting depth limit exceeded"


def test_size_limit_is_exact_and_bounds_memory() -> None:
    longest = b'"' + b"x" * (qmp.MAX_MESSAGE_BYTES - 2) + b'"'
    assert values(longest) == ["x" * (qmp.MAX_MESSAGE_BYTES - 2)]
    stream = JsonStream()
    events = []
    for _ in range(64):
        events += stream.feed(b'{"a' + b"x" * 65536)
        assert stream.pending_bytes <= qmp.MAX_MESSAGE_BYTES
    assert events == [Malformed("JSON token size limit exceeded")]
    assert stream.feed(b'\n{"a":1}') == [Message({"a": 1})]


def cpu_cost(data: bytes, piece_bytes: int) -> float:
    """Seconds of this process to feed data in pieces: the best of three, for neighbours must not count."""

    def once() -> float:
        stream = JsonStream()
        started = time.process_time()
        for i in range(0, len(data), piece_bytes):
            stream.feed(data[i : i + piece_bytes])
        return time.process_time() - started

    return min(once() for _ in range(3))


@pytest.mark.parametrize("piece", [b"[],", b'"",', b"1,"])
def test_token_limit_bounds_the_cost_of_one_value(piece: bytes) -> None:
    limit = qmp.MAX_MESSAGE_BYTES // qmp.BYTES_PER_TOKEN
    assert len(values(b"[" + piece * (limit // 3 - 2) + b"0]")) == 1
    assert only_error(b"[" + piece * limit + b"0]\n") == "JSON token count limit exceeded"


@pytest.mark.parametrize("piece_bytes", [1, 4096])
@pytest.mark.parametrize("piece", [b'"a\\\\', b"[[],", b"'\\'", b"\xff\n", b"x ", b"{", b"\\", b"   ", b'"xxxx'])
def test_time_is_linear(piece: bytes, piece_bytes: int) -> None:
    small = b"[" + piece * ((1 << 14) // len(piece))
    # Sixteen times the bytes: sixteen times the cost where it is linear, 256 times where it is quadratic.
    assert cpu_cost(small * 16, piece_bytes) < 64 * cpu_cost(small, piece_bytes) + 0.01


@given(st.lists(st.tuples(VALUES, st.sampled_from(["\n", "\r\n", " "])), max_size=5), st.data())
def test_any_cut_gives_the_same_values(pairs: list[tuple[object, str]], data: st.DataObject) -> None:
    clean = [(value, end) for value, end in pairs if "\\u0000" not in json.dumps(value)]
    text = "".join(json.dumps(value, ensure_ascii=False) + end for value, end in clean).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    stream = JsonStream()
    events = [event for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for event in stream.feed(text[a:b])]
    assert events == [Message(value) for value, _ in clean]
    assert stream.pending_bytes == 0


SCRAPS = st.lists(
    st.sampled_from([bytes([i]) for i in b"{}[]\"'\\:,x1 \n\t\x00\xff"] + [b'{"a":1}', b"null", b"\\u0000", b"\xc3"])
)


@given(st.binary(max_size=300) | SCRAPS.map(b"".join), st.data())
def test_any_bytes_give_values_or_errors_whatever_the_cuts(raw: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(raw)))
    stream, limited = JsonStream(), JsonStream(max_bytes=64)
    events = stream.feed(raw[:cut]) + stream.feed(raw[cut:])
    assert events == whole(raw) == byte_by_byte(raw)
    assert len(events) <= len(raw)
    assert stream.pending_bytes <= len(raw)
    assert limited.feed(raw[:cut]) + limited.feed(raw[cut:]) == JsonStream(max_bytes=64).feed(raw)
    assert limited.pending_bytes <= 64
    for event in events:
        if isinstance(event, Message):  # whatever was accepted can be echoed as an id
            assert json.loads(qmp.encode_return({}, event.value)) == {"return": {}, "id": event.value}
    assert stream.feed(b'\n\xff{"fresh":true}')[-1] == Message({"fresh": True})


def test_lines_written() -> None:
    version = {"qemu": {"major": 7}, "package": "x"}
    assert qmp.encode_greeting(version) == (
        b'{"QMP": {"version": {"qemu": {"major": 7}, "package": "x"}, "capabilities": []}}\r\n'
    )
    assert qmp.encode_return({}) == b'{"return": {}}\r\n'
    assert qmp.encode_return([], None) == b'{"return": [], "id": null}\r\n'
    assert qmp.encode_error("GenericError", "no 'é'", 1) == (
        b'{"error": {"class": "GenericError", "desc": "no \'\\u00e9\'"}, "id": 1}\r\n'
    )
    assert qmp.encode_event("STOP", {}, 1_000_002) == (
        b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\r\n'
    )
    assert json.loads(qmp.encode_event("MIGRATION", {"status": "setup"}, 0))["data"] == {"status": "setup"}
    assert qmp.encode_command("stop", {}, ABSENT) == b'{"execute": "stop"}\r\n'
    assert qmp.encode_command("closefd", {"fdname": "a"}, "7") == (
        b'{"execute": "closefd", "arguments": {"fdname": "a"}, "id": "7"}\r\n'
    )


def test_what_is_not_json_is_never_written() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        qmp.encode_return({"eta": float("inf")})
