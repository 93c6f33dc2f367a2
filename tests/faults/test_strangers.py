"""Whoever does not prove who he is costs next to nothing, and keeps nobody out."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from migrated.transport.door import MAX_STRANGERS
from tests.support.following import wait_until
from tests.support.holding_site import HoldingSite
from tests.support.keys import Keys, tls
from tests.support.visit import Visit

BLOCKS = {"heap": 1 << 20}
#: A hundred strangers' worth of OpenSSL's state would be far beyond what so many at a time cost.
GROWTH_MAX_BYTES = 16 << 20
FLOOD = 150
#: What a TLS client says first: a record head that promises more than ever comes.
HALF_A_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def target(tmp_path: Path, keys: Keys) -> Iterator[HoldingSite]:
    with HoldingSite("target", tmp_path, blocks=BLOCKS, config=tls(keys.host("target", replace=True))) as site:
        yield site


def takes_a_machine(target: HoldingSite, tmp_path: Path, keys: Keys) -> None:
    config = tls(keys.host("source", replace=True))
    with HoldingSite("source", tmp_path, blocks=BLOCKS, incoming=None, config=config) as source:
        source.poke("heap", 0, b"through the crowd")
        source.migrate(target.address)
        wait_until(lambda: target.run_state() == "running", "it runs")
        assert target.peek("heap").startswith(b"through the crowd")


@pytest.mark.row(21)
def test_a_crowd_that_says_little_keeps_nobody_out(target: HoldingSite, tmp_path: Path, keys: Keys) -> None:
    before, idle = target.private_bytes(), target.descriptors()
    with ExitStack() as stack:
        for number in range(FLOOD):
            stack.enter_context(Visit(target.port)).say(HALF_A_HELLO if number % 2 else b"")
        wait_until(lambda: len(target.descriptors()) <= len(idle) + MAX_STRANGERS, "the oldest had to go")
        assert "status" not in target.query(), "nobody of them has begun a migration"
        assert target.private_bytes() < before + GROWTH_MAX_BYTES
        takes_a_machine(target, tmp_path, keys)
        assert target.run_state() == "running"


def test_a_flood_of_handshakes_without_a_certificate(target: HoldingSite, tmp_path: Path, keys: Keys) -> None:
    context = ssl.create_default_context(cafile=str(keys.directory / "ca" / "ca-cert.pem"))
    context.check_hostname = False
    before, idle = target.private_bytes(), target.descriptors()
    for _ in range(FLOOD):
        with socket.create_connection(("127.0.0.1", target.port)) as sock:
            sock.settimeout(30)
            with suppress(OSError), context.wrap_socket(sock) as stranger:
                stranger.recv(1)
        assert target.run_state() == "inmigrate"
    wait_until(lambda: target.descriptors() == idle, "nothing is left of them")
    assert target.private_bytes() < before + GROWTH_MAX_BYTES
    takes_a_machine(target, tmp_path, keys)


def test_a_stranger_during_a_migration_is_no_second_channel(target: HoldingSite, tmp_path: Path, keys: Keys) -> None:
    """Another host, although its certificate is good, cannot bring the pages of somebody else's machine."""
    for name in ("postcopy-ram", "postcopy-preempt"):
        target.capability(name)
    config = tls(keys.host("source", replace=True))
    with HoldingSite("source", tmp_path, blocks=BLOCKS, incoming=None, config=config) as source:
        source.poke("heap", 0, b"mine")
        source.capability("postcopy-ram")
        source.parameter("max-bandwidth", 1 << 14)
        source.qmp.execute("migrate", {"uri": target.address})
        source.wait_status("active")
        other = keys.host("other", replace=True)
        context = ssl.create_default_context(cafile=str(other / "ca-cert.pem"))
        context.check_hostname = False
        context.load_cert_chain(other / "client-cert.pem", other / "client-key.pem")
        with socket.create_connection(("127.0.0.1", target.port)) as sock:
            sock.settimeout(30)
            with suppress(OSError), context.wrap_socket(sock) as stranger:
                assert stranger.recv(1) == b""
        assert "second_channel" not in target.log_path.read_text()
        source.parameter("max-bandwidth", 0)
        source.wait_status("completed")
        wait_until(lambda: target.run_state() == "running", "it runs")
        assert target.peek("heap").startswith(b"mine")
