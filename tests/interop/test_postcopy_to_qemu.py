"""A real QEMU 7.2 is the destination of a postcopy: it runs first, waits for its pages, and has all of them in the end.

The rule of the file: what waits for pages at the QEMU is a `pmemsave`; while one waits only `Qemu.oob` is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.errors import CommandError
from tests.interop.conftest import SIZE, content
from tests.support.dissect import Dissection, dissect_postcopy
from tests.support.following import DEADLINE_S, wait_until
from tests.support.holding_site import HoldingSite, MakeSite
from tests.support.oob import OobClient
from tests.support.proxy import Proxy
from tests.support.qemu import BLOCK, PAGE, MakeQemu, Qemu

#: Precopy would take minutes with this, so that it never ends by itself.
SLOW_BPS = 64 << 10
#: Postcopy sends a page now and then with this, and all that is asked for.
TRICKLE_BPS = 16 << 10
#: What is read at the QEMU while it is missing: the last pages, which come last in the background.
TAIL = 32 * PAGE

#: What a QEMU answers to RECV_BITMAP: a head, a name, one bit for each page and an end mark.
BITMAP_BYTES = 4 + 1 + len(BLOCK) + 8 + SIZE // PAGE // 8 + 8
#: The echoes of three PINGs come before a package is sent.
PONGS_BEFORE_PACKAGE = 3 * 8
#: More than one chunk of precopy, so that a pass over it is not over at once.
REWRITTEN = SIZE // 2


@pytest.fixture
def make_source(make_site: MakeSite) -> Callable[..., HoldingSite]:
    """Return a function that starts a daemon whose machine runs with `content`, ready for a slow postcopy."""

    def make(block: str = BLOCK) -> HoldingSite:
        site = make_site("source", incoming=None, blocks={block: SIZE})
        site.wait_event("running")
        site.poke(block, 0, content(1))
        site.capability("postcopy-ram")
        site.parameter("downtime-limit", 1)
        site.parameter("max-bandwidth", SLOW_BPS)
        site.parameter("max-postcopy-bandwidth", TRICKLE_BPS)
        return site

    return make


def target_of(make_qemu: MakeQemu, memory: str) -> Qemu:
    target = make_qemu("target", incoming="defer", memory=memory)
    target.capability("postcopy-ram")
    return target


@pytest.fixture
def source(make_source: Callable[..., HoldingSite]) -> HoldingSite:
    return make_source()


@pytest.fixture
def target(make_qemu: MakeQemu) -> Qemu:
    return target_of(make_qemu, "anonymous")


def go(source: HoldingSite, uri: str) -> None:
    """Hand the machine over by postcopy, at once."""
    source.qmp.execute("migrate", {"uri": uri})
    start_postcopy(source)


def start_postcopy(source: HoldingSite) -> None:
    source.qmp.execute("migrate-start-postcopy")
    wait_until(lambda: source.query().get("x-migrated-outcome") == "destination-owns", "the QEMU runs it")
    assert source.query()["status"] == "postcopy-active"


def begin_dump(target: Qemu, oob: OobClient, at: int, size: int, name: str) -> tuple[int, Path]:
    """Have the QEMU read memory that may be missing."""
    path = target.directory / name
    return oob.start("pmemsave", {"val": at, "size": size, "filename": str(path)}), path


def assert_moved(source: HoldingSite, target: Qemu, memory: bytes) -> dict[str, Any]:
    """Let everything come, and hold the oracle against it; return the source's figures."""
    source.parameter("max-postcopy-bandwidth", 0)
    ours = source.wait_status("completed")
    target.wait_status({"completed"})
    assert target.dump() == memory
    assert (source.run_state(), target.run_state()) == ("postmigrate", "running")
    assert ours["x-migrated-peer"]["kind"] == "qemu"
    assert ours["x-migrated-outcome"] == "destination-owns"
    assert ours["ram"]["remaining"] == 0
    source.wait_event("moved")
    return ours


@pytest.mark.parametrize("memory", ["anonymous", "memfd", "default"])
def test_at_once(memory: str, make_source: Callable[..., HoldingSite], make_qemu: MakeQemu) -> None:
    source = make_source("ram" if memory == "default" else BLOCK)
    target = target_of(make_qemu, memory)
    target.events()
    go(source, target.listen())
    assert_moved(source, target, content(1))
    assert not target.said(), "a QEMU says something only when something is wrong"
    seen = [event["data"]["status"] for event in target.events() if event["event"] == "MIGRATION"]
    assert seen == ["setup", "active", "postcopy-active", "completed"]


def test_after_a_pass(source: HoldingSite, target: Qemu) -> None:
    """Pages that were sent and written again are dropped there, all others stay."""
    again, behind = content(2, REWRITTEN), REWRITTEN + 5 * PAGE
    source.parameter("max-bandwidth", SIZE // 4)
    source.qmp.execute("migrate", {"uri": target.listen()})
    wait_until(lambda: source.query().get("ram", {}).get("transferred", 0) > SIZE // 2, "the beginning was sent")
    while source.query()["ram"]["dirty-sync-count"] < 2:
        source.poke(BLOCK, 0, again)
        source.poke(BLOCK, behind, content(3, PAGE))
    source.parameter("max-bandwidth", SLOW_BPS)
    start_postcopy(source)
    memory = again + content(1)[REWRITTEN:behind] + content(3, PAGE) + content(1)[behind + PAGE :]
    ours = assert_moved(source, target, memory)
    assert ours["ram"]["dirty-sync-count"] > 2
    assert not target.said()


def test_what_is_waited_for_comes_first(source: HoldingSite, target: Qemu) -> None:
    go(source, target.listen())
    oob = target.oob()
    reading, path = begin_dump(target, oob, SIZE - TAIL, TAIL, "tail")
    oob.finish(reading)
    assert path.read_bytes() == content(1)[-TAIL:]
    ram = source.query()["ram"]
    assert ram["postcopy-requests"] >= 1
    assert ram["remaining"] > 0, "it came before its turn"
    assert_moved(source, target, content(1))


@pytest.fixture
def link(target: Qemu) -> Iterator[Proxy]:
    port = int(target.listen().rpartition(":")[2])
    with Proxy(("127.0.0.1", port)) as link:
        link.forward.kept = bytearray()
        yield link


def recover(source: HoldingSite, oob: OobClient, link: Proxy, path: Path) -> None:
    """Let both go on over another connection, at an address of which the QEMU hears while it waits for a page."""
    oob.at_once("migrate-recover", {"uri": f"unix:{path}"})
    link.target = str(path)
    source.qmp.execute("migrate", {"uri": link.uri, "resume": True})
    source.wait_status("postcopy-active")


def test_cuts_and_recoveries_while_somebody_waits(
    source: HoldingSite, target: Qemu, link: Proxy, tmp_path: Path
) -> None:
    """Twice in a row, each time with a request that got lost."""
    go(source, link.uri)
    oob = target.oob()
    streams = []
    for cut in range(2):
        link.backward.hit.clear()
        link.backward.limit, link.backward.at_limit = link.backward.passed, "swallow"
        at = SIZE - (cut + 1) * TAIL
        reading, path = begin_dump(target, oob, at, TAIL, f"part{cut}")
        assert link.backward.hit.wait(DEADLINE_S), "the QEMU asks for a page"
        link.cut()
        oob.wait_status("postcopy-paused")
        paused = source.wait_status("postcopy-paused")
        assert paused["error-desc"]
        assert paused["x-migrated-outcome"] == "destination-owns"
        assert not oob.finished(reading)
        streams.append(link.take_forward())
        link.backward.limit = None
        recover(source, oob, link, tmp_path / f"recover{cut}")
        oob.finish(reading)
        assert path.read_bytes() == content(1)[at : at + TAIL]
        assert source.query()["ram"]["remaining"] > 0
    assert_moved(source, target, content(1))
    assert_as_described(dissect_postcopy(*streams, link.take_forward()))


def test_the_stream_is_as_described(source: HoldingSite, link: Proxy) -> None:
    go(source, link.uri)
    source.parameter("max-postcopy-bandwidth", 0)
    source.wait_status("completed")
    found = dissect_postcopy(link.take_forward())
    assert_as_described(found)
    numbers = [number for number, _ in found.commands]
    assert numbers == [1, 2, 2, 3, 2, *[6] * (len(numbers) - 11), 2, 7, 4, 2, 5, 2]


def assert_as_described(found: Dissection) -> None:
    """All of memory is there, and everything that did not stay was dropped before the QEMU listened."""
    assert found.memory == {BLOCK: content(1)}
    assert found.missing() == {}
    assert found.discarded[BLOCK] | found.early[BLOCK] == set(range(SIZE // PAGE))
    assert [(s.idstr, s.version, len(s.body)) for s in found.devices()] == [("globalstate", 1, 104)]


def pause_before_the_answer(source: HoldingSite, target: Qemu, link: Proxy) -> None:
    """Have the QEMU run the machine, and the source not hear of it."""
    link.backward.limit, link.backward.at_limit = PONGS_BEFORE_PACKAGE, "swallow"
    source.qmp.execute("migrate", {"uri": link.uri})
    source.qmp.execute("migrate-start-postcopy")
    wait_until(lambda: target.run_state() == "running", "the QEMU runs it")
    link.cut()
    assert source.wait_status("postcopy-paused")["x-migrated-outcome"] == "unknown"
    link.backward.limit = None


def test_a_cut_before_the_answer_can_be_mended(source: HoldingSite, target: Qemu, link: Proxy, tmp_path: Path) -> None:
    pause_before_the_answer(source, target, link)
    target.wait_status({"postcopy-paused"})
    recover(source, target.oob(), link, tmp_path / "recover")
    assert source.query()["x-migrated-outcome"] == "destination-owns"
    assert "error-desc" not in assert_moved(source, target, content(1))


def test_a_qemu_that_died_before_the_answer_is_fenced(source: HoldingSite, target: Qemu, link: Proxy) -> None:
    pause_before_the_answer(source, target, link)
    target.process.kill()
    target.process.wait(DEADLINE_S)
    with pytest.raises(CommandError, match="not finalized yet"):
        source.qmp.execute("cont")
    source.qmp.execute("x-migrated-resolve", {"peer-is-fenced": True})
    assert source.query()["x-migrated-outcome"] == "source-owns"
    assert source.run_state() == "paused"
    source.qmp.execute("cont")
    assert source.run_state() == "running"
    assert source.peek(BLOCK) == content(1)
    source.poke(BLOCK, 0, content(2))
    assert source.peek(BLOCK) == content(2)


def test_an_address_where_nobody_waits_leaves_it_paused(
    source: HoldingSite, target: Qemu, link: Proxy, tmp_path: Path
) -> None:
    go(source, link.uri)
    source.qmp.execute("migrate-pause")
    source.wait_status("postcopy-paused")
    target.wait_status({"postcopy-paused"})
    before = source.query()["error-desc"]
    source.qmp.execute("migrate", {"uri": f"unix:{tmp_path}/nobody", "resume": True})
    wait_until(lambda: source.query().get("error-desc") != before, "the attempt failed")
    assert source.query()["status"] == "postcopy-paused"
    assert "nobody" in source.query()["error-desc"]
    recover(source, target.oob(), link, tmp_path / "recover")
    assert_moved(source, target, content(1))


def test_a_qemu_without_the_capability_ends_and_the_machine_goes_on(source: HoldingSite, make_qemu: MakeQemu) -> None:
    target = make_qemu("target", incoming="defer")
    refused = source.migrate(target.listen(), "failed")
    assert target.wait_exit() == 1
    assert "RAM postcopy is disabled but have 16 byte advise" in target.said()
    assert refused["x-migrated-outcome"] == "source-owns"
    assert source.run_state() == "running"
    assert source.peek(BLOCK) == content(1)


def test_requested_pages_come_over_a_connection_of_their_own(source: HoldingSite, target: Qemu, tmp_path: Path) -> None:
    """Capability postcopy-preempt, also after a pause."""
    source.capability("postcopy-preempt")
    target.capability("postcopy-preempt")
    go(source, target.listen())
    oob = target.oob()
    for attempt in range(2):
        at = SIZE - (attempt + 1) * TAIL
        reading, path = begin_dump(target, oob, at, TAIL, f"part{attempt}")
        oob.finish(reading)
        assert path.read_bytes() == content(1)[at : at + TAIL]
        if not attempt:
            source.qmp.execute("migrate-pause")
            source.wait_status("postcopy-paused")
            oob.wait_status("postcopy-paused")
            oob.at_once("migrate-recover", {"uri": f"unix:{tmp_path}/recover"})
            source.qmp.execute("migrate", {"uri": f"unix:{tmp_path}/recover", "resume": True})
            source.wait_status("postcopy-active")
    assert_moved(source, target, content(1))


def test_a_cut_during_the_recovery_is_another_pause(
    source: HoldingSite, target: Qemu, link: Proxy, tmp_path: Path
) -> None:
    """At this end; a QEMU 7.2 dies of it (SIGSEGV), and its machine with it."""
    go(source, link.uri)
    source.qmp.execute("migrate-pause")
    source.wait_status("postcopy-paused")
    target.wait_status({"postcopy-paused"})
    link.backward.hit.clear()
    link.backward.limit, link.backward.at_limit = link.backward.passed + BITMAP_BYTES // 2, "cut"
    target.oob().at_once("migrate-recover", {"uri": f"unix:{tmp_path}/recover"})
    link.target = f"{tmp_path}/recover"
    before = source.query()["error-desc"]
    source.qmp.execute("migrate", {"uri": link.uri, "resume": True})
    assert link.backward.hit.wait(DEADLINE_S), "half a bitmap has passed"
    wait_until(lambda: source.query().get("error-desc") != before, "the attempt failed")
    paused = source.wait_status("postcopy-paused")
    assert paused["x-migrated-outcome"] == "destination-owns"


def test_a_lost_last_word_is_for_an_operator(source: HoldingSite, target: Qemu, link: Proxy) -> None:
    """The QEMU has everything, has said so, and takes no further connection."""
    go(source, link.uri)
    with pytest.raises(CommandError, match="not unknown yet"):
        source.qmp.execute("x-migrated-resolve", {"peer-is-running": True})
    link.backward.limit, link.backward.at_limit = link.backward.passed, "swallow"
    source.parameter("max-postcopy-bandwidth", 0)
    target.wait_status({"completed"})
    link.cut()
    assert source.wait_status("postcopy-paused")["ram"]["remaining"] == 0
    with pytest.raises(CommandError, match="nothing to resolve"):
        source.qmp.execute("x-migrated-resolve", {"peer-is-fenced": True})
    source.qmp.execute("x-migrated-resolve", {"peer-is-running": True})
    assert source.run_state() == "postmigrate"
    assert source.query()["x-migrated-outcome"] == "destination-owns"
    source.wait_event("moved")
    assert target.dump() == content(1)
