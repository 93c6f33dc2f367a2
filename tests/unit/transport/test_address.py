"""Migration URIs: what QEMU takes is taken, what it refuses is refused in its words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import CommandError
from migrated.transport.address import (
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
    parse_address,
)


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("tcp:10.0.0.7:7400", TcpAddress("10.0.0.7", 7400)),
        ("tcp::0", TcpAddress("", 0)),
        ("tcp:0:4444", TcpAddress("0", 4444)),
        ("tcp:host.example:65535", TcpAddress("host.example", 65535)),
        ("tcp:[::1]:7400", TcpAddress("::1", 7400)),
        ("tcp:[fe80::1%eth0]:1", TcpAddress("fe80::1%eth0", 1)),
        ("tcp:h:1,ipv4=on,ipv6=off", TcpAddress("h", 1, ipv4=True, ipv6=False)),
        ("tcp:h:1,ipv6", TcpAddress("h", 1, ipv6=True)),
        ("tcp::5000,to=5010", TcpAddress("", 5000, to=5010)),
        ("unix:/run/x.sock", UnixAddress("/run/x.sock")),
        ("unix:/odd,name:1", UnixAddress("/odd,name:1")),
        ("fd:peer", FdAddress("peer")),
        ("fd:7", FdAddress("7")),
        ("exec:nc -l 1 | gzip -d", ExecAddress("nc -l 1 | gzip -d")),
        ("file:/tmp/a", FileAddress("/tmp/a")),
        ("file:/tmp/a,offset=4k", FileAddress("/tmp/a", 4096)),
        ("file:/tmp/a,offset=0x1000", FileAddress("/tmp/a", 4096)),
        ("file:/tmp/a,offset=010", FileAddress("/tmp/a", 10)),
        ("file:/tmp/a,offset=2G", FileAddress("/tmp/a", 2 << 30)),
        ("file:/odd,offset=1,offset=2", FileAddress("/odd,offset=1", 2)),
    ],
)
def test_what_qemu_takes(uri: str, address: Address) -> None:
    assert parse_address(uri) == address


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("", "unknown migration protocol: "),
        ("tcp", "unknown migration protocol: tcp"),
        ("rdma:h:1", "unknown migration protocol: rdma:h:1"),
        ("TCP:h:1", "unknown migration protocol: TCP:h:1"),
        ("unix:/a\0b", "unknown migration protocol: unix:/a\0b"),
        ("tcp:", "error parsing address ''"),
        ("tcp:h", "error parsing address 'h'"),
        ("tcp:h:", "error parsing address 'h:'"),
        ("tcp:h:port", "error parsing address 'h:port'"),
        ("tcp:h:65536", "error parsing address 'h:65536'"),
        ("tcp:h:-1", "error parsing address 'h:-1'"),
        ("tcp:::1:5", "error parsing address '::1:5'"),
        ("tcp:[]:5", "error parsing address '[]:5'"),
        ("tcp:h:1,keep", "error parsing address 'h:1,keep'"),
        ("tcp:h:1,ipv4=maybe", "error parsing address 'h:1,ipv4=maybe'"),
        ("tcp:h:9,to=8", "error parsing address 'h:9,to=8'"),
        ("tcp:h:9,to=x", "error parsing address 'h:9,to=x'"),
        ("tcp:h:1,ipv4=off,ipv6=off", "ipv4 and ipv6 cannot both be off"),
        ("unix:", "error parsing address 'unix:'"),
        ("fd:", "error parsing address 'fd:'"),
        ("exec: ", "error parsing address 'exec: '"),
        ("file:", "error parsing address 'file:'"),
        ("file:,offset=1", "error parsing address 'file:,offset=1'"),
        ("file:/a,offset=", "file URI has bad offset "),
        ("file:/a,offset=-1", "file URI has bad offset -1"),
        ("file:/a,offset=1x", "file URI has bad offset 1x"),
        ("file:/a,offset=8E", "file URI has bad offset 8E"),
        ("file:/a,offset=" + "9" * 5000, "file URI has bad offset " + "9" * 5000),
    ],
)
def test_what_qemu_refuses(uri: str, text: str) -> None:
    with pytest.raises(CommandError) as refused:
        parse_address(uri)
    assert str(refused.value) == text


@given(st.text() | st.from_regex(r"(tcp|unix|fd|exec|file):.*", fullmatch=True))
def test_any_text_is_an_address_or_a_refusal(uri: str) -> None:
    try:
        address = parse_address(uri)
    except CommandError:
        return
    assert str(address)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.5.5.5", True),
        ("::1", True),
        ("localhost", True),
        ("", False),
        ("0.0.0.0", False),
        ("10.0.0.7", False),
        ("::", False),
        ("localhost.example", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert TcpAddress(host, 1).is_loopback is loopback


def test_names_for_people() -> None:
    assert str(TcpAddress("::1", 5)) == "[::1]:5"
    assert str(TcpAddress("h", 5)) == "h:5"
    assert str(ExecAddress("cat")) == "exec:cat"
