"""Every lie a workload can tell, and what it is told in return. The liar is the test process itself."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.errors import CommandError
from migrated.kernel import memory, userfault
from migrated.kernel.huge_pages import HUGE_PAGE_SIZE
from migrated.kernel.memory import PAGE_SIZE
from migrated.machine.attach import MAX_WORKLOADS, AttachServer
from migrated.machine.declarations import MAX_BLOCKS, MAX_DEVICES
from migrated.model.runstate import RunState
from migrated.wire.attach import MAX_MESSAGE_BYTES
from tests.support.attached import RawClient, Site, raw_client, workload
from tests.support.open_paths import let_others_in

SIZE = 16 * PAGE_SIZE


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with Site(tmp_path) as found:
        yield found


@pytest.fixture
async def raw(site: Site) -> AsyncIterator[RawClient]:
    """A client that has not said hello."""
    async with raw_client(site) as client:
        yield client


@pytest.fixture
async def attached(raw: RawClient) -> RawClient:
    """A client that is let in, without any descriptors."""
    assert (await raw.hello())["type"] == "welcome"
    return raw


@pytest.fixture
def tracking() -> Iterator[int]:
    fd = userfault.open_userfaultfd(userfault.FEATURES_TRACKING)
    yield fd
    os.close(fd)


@pytest.fixture
def sync() -> Iterator[int]:
    fd = userfault.open_userfaultfd(userfault.FEATURES_SYNC)
    yield fd
    os.close(fd)


@pytest.fixture
def pagemap() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    yield fd
    os.close(fd)


class Block:
    """A memfd and its mapping, as an honest client has them."""

    def __init__(self, size: int = SIZE) -> None:
        self.memfd = memory.create_memfd("block", size)
        self.mapping = memory.Mapping(self.memfd, size)
        self.address = self.mapping.address

    def close(self) -> None:
        self.mapping.close()
        os.close(self.memfd)


@pytest.fixture
def block() -> Iterator[Block]:
    found = Block()
    yield found
    found.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def closed_with(client: RawClient, answer: dict[str, Any]) -> str:
    """Check that the connection ended with a refusal; return its text."""
    assert answer["type"] == "refused", answer
    assert await client.receive() == {}
    return str(answer["error"])


def request_map(block: Block, **fields: Any) -> dict[str, Any]:
    return {"type": "map", "id": 2, "name": "heap", "address": block.address, "size": SIZE, **fields}


async def offer(client: RawClient, **fields: Any) -> dict[str, Any]:
    return await client.ask({"type": "block", "id": 1, "name": "heap", "size": SIZE, "page_size": PAGE_SIZE, **fields})


# -- who -----------------------------------------------------------------------------------------------------------

AS_NOBODY = """
import os
gid, groups = json.loads(sys.argv[1])
os.setgroups(groups); os.setgid(gid); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: changing the user took /proc/self away
try:
    with attach(name="nobody", timeout_s=0) as machine:
        machine.ram("heap", 8 << 12)
        machine.ready()
        say("in")
        hear()
except AttachError as error:
    say(str(error))
"""
PRELUDE = """
import ctypes, json, sys
from migrated.client import *
say = lambda value: print(json.dumps(value), flush=True)
hear = sys.stdin.readline
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


@needs_root
@pytest.mark.parametrize(
    ("options", "gid", "groups", "let_in"),
    [
        ({}, 65534, [], False),
        ({"group": "daemon"}, 65534, [], False),
        ({"group": "daemon"}, 1, [], True),
        ({"group": "daemon"}, 65534, [1], True),
    ],
)
async def test_peer_credentials_decide(
    tmp_path: Path, options: dict[str, Any], gid: int, groups: list[int], let_in: bool
) -> None:
    let_others_in(tmp_path)
    site = Site(tmp_path)
    await site.open(mode=0o666, **options)
    try:
        async with workload(site, AS_NOBODY, json.dumps([gid, groups]), prelude=PRELUDE) as process:
            found = await process.said()
        if let_in:
            assert found == "in"
        else:
            assert "you may not attach to this machine, expected uid 0" in found
            assert "found uid 65534" in found
    finally:
        assert site.server is not None
        await site.server.close()
        site.machine.close()


@needs_root
async def test_a_socket_that_may_not_be_opened_is_refused_at_once(tmp_path: Path) -> None:
    let_others_in(tmp_path)
    patient = AS_NOBODY.replace("timeout_s=0", "timeout_s=3600")
    async with Site(tmp_path) as site, workload(site, patient, "[65534, []]", prelude=PRELUDE) as process:
        found = await process.said()
    assert found.startswith(f"{site.path}: Permission denied: user 65534 may not open this socket; run as")


# -- hello ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        ({"type": "ready", "id": 1}, "the first message, expected hello, found Ready"),
        (b"garbage", "expected one JSON object in UTF-8, found b'garbage'"),
        (b"x" * (MAX_MESSAGE_BYTES + 1), f"message too long, expected at most {MAX_MESSAGE_BYTES} bytes"),
        ({"type": "hello"}, "field 'version', expected an integer from 1"),
    ],
)
async def test_another_first_message(raw: RawClient, packet: Any, expected: str) -> None:
    await raw.send(packet)
    assert expected in await closed_with(raw, await raw.receive())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"version": 2}, "attach protocol version, expected 1, found 2"),
        ({"fds": ["pagemap"]}, "descriptors of 'hello', expected 1, found 0"),
        ({"fds": ["tracking", "pagemap"]}, "expected some of pagemap, tracking, sync, in this order"),
        ({"fds": ["memory"]}, "found memory"),
        ({"pause": "never"}, "expected one of cooperative, signal, found 'never'"),
        ({"state": "dead"}, "field 'state'"),
        ({"name": "a\nb"}, "field 'name'"),
    ],
)
async def test_a_wrong_hello(raw: RawClient, fields: dict[str, Any], expected: str) -> None:
    assert expected in await closed_with(raw, await raw.hello(**fields))


async def test_no_hello_at_all(tmp_path: Path) -> None:
    site = Site(tmp_path)
    server = AttachServer(site.machine, site.path, hello_timeout_s=0.05)
    await server.start()
    async with raw_client(site) as raw:
        assert "no hello within 0.05 s" in await closed_with(raw, await raw.receive())
    await server.close()
    await server.close()
    site.machine.close()


async def test_descriptors_that_are_not_what_they_are_called(
    site: Site, tracking: int, sync: int, pagemap: int
) -> None:
    async with workload(None, "say(os.getpid())\nhear()") as process:
        pid = await process.said()
        other = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
        lie = os.open("/proc/self/maps", os.O_RDONLY)
        cases: list[tuple[list[str], list[int], str]] = [
            (["pagemap"], [lie], "descriptor 'pagemap', expected /proc/self/pagemap"),
            (["pagemap"], [other], f"expected that of process {os.getpid()}, found that of process {pid}"),
            (["tracking"], [tracking], "of no use without a pagemap"),
            (["pagemap", "tracking"], [pagemap, lie], "descriptor 'tracking', expected a userfaultfd"),
            (["pagemap", "tracking"], [pagemap, sync], "descriptor 'tracking', expected features 0xb000 at least"),
            (["pagemap", "sync"], [pagemap, tracking], "descriptor 'sync', expected a userfaultfd without WP_ASYNC"),
            (["pagemap"], [pagemap, lie], "descriptors of 'hello', expected 1, found 2"),
        ]
        for names, fds, expected in cases:
            before = open_files()
            async with raw_client(site) as raw:
                assert expected in await closed_with(raw, await raw.hello(fds, fds=names))
            assert open_files() <= before + 1  # the server's end of this connection may still be closing
        os.close(other)
        os.close(lie)


async def test_a_process_attaches_once(site: Site, attached: RawClient) -> None:
    async with raw_client(site) as second:
        error = await closed_with(second, await second.hello(name="second"))
    assert error == f"process {os.getpid()} is attached already, as workload raw"
    assert (await offer(attached))["exists"] is False  # the first is not disturbed


async def test_a_name_is_used_once(site: Site, attached: RawClient) -> None:
    source = """
try:
    attach(name="raw", timeout_s=0)
except AttachRefused as error:
    say([str(error), error.again])
"""
    async with workload(site, source) as process:
        error, again = await process.said()
    assert f"the name 'raw' is in use by process {os.getpid()}" in error
    assert again
    assert list(site.machine.workloads) == ["raw"]


async def test_a_name_is_free_as_soon_as_its_connection_is_closed(site: Site) -> None:
    for _ in range(20):
        async with raw_client(site) as raw:
            assert (await raw.hello())["type"] == "welcome"


async def test_too_many_workloads(site: Site, raw: RawClient) -> None:
    async with raw_client(site) as first:
        await first.hello(name="first")
        (one,) = site.machine.workloads.values()
        others = {f"other {number}": one for number in range(MAX_WORKLOADS)}
        one.pid, one.name = -1, "?"
        site.machine.workloads.update(others)
        error = await closed_with(raw, await raw.hello())
        for name in others:
            del site.machine.workloads[name]
        one.name = "first"
    assert error == f"too many workloads, expected at most {MAX_WORKLOADS}, found {MAX_WORKLOADS + 1}"


@pytest.mark.parametrize(
    ("run_state", "client_state", "expected"),
    [
        (RunState.INMIGRATE, "running", "the machine here waits for a migration"),
        (RunState.RUNNING, "moved", "the machine runs here, and this workload says that it moved away"),
    ],
)
async def test_what_could_be_a_second_copy(
    tmp_path: Path, run_state: RunState, client_state: str, expected: str
) -> None:
    async with Site(tmp_path, run_state) as site, raw_client(site) as raw:
        answer = await raw.hello(state=client_state)
        assert answer["again"] is True
        assert expected in await closed_with(raw, answer)


# -- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"page_size": 1 << 30}, "page_size, expected 4096 or 2097152, found 1073741824"),
        ({"page_size": 2 << 20}, f"address and size in multiples of 2097152, found {SIZE} bytes"),
        ({"size": 100}, "not made of whole pages"),
        ({"size": 0}, "no block 'heap' exists"),
    ],
)
async def test_a_block_that_cannot_be(attached: RawClient, fields: dict[str, Any], expected: str) -> None:
    answer = await offer(attached, **fields)
    assert (answer["type"], answer["id"], answer["again"]) == ("error", 1, False)
    assert expected in answer["error"]
    assert (await offer(attached))["type"] == "block"


async def test_too_many_blocks(attached: RawClient) -> None:
    for number in range(MAX_BLOCKS):
        assert (await offer(attached, name=f"block {number}"))["type"] == "block"
    answer = await offer(attached, name="one more")
    assert answer["error"] == f"too many RAM blocks, expected at most {MAX_BLOCKS}, found {MAX_BLOCKS + 1}"
    assert (await offer(attached, name="block 0"))["type"] == "block"


async def test_an_honest_block(site: Site, attached: RawClient, block: Block) -> None:
    assert (await offer(attached)) == {"type": "block", "id": 1, "exists": False, "size": 0}
    assert await attached.ask(request_map(block), [block.memfd]) == {"type": "ok", "id": 2}
    with pytest.raises(PermissionError):
        os.ftruncate(block.memfd, 0)
    (found,) = site.machine.ram_blocks()
    block.mapping.view[0] = 42
    assert found.pages[0, 0] == 42
    assert "has mapped block 'heap' already" in (await offer(attached))["error"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"size": SIZE * 2}, f"the memfd has {SIZE} bytes, expected {SIZE * 2}"),
        ({"size": SIZE - PAGE_SIZE}, f"the memfd has {SIZE} bytes, expected {SIZE - PAGE_SIZE}"),
        ({"size": SIZE - 1}, "not made of whole pages"),
        ({"address": 4097}, "not made of whole pages"),
        ({"address": 0}, "outside any address space"),
        ({"address": (1 << 64) - PAGE_SIZE}, "outside any address space"),
        ({"address": 1 << 20}, "is not mapped, expected memory up to 0x110000, found none at 0x100000"),
        ({"name": "other"}, "expected a 'block' request that was answered before"),
    ],
)
async def test_a_mapping_that_is_not_there(
    site: Site, attached: RawClient, block: Block, fields: dict[str, Any], expected: str
) -> None:
    await offer(attached)
    before = open_files()
    answer = await attached.ask(request_map(block, **fields), [block.memfd])
    assert (answer["type"], answer["id"]) == ("error", 2)
    assert expected in answer["error"]
    assert site.machine.ram_blocks() == []
    assert open_files() == before
    # and the honest way is still open
    assert (await attached.ask(request_map(block), [block.memfd]))["type"] == "ok"


async def test_memory_that_cannot_be_trusted(site: Site, attached: RawClient, block: Block, tmp_path: Path) -> None:
    unsealable = os.memfd_create("unsealable")
    os.ftruncate(unsealable, SIZE)
    truncated = memory.create_memfd("truncated", SIZE)
    os.ftruncate(truncated, PAGE_SIZE)
    reader, writer = os.pipe()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, SIZE)
    readable = os.open(f"/proc/self/fd/{block.memfd}", os.O_RDONLY)
    await offer(attached)
    for fd, expected in [
        (unsealable, "not a memfd created with MFD_ALLOW_SEALING"),
        (truncated, f"the memfd has {PAGE_SIZE} bytes, expected {SIZE}"),
        (reader, "not a memfd"),
        (file, "not a memfd created with MFD_ALLOW_SEALING"),
        (readable, "not open for reading and writing"),
    ]:
        answer = await attached.ask(request_map(block), [fd])
        assert expected in answer["error"], answer
    for fd in (unsealable, truncated, reader, writer, file, readable):
        os.close(fd)
    assert site.machine.ram_blocks() == []


async def test_a_mapping_of_something_else(site: Site, attached: RawClient, block: Block) -> None:
    other, private, shifted = Block(), mmap.mmap(block.memfd, SIZE, mmap.MAP_PRIVATE), Block(2 * SIZE)
    assert private is not None
    address = _address_of(private)
    await offer(attached)
    for wrong, expected in [
        (other.address, "the claimed mapping is another one, expected a shared mapping of the memfd"),
        (address, "from byte 0 on, rw-p"),
    ]:
        answer = await attached.ask(request_map(block, address=wrong), [block.memfd])
        assert expected in answer["error"], answer
    # the right memory, but not from its start
    await offer(attached, name="shifted", size=2 * SIZE)
    claim = request_map(block, name="shifted", size=2 * SIZE, address=shifted.address + PAGE_SIZE)
    assert "is another one" in (await attached.ask(claim, [shifted.memfd]))["error"]
    private.close()
    other.close()
    shifted.close()
    assert site.machine.ram_blocks() == []


def _address_of(memory_map: mmap.mmap) -> int:
    import ctypes  # noqa: PLC0415 - only here

    return ctypes.addressof(ctypes.c_char.from_buffer(memory_map))


async def test_overlapping_mappings(attached: RawClient, block: Block) -> None:
    await offer(attached)
    await attached.ask(request_map(block), [block.memfd])
    await offer(attached, name="second")
    answer = await attached.ask(request_map(block, name="second"), [block.memfd])
    assert "the mapping of block 'second' overlaps one that this workload declared before" in answer["error"]


async def test_a_range_another_userfaultfd_watches(
    site: Site, raw: RawClient, block: Block, tracking: int, pagemap: int
) -> None:
    await raw.hello([pagemap, tracking], fds=["pagemap", "tracking"])
    await offer(raw)
    other = userfault.open_userfaultfd(userfault.FEATURES_TRACKING)
    userfault.register(other, block.address, SIZE, userfault.MODE_WP)
    answer = await raw.ask(request_map(block), [block.memfd])
    assert "writes to the mapping cannot be tracked: it is registered through another userfaultfd" in answer["error"]
    os.close(other)
    assert (await raw.ask(request_map(block), [block.memfd]))["type"] == "ok"
    # what the check registered is not left behind
    userfault.register(tracking, block.address, SIZE, userfault.MODE_WP)


@needs_root
async def test_a_userfaultfd_of_another_process(site: Site, raw: RawClient, block: Block, pagemap: int) -> None:
    source = """
import array, socket
from migrated.kernel import userfault
fd = userfault.open_userfaultfd(userfault.FEATURES_TRACKING)
say([os.getpid(), fd])
hear()
"""
    async with workload(None, source) as process:
        pid, theirs = await process.said()
        foreign = _steal(pid, theirs)
        await raw.hello([pagemap, foreign], fds=["pagemap", "tracking"])
        await offer(raw)
        answer = await raw.ask(request_map(block), [block.memfd])
        os.close(foreign)
    assert "writes to the mapping cannot be tracked" in answer["error"]
    assert site.machine.ram_blocks() == []


def _steal(pid: int, fd: int) -> int:
    import ctypes  # noqa: PLC0415 - only here

    pidfd = os.pidfd_open(pid)
    found = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, fd, 0)  # pidfd_getfd
    os.close(pidfd)
    assert found >= 0
    return int(found)


async def test_a_block_that_exists_keeps_its_size_and_its_memory(site: Site, raw: RawClient) -> None:
    source = """
with attach(name="owner") as machine:
    machine.ram("heap", 16 << 12)
    machine.ready()
    say("ready")
    hear()
"""
    async with workload(site, source) as process:
        await process.said()
        await raw.hello()
        assert (
            "exists with another size, expected 65536 bytes, found 131072" in (await offer(raw, size=2 * SIZE))["error"]
        )
        whole = HUGE_PAGE_SIZE
        answer = await offer(raw, size=SIZE, page_size=whole)
        assert f"exists with pages of another size, expected {PAGE_SIZE} bytes, found {whole}" in answer["error"]
        assert await offer(raw, size=0) == {"type": "block", "id": 1, "exists": True, "size": SIZE}
        mine = Block()
        answer = await raw.ask(request_map(mine), [mine.memfd])
        assert "the memfd is not that of block 'heap', which exists" in answer["error"]
        answer = await raw.ask(request_map(mine, size=SIZE * 2), [mine.memfd])
        assert "exists with another size" in answer["error"]
        mine.close()


async def test_a_block_two_processes_create_at_once(site: Site, attached: RawClient, block: Block) -> None:
    await offer(attached)
    source = """
with attach(name="late") as machine:
    say("asking")
    view = machine.ram("heap", 16 << 12)
    say(view[0])
"""
    async with workload(site, source) as process:
        assert await process.said() == "asking"
        block.mapping.view[0] = 9
        assert (await attached.ask(request_map(block), [block.memfd]))["type"] == "ok"
        assert await process.said() == 9


# -- devices -------------------------------------------------------------------------------------------------------


def device(**fields: Any) -> dict[str, Any]:
    return {"type": "device", "id": 3, "name": "cpu", "instance_id": 0, "version_id": 1, **fields}


async def test_a_device_is_declared_once(site: Site, attached: RawClient) -> None:
    assert (await attached.ask(device()))["type"] == "ok"
    assert (await attached.ask(device(instance_id=1)))["type"] == "ok"
    assert (await attached.ask(device()))["error"] == "device 'cpu/0' is declared already by raw"
    assert [(found.idstr, found.instance_id) for found in site.machine.devices()] == [("cpu", 0), ("cpu", 1)]
    assert site.devices == list(site.machine.devices())


async def test_too_many_devices(attached: RawClient) -> None:
    for number in range(MAX_DEVICES):
        assert (await attached.ask(device(instance_id=number)))["type"] == "ok"
    answer = await attached.ask(device(instance_id=MAX_DEVICES))
    assert answer["error"] == f"too many devices, expected at most {MAX_DEVICES}, found {MAX_DEVICES + 1}"


async def test_a_signal_workload_has_no_devices(raw: RawClient) -> None:
    await raw.hello(pause="signal")
    assert "has RAM only" in (await raw.ask(device()))["error"]


async def test_a_device_the_registry_does_not_want(site: Site, attached: RawClient) -> None:
    def refuse(found: object) -> None:
        raise CommandError("the name is taken")

    site.machine.declared._on_device_declared = refuse
    assert (await attached.ask(device()))["error"] == "device 'cpu/0' is refused: the name is taken"
    assert list(site.machine.devices()) == []


# -- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "fds", "expected"),
    [
        ({"type": "hello"}, 0, "field 'version'"),
        (
            {"type": "hello", "version": 1, "name": "x", "pause": "signal", "state": "fresh", "fds": []},
            0,
            "a second hello",
        ),
        ({"type": "stopped", "id": 1}, 0, "an answer to a question that was never asked, found id 1"),
        ({"type": "running", "id": 0}, 0, "never asked, found id 0"),
        ({"type": "error", "id": 77, "error": "?"}, 0, "never asked, found id 77"),
        ({"type": "ready", "id": 1}, 1, "descriptors of an attach message 'Ready', expected 0, found 1"),
        ({"type": "map", "id": 1, "name": "a", "address": 4096, "size": 4096}, 0, "'MapRequest', expected 1, found 0"),
        ({"type": "map", "id": 1, "name": "a", "address": 4096, "size": 4096}, 2, "'MapRequest', expected 1, found 2"),
        ({"type": "map", "id": 1, "name": "a", "address": 4096, "size": 4096}, 17, "too many descriptors"),
        ({"type": "welcome"}, 0, "field 'type', expected one of hello, block"),
        (b"\x00\xff", 0, "one JSON object"),
        (b"x" * (MAX_MESSAGE_BYTES + 1), 0, "message too long"),
    ],
)
async def test_what_breaks_the_protocol_ends_the_connection(
    site: Site, attached: RawClient, message: Any, fds: int, expected: str
) -> None:
    before = open_files()
    null = os.open(os.devnull, os.O_RDONLY)
    await attached.send(message, [null] * fds)
    assert expected in await closed_with(attached, await attached.receive())
    os.close(null)
    await site.until("X_MIGRATED_WORKLOAD_LEFT")
    ((_, left),) = [event for event in site.events if event[0] == "X_MIGRATED_WORKLOAD_LEFT"]
    assert left["reason"].startswith("it broke the attach protocol: ")
    assert open_files() <= before


async def test_standby_is_for_machines_that_are_away(attached: RawClient) -> None:
    answer = await attached.ask({"type": "standby", "id": 5})
    assert "expected a machine that moved away or is about to arrive, found run state running" in answer["error"]


async def test_a_flood_of_requests_is_answered_one_by_one(site: Site, attached: RawClient) -> None:
    """A workload that never reads its answers is let go; the daemon's memory does not grow by what it sends."""
    sent = 0
    with contextlib.suppress(Exception):
        while sent < 100_000 and not site.events:
            await attached.send(device(instance_id=sent))
            sent += 1
    await site.until("X_MIGRATED_WORKLOAD_LEFT")
    assert site.events[-1][1]["reason"] == "it does not read its attach socket"
    assert sent < 10_000


async def test_a_name_is_free_as_soon_as_the_daemon_let_go_of_its_connection(site: Site) -> None:
    async with raw_client(site) as first, raw_client(site) as second:
        assert (await first.hello())["type"] == "welcome"
        site.machine.workloads["raw"].disconnect("it does not read its attach socket")
        assert (await second.hello())["type"] == "welcome"
