"""Metrics: what stands in them, that the formats are right, and who gets an answer at the door."""

from __future__ import annotations

import asyncio
import grp
import io
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio
import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import parser as plain_text
from prometheus_client.openmetrics import parser as openmetrics

from migrated.daemon.config import load_config
from migrated.daemon.metrics import ROWS, Kind, Sources, build_registry
from migrated.daemon.metrics_server import (
    HEAD_MAX_BYTES,
    MAX_CONNECTIONS,
    MetricsServer,
    answer,
    open_metrics,
    serve_metrics,
)
from migrated.migration.history import History
from migrated.migration.host import Host
from migrated.migration.ownership import Ownership
from migrated.migration.progress import Progress
from migrated.model.faults import FaultFigures
from migrated.model.history import Direction, Moved
from migrated.model.stats import RamStats
from migrated.savevm.iothread_lock import IothreadLock
from migrated.transport.address import TcpAddress, UnixAddress
from migrated.transport.listen import parse_allow
from migrated.transport.trust import Trust
from tests.support.fake_services import FakeBlock, FakeMachine

LOOPBACK = TcpAddress("127.0.0.1", 0)
SEEN = ("name", "uuid", "machine_type", "run_state", "ram_blocks")
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


class NoRecord:
    """RecordStore of a host on which nothing has ever happened."""

    def read(self) -> dict[str, Any] | None:
        return None

    async def write(self, record: dict[str, Any]) -> None:
        raise NotImplementedError


def make_sources(name: str = "kv") -> Sources:
    progress = Progress(time.monotonic)
    certificate = SimpleNamespace(not_after=SimpleNamespace(timestamp=lambda: 1_764_180_085.0))
    credentials = SimpleNamespace(certificates={"ca-cert.pem": certificate})
    return Sources(
        tool="migrated 1.2.3",
        machine=FakeMachine(name, blocks=[FakeBlock("a", 4096), FakeBlock("b", 8192)]),
        workloads=lambda: 2,
        ownership=Ownership(NoRecord()),
        lock=IothreadLock(),
        history=History(cast(Host, None), cast(Any, None), progress, Progress(time.monotonic), cast(Any, None)),
        outgoing=progress,
        downtime_limit_ms=lambda: 300,
        trust=lambda: Trust(cast(Any, credentials)),
    )


@pytest.fixture
def sources() -> Sources:
    return make_sources()


def values(registry: CollectorRegistry) -> dict[str, float]:
    """Return every sample as it is written: name{labels} -> value."""
    lines = generate_latest(registry).decode().splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line and not line.startswith("#")
    }


# -- figures -------------------------------------------------------------------------------------------------------


def test_what_the_machine_is(sources: Sources) -> None:
    found = values(build_registry(sources))
    assert found['migrated_build_info{version="1.2.3"}'] == 1
    assert found['migrated_machine_info{machine="kv",type="none",uuid=""}'] == 1
    assert found["migrated_ram_bytes"] == 12288
    assert found["migrated_workloads"] == 2
    assert found['migrated_machine_run_state{state="running"}'] == 1
    assert found['migrated_ownership_record{record="none"}'] == 1
    assert found["migrated_ownership_epoch"] == 0
    assert found['migrated_migration_status{direction="outgoing",status="none"}'] == 1
    assert found['migrated_certificate_expiry_timestamp_seconds{file="ca-cert.pem"}'] == 1_764_180_085
    for name, one_of in (("machine_run_state", "state"), ("ownership_record", "record")):
        assert sum(value for key, value in found.items() if key.startswith(f"migrated_{name}{{{one_of}=")) == 1
    assert "process_resident_memory_bytes" in found


def test_what_has_not_happened_is_0_or_not_there(sources: Sources) -> None:
    found = values(build_registry(sources))
    assert found['migrated_migrations_total{direction="incoming",result="failed"}'] == 0
    assert found['migrated_migration_sent_bytes_total{phase="postcopy"}'] == 0
    assert found["migrated_migration_remaining_bytes"] == 0
    assert found['migrated_postcopy_fault_seconds_count{answered="remote"}'] == 0
    assert not any("last_migration" in name for name in found)


def test_what_has_happened_adds_up(sources: Sources) -> None:
    tally, stats = sources.history.tally, RamStats(precopy_bytes=1, downtime_bytes=2, postcopy_bytes=3, transferred=6)
    for _ in range(2):
        tally.ended(Direction.OUTGOING, "completed")
        tally.add(Direction.OUTGOING, stats)
    tally.add(Direction.INCOMING, stats)
    tally.last_moved = Moved(1000.5, 2.5, 0.25, {"stop": 0.05, "ram": 0.2})
    found = values(build_registry(sources))
    assert found['migrated_migrations_total{direction="outgoing",result="completed"}'] == 2
    assert [found[f'migrated_migration_sent_bytes_total{{phase="{one}"}}'] for one in ("precopy", "downtime")] == [2, 4]
    assert found["migrated_migration_received_bytes_total"] == 6
    assert found["migrated_last_migration_timestamp_seconds"] == 1000.5
    assert found["migrated_last_migration_duration_seconds"] == 2.5
    assert found["migrated_last_migration_downtime_seconds"] == 0.25
    assert found['migrated_last_migration_downtime_part_seconds{part="ram"}'] == 0.2


def test_histograms_are_cumulative_and_have_a_sum(sources: Sources) -> None:
    figures = FaultFigures()
    for seconds in (0.000_003, 0.000_100, 0.010, 30.0):
        figures.remote.add(seconds)
    sources.history.tally.add_faults(figures)
    sources.lock.holds_by_ms[1], sources.lock.holds_by_ms[4], sources.lock.held_ms = 3, 1, 5000.0
    found = values(build_registry(sources))
    name = "migrated_postcopy_fault_seconds"
    buckets = {
        key.partition('le="')[2].rstrip('"}'): value
        for key, value in found.items()
        if key.startswith(f'{name}_bucket{{answered="remote"')
    }
    assert list(buckets.values()) == sorted(buckets.values())
    assert (buckets["4e-06"], buckets["0.000256"], buckets["0.016384"], buckets["+Inf"]) == (1, 2, 3, 4)
    assert found[f'{name}_sum{{answered="remote"}}'] == pytest.approx(30.010103)
    lock = "migrated_iothread_lock_hold_seconds"
    assert [found[f'{lock}_bucket{{le="{bound}"}}'] for bound in ("0.001", "0.01", "1.0", "+Inf")] == [0, 3, 3, 4]
    assert found[f"{lock}_sum"] == 5


def test_two_daemons_of_one_process_have_nothing_in_common() -> None:
    one, other = (values(build_registry(make_sources(name))) for name in ("one", "other"))
    assert {key for key in one if "machine_info" in key} == {'migrated_machine_info{machine="one",type="none",uuid=""}'}
    assert {key for key in other if "machine_info" in key} == {
        'migrated_machine_info{machine="other",type="none",uuid=""}'
    }


def test_names_end_in_units_and_counters_in_total() -> None:
    for row in ROWS:
        assert row.name.endswith("_total") is (row.kind is Kind.COUNTER), row.name
        assert row.name.endswith("_info") is (row.kind is Kind.INFO), row.name
        assert row.kind is not Kind.HISTOGRAM or row.name.endswith("_seconds"), row.name
        assert not {"ms", "us", "mib", "percent"} & set(row.name.split("_")), row.name


def test_both_formats_can_be_read(sources: Sources) -> None:
    registry = build_registry(sources)
    plain = answer(GET[:-4], registry).partition(b"\r\n\r\n")[2].decode()
    names = {family.name for family in plain_text.text_fd_to_metric_families(io.StringIO(plain))}
    asked = b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0"
    parse: Callable[[str], Iterable[Any]] = openmetrics.text_string_to_metric_families
    head, _, body = answer(asked, registry).partition(b"\r\n\r\n")
    assert b"Content-Type: application/openmetrics-text; version=" in head
    families = {family.name for family in parse(body.decode())}
    for row in ROWS:
        assert {row.name, row.name.removesuffix("_total"), row.name.removesuffix("_info")} & names, row.name
        assert {row.name, row.name.removesuffix("_total"), row.name.removesuffix("_info")} & families, row.name


# -- the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /metrics HTTP/1.1", 200),
        ("GET /metrics?name=x HTTP/1.0", 200),
        ("HEAD /metrics HTTP/1.1", 200),
        ("GET / HTTP/1.1", 404),
        ("POST /metrics HTTP/1.1", 405),
        ("get /metrics HTTP/1.1", 400),
        ("GET /metrics HTTP/2", 400),
        ("GET  HTTP/1.1", 400),
        ("", 400),
        ("\x16\x03\x01\x02", 400),
    ],
)
def test_requests(sources: Sources, request_line: str, status: int) -> None:
    head, _, body = answer(request_line.encode(), build_registry(sources)).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert (b"Allow: GET, HEAD" in head) is (status == 405)
    assert bool(body) is not request_line.startswith("HEAD")


@pytest.mark.parametrize(
    "accept",
    [
        "*/*",
        "application/openmetrics-text;version=odd",
        "application/openmetrics-text;version=1.0.0;q=x",
        ",,;",
        "a;" * 500,
    ],
)
def test_whatever_is_accepted_there_is_an_answer(sources: Sources, accept: str) -> None:
    text = answer(f"GET /metrics HTTP/1.1\r\naccept:{accept}".encode(), build_registry(sources))
    assert text.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"migrated_ram_bytes" in text


async def ask(address: str, request: bytes = GET) -> bytes:
    """Return all that comes back."""
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        await writer.drain()
        return await reader.read()
    finally:
        writer.close()


@pytest_asyncio.fixture
async def server(sources: Sources) -> AsyncIterator[MetricsServer]:
    registry = build_registry(sources)
    made = await serve_metrics(LOOPBACK, registry, [], structlog.get_logger(), mode=0o660, group=None)
    yield made
    await made.close()
    await made.close()


async def test_get_by_tcp(server: MetricsServer) -> None:
    for _ in range(2):
        text = await ask(server.addresses[0])
        head, _, body = text.partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        assert b"migrated_ram_bytes 12288.0\n" in body


async def test_a_request_that_comes_in_pieces_with_more_behind_it(server: MetricsServer) -> None:
    reader, writer = await asyncio.open_connection(*server.addresses[0].split(":"))
    for at in range(len(GET)):
        writer.write(GET[at : at + 1])
        await writer.drain()
    writer.write(b"x" * 100_000)
    assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
    writer.close()


async def test_a_request_without_an_end_is_refused(server: MetricsServer) -> None:
    assert (await ask(server.addresses[0], b"GET /metrics HTTP/1.1\r\n" + b"a" * HEAD_MAX_BYTES)).startswith(
        b"HTTP/1.1 431 "
    )


async def test_by_a_unix_socket_which_goes_away_again(sources: Sources, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    address = UnixAddress(str(path))
    server = await serve_metrics(address, build_registry(sources), [], structlog.get_logger(), mode=0o600, group=None)
    assert server.addresses == [f"unix:{path}"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"migrated_ram_bytes" in await ask(f"unix:{path}")
    await server.close()
    assert not path.exists()


@pytest.mark.parametrize(
    ("control", "mode"), [("mode = '0640'", 0o640), ("mode = '0666'\nread-only-group = '{}'", 0o660)]
)
async def test_a_unix_socket_is_for_those_who_may_ask(tmp_path: Path, control: str, mode: int) -> None:
    """The control socket of a read-only group is open for everybody, because it asks who connects."""
    config, path = tmp_path / "kv.toml", tmp_path / "metrics.sock"
    control = control.format(grp.getgrgid(os.getegid()).gr_name)
    config.write_text(f"[control]\n{control}\n[metrics]\nlisten = 'unix:{path}'\n")
    made = make_sources()
    host = SimpleNamespace(
        site=SimpleNamespace(tool=made.tool), ownership=made.ownership, lock=made.lock, log=structlog.get_logger()
    )
    machine = cast(Any, SimpleNamespace(workloads={}, **{name: getattr(made.machine, name) for name in SEEN}))
    server = await open_metrics(load_config(config), cast(Host, host), machine, made.history, made.outgoing, made.trust)
    assert path.stat().st_mode & 0o777 == mode
    assert b"migrated_workloads 0.0" in await ask(f"unix:{path}")
    await server.close()


async def test_only_who_is_allowed(sources: Sources) -> None:
    for allow, heard in (["10.0.0.0/8"], False), (["127.0.0.0/8"], True):
        server = await serve_metrics(
            LOOPBACK, build_registry(sources), parse_allow(allow), structlog.get_logger(), mode=0o660, group=None
        )
        with structlog.testing.capture_logs() as lines:
            try:
                assert bool(await ask(server.addresses[0])) is heard
            except ConnectionResetError:
                assert not heard
        await server.close()
        assert [line["event"] for line in lines] == ([] if heard else ["metrics_refused"])


async def test_who_says_nothing_is_sent_away_and_keeps_only_some_places(sources: Sources) -> None:
    server = await serve_metrics(
        LOOPBACK, build_registry(sources), [], structlog.get_logger(), mode=0o660, group=None, deadline_s=0.2
    )
    host, _, port = server.addresses[0].rpartition(":")
    idle = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_CONNECTIONS)]
    with socket.create_connection((host, int(port))) as late:
        late.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(late, 1) == b""
    for reader, writer in idle:
        assert await reader.read() == b""
        writer.close()
    assert (await ask(server.addresses[0])).startswith(b"HTTP/1.1 200 OK")
    await server.close()


async def test_a_figure_that_cannot_be_had_ends_one_answer_only(sources: Sources) -> None:
    machine = cast(FakeMachine, sources.machine)
    server = await serve_metrics(LOOPBACK, build_registry(sources), [], structlog.get_logger(), mode=0o660, group=None)
    blocks, machine.blocks = machine.blocks, cast(Any, None)
    with structlog.testing.capture_logs() as lines:
        assert await ask(server.addresses[0]) == b""
    assert [line["event"] for line in lines] == ["metrics_bug"]
    machine.blocks = blocks
    assert (await ask(server.addresses[0])).startswith(b"HTTP/1.1 200 OK")
    await server.close()
