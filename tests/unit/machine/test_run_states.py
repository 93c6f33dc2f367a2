"""Stop, cont and everything between: one machine, real workloads."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest

from migrated.errors import LocalProtocolError, WorkloadError
from migrated.kernel.memory import PAGE_SIZE
from migrated.kernel.process import all_tasks_stopped
from migrated.machine.admission import ADMISSION, Facts
from migrated.model.runstate import RunState
from migrated.ram.dirty import DirtyLog
from migrated.savevm.ports import DeviceState
from migrated.wire.attach import CLIENT_STATES
from tests.support.attached import Process, Site, raw_client, workload

SIZE = 64 * PAGE_SIZE

#: Writes without pause in as many threads as the first argument says; says what its callbacks hear.
WRITER = """
threads = int(sys.argv[1])
with attach(name=sys.argv[2]) as machine:
    heap = machine.ram(sys.argv[3], 64 << 12)
    machine.on_stop(lambda: say("on_stop"))
    machine.on_cont(lambda: say("on_cont"))
    machine.ready()
    def write(part):
        try:
            machine.wait_running()
            n = 0
            while True:
                machine.checkpoint()
                n += 1
                heap[part * 4096 + n % 4096] = n // 4096 & 255
        except MachineMoved as moved:
            say(["moved", moved.peer])
    workers = [threading.Thread(target=write, args=(part,)) for part in range(threads)]
    for worker in workers:
        worker.start()
    say("ready")
    for worker in workers:
        worker.join()
"""


async def still(site: Site, block: str = "heap") -> None:
    """Check that nobody writes: the final scan of a migration."""
    (found,) = [found for found in site.machine.ram_blocks() if found.name == block]
    assert found.mappings
    log = DirtyLog([found])
    await log.start()
    before = found.pages.copy()
    for _ in range(50):
        assert await log.stray_write() is None
    assert np.array_equal(found.pages, before)
    await log.stop()


async def writes(site: Site, block: str = "heap") -> None:
    """Wait until somebody writes."""
    (found,) = [found for found in site.machine.ram_blocks() if found.name == block]
    before = found.pages.copy()
    while np.array_equal(found.pages, before):
        await asyncio.sleep(0)


async def test_a_stop_stops_every_thread_and_cont_lets_them_go(tmp_path: Path) -> None:
    async with Site(tmp_path) as site, workload(site, WRITER, "3", "w", "heap") as process:
        assert await process.said() == "ready"
        await writes(site)
        for _ in range(3):
            await site.machine.stop(RunState.PAUSED)
            assert site.machine.run_state is RunState.PAUSED
            assert await process.said() == "on_stop"
            await still(site)
            await site.machine.stop(RunState.FINISH_MIGRATE)  # already stopped: only the name changes
            assert site.machine.run_state is RunState.FINISH_MIGRATE
            await site.machine.cont()
            await site.machine.cont()
            assert site.machine.run_state is RunState.RUNNING
            assert await process.said() == "on_cont"
            await writes(site)
        assert [name for name in site.event_names() if name in ("STOP", "RESUME")] == ["STOP", "RESUME"] * 3


async def test_a_move_the_table_forbids_changes_nothing(tmp_path: Path) -> None:
    async with Site(tmp_path) as site, workload(site, WRITER, "1", "w", "heap") as process:
        assert await process.said() == "ready"
        with pytest.raises(LocalProtocolError, match=r"'running' -> 'postmigrate'"):
            await site.machine.stop(RunState.POSTMIGRATE)
        with pytest.raises(LocalProtocolError):
            site.machine.set_run_state(RunState.POSTMIGRATE)
        assert site.machine.run_state is RunState.RUNNING
        await writes(site)


HANGS = """
with attach(name="hangs") as machine:
    machine.ram("other", 4096)
    @machine.on_stop
    def wait():
        say("on_stop")
        say(hear())
    machine.on_cont(lambda: say("on_cont"))
    machine.ready()
    machine.wait_running()
    say("ready")
    while True:
        machine.checkpoint()
"""


async def test_a_hang_in_on_stop_is_named_and_the_others_run_on(tmp_path: Path) -> None:
    async with (
        Site(tmp_path, stop_timeout_s=0.3) as site,
        workload(site, WRITER, "1", "w", "heap") as writer,
        workload(site, HANGS) as hanging,
    ):
        assert await writer.said() == "ready"
        assert await hanging.said() == "ready"
        with pytest.raises(WorkloadError, match=r"workload hangs: stop: no answer within 0.\d+ s") as caught:
            await site.machine.stop(RunState.FINISH_MIGRATE)
        assert caught.value.workload == "hangs"
        assert site.machine.run_state is RunState.RUNNING
        assert await writer.said() == "on_stop"
        assert await writer.said() == "on_cont"
        await writes(site)
        assert "STOP" not in site.event_names()
        # When the callback returns after all, its stop is long forgotten.
        assert await hanging.said() == "on_stop"
        hanging.tell("done")
        assert await hanging.said() == "done"
        assert await hanging.said() == "on_cont"
        site.stop_timeout_s = 10
        stopping = asyncio.ensure_future(site.machine.stop(RunState.PAUSED))
        assert await hanging.said() == "on_stop"
        hanging.tell("done again")
        await stopping
        await still(site)


async def test_a_thread_that_does_not_come_to_checkpoint_is_a_hang(tmp_path: Path) -> None:
    source = """
with attach(name="busy") as machine:
    machine.ram("heap", 4096)
    machine.ready()
    def participate_and_wait():
        machine.checkpoint()
        say("away")
        hear()
        machine.checkpoint()
        say("back")
    thread = threading.Thread(target=participate_and_wait)
    thread.start()
    thread.join()
    hear()
"""
    async with Site(tmp_path, stop_timeout_s=0.2) as site, workload(site, source) as process:
        assert await process.said() == "away"
        with pytest.raises(WorkloadError, match="workload busy: stop: no answer"):
            await site.machine.stop(RunState.PAUSED)
        site.stop_timeout_s = 10
        stopping = asyncio.ensure_future(site.machine.stop(RunState.PAUSED))
        process.tell()
        await stopping  # parked now
        await site.machine.cont()
        assert await process.said() == "back"
        await site.machine.stop(RunState.PAUSED)  # and it ended: nobody waits for it any more


async def test_on_stop_that_raises_is_a_failed_stop(tmp_path: Path) -> None:
    source = """
with attach(name="grumpy") as machine:
    machine.ram("heap", 4096)
    @machine.on_stop
    def refuse():
        raise RuntimeError("not now")
    machine.on_cont(lambda: say("on_cont"))
    machine.ready()
    say("ready")
    while True:
        machine.checkpoint()
"""
    async with Site(tmp_path) as site, workload(site, source, stderr=asyncio.subprocess.DEVNULL) as process:
        assert await process.said() == "ready"
        for _ in range(2):
            with pytest.raises(WorkloadError, match="workload grumpy: stop: RuntimeError: not now"):
                await site.machine.stop(RunState.PAUSED)
            assert site.machine.run_state is RunState.RUNNING
            assert await process.said() == "on_cont"


async def test_a_cancelled_stop_leaves_the_machine_running(tmp_path: Path) -> None:
    async with (
        Site(tmp_path) as site,
        workload(site, WRITER, "1", "w", "heap") as writer,
        workload(site, HANGS) as hanging,
    ):
        assert await writer.said() == "ready"
        assert await hanging.said() == "ready"
        stopping = asyncio.ensure_future(site.machine.stop(RunState.PAUSED))
        assert await writer.said() == "on_stop"
        assert await hanging.said() == "on_stop"
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert site.machine.run_state is RunState.RUNNING
        assert await writer.said() == "on_cont"
        await writes(site)


async def test_a_workload_that_dies_while_it_stops_is_named(tmp_path: Path) -> None:
    async with Site(tmp_path) as site, workload(site, HANGS) as hanging:
        assert await hanging.said() == "ready"
        stopping = asyncio.ensure_future(site.machine.stop(RunState.PAUSED))
        assert await hanging.said() == "on_stop"
        hanging.kill()
        with pytest.raises(WorkloadError, match="workload hangs: its process exited"):
            await stopping
        assert site.machine.run_state is RunState.RUNNING
        assert site.machine.ram_blocks() == []


async def test_who_is_watched_is_missed(tmp_path: Path) -> None:
    async with Site(tmp_path) as site, workload(site, WRITER, "1", "w", "heap") as writer:
        assert await writer.said() == "ready"
        site.machine.watch()
        site.machine.check_alive()
        lost = asyncio.ensure_future(site.machine.lost())
        async with raw_client(site) as raw:
            await raw.hello()
        await site.until("X_MIGRATED_WORKLOAD_LEFT")
        assert not lost.done()  # came after the watch began
        writer.kill()
        with pytest.raises(WorkloadError, match="workload w: its process exited"):
            await lost
        with pytest.raises(WorkloadError, match="workload w"):
            site.machine.check_alive()
        site.machine.watch()
        site.machine.check_alive()


async def test_nothing_is_declared_while_a_migration_is_under_way(tmp_path: Path) -> None:
    async with Site(tmp_path) as site, raw_client(site) as raw:
        await raw.hello()
        lost = asyncio.ensure_future(site.machine.lost())
        await asyncio.sleep(0)
        block = await raw.ask({"type": "block", "id": 1, "name": "late", "size": PAGE_SIZE})
        device = await raw.ask({"type": "device", "id": 2, "name": "late"})
        assert block == {
            "type": "error", "id": 1, "error": "no new block: a migration is under way", "again": True,
        }  # fmt: skip
        assert device["error"] == "no new device: a migration is under way"
        lost.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lost
        assert (await raw.ask({"type": "device", "id": 2, "name": "late"}))["type"] == "ok"


async def test_two_processes_share_a_block_and_both_are_tracked(tmp_path: Path) -> None:
    async with (
        Site(tmp_path) as site,
        workload(site, WRITER, "1", "first", "heap") as first,
        workload(site, WRITER, "2", "second", "heap") as second,
    ):
        assert await first.said() == "ready"
        assert await second.said() == "ready"
        (block,) = site.machine.ram_blocks()
        assert {mapping.workload for mapping in block.mappings} == {"first", "second"}
        assert len({mapping.pagemap for mapping in block.mappings}) == 2
        await site.machine.stop(RunState.PAUSED)
        await still(site)
        first.kill()
        await site.until("X_MIGRATED_WORKLOAD_LEFT")
        (left,) = block.mappings
        assert left.workload == "second"
        await site.machine.cont()
        await writes(site)


async def test_the_machine_is_empty_when_the_last_workload_left(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        async with workload(site, WRITER, "1", "w", "heap") as process:
            assert await process.said() == "ready"
            (block,) = site.machine.ram_blocks()
            pages = block.pages
        await site.until("X_MIGRATED_WORKLOAD_LEFT")
        assert site.machine.ram_blocks() == []
        pages[0] = 1  # somebody who still holds a view may
        with pytest.raises(WorkloadError, match="workload w: RAM block heap is gone with it"):
            _ = block.pages
        del pages
        with pytest.raises(OSError, match="Invalid argument"):
            os.ftruncate(block.memfd, 4096)  # the number is taken, the file is not the memfd any more
        await site.machine.stop(RunState.PAUSED)


async def declared(site: Site, *names: str) -> None:
    await site.machine.wait_declared(names, [], 10)


async def test_waiting_for_declarations(tmp_path: Path) -> None:
    source = """
with attach(name="late") as machine:
    machine.ram("heap", 4096)
    machine.device("cpu", save=bytes, load=print)
    say("declared")
    hear()
    machine.ready()
    hear()
"""
    async with Site(tmp_path, RunState.INMIGRATE) as site:
        with pytest.raises(WorkloadError) as caught:
            await site.machine.wait_declared(["heap"], ["cpu"], 0)
        assert str(caught.value) == ("workload (none attached): not declared within 0 s: RAM block heap; device cpu")
        async with workload(site, source) as process:
            waiting = asyncio.ensure_future(site.machine.wait_declared(["heap"], ["cpu"], 30))
            assert await process.said() == "declared"
            with pytest.raises(WorkloadError, match=r"RAM block heap \(late is not ready\); device cpu"):
                await site.machine.wait_declared(["heap"], ["cpu"], 0.01)
            process.tell()
            await waiting
            await site.machine.wait_declared([], [], 0.01)


async def test_blocks_come_largest_first(tmp_path: Path) -> None:
    source = """
with attach() as machine:
    for name, pages in (("b", 1), ("a", 1), ("large", 3)):
        machine.ram(name, pages * 4096)
    machine.ready()
    hear()
"""
    async with Site(tmp_path, RunState.INMIGRATE) as site, workload(site, source):
        await declared(site, "large", "a", "b")
        assert [block.name for block in site.machine.ram_blocks()] == ["large", "a", "b"]


def test_the_admission_table_is_complete() -> None:
    machine_states = {state for _, state in ADMISSION}
    assert set(ADMISSION) == {(client, state) for client in CLIENT_STATES for state in machine_states}
    for (client, state), facts in ADMISSION.items():
        if isinstance(facts, Facts) and facts.running:
            assert client == "running" or (client, state) == ("fresh", "running")


# -- moving away and coming back -------------------------------------------------------------------------------------

TWIN = """
with attach(name="twin") as machine:
    heap = machine.ram("heap", 64 << 12)
    machine.on_stop(lambda: say("on_stop"))
    machine.on_cont(lambda: say("on_cont"))
    machine.device("cpu", save=lambda: bytes(heap[:4]), load=lambda state, version: say(["load", list(state), version]))
    machine.ready()
    say("ready")
    while True:
        try:
            machine.wait_running()
            say(["running", heap[0]])
            while True:
                machine.checkpoint()
                heap[1] = (heap[1] + 1) & 255
        except MachineMoved as moved:
            say(["moved", moved.peer])
            if hear() == "standby":
                machine.standby()
                say("standby")
"""


async def move_away(site: Site, process: Process, peer: str = "there") -> None:
    await site.machine.stop(RunState.FINISH_MIGRATE)
    assert await process.said() == "on_stop"
    site.machine.set_run_state(RunState.POSTMIGRATE)
    await site.machine.moved(peer)
    assert await process.said() == ["moved", peer]


async def test_away_and_back(tmp_path: Path) -> None:
    async with Site(tmp_path) as site, workload(site, TWIN) as twin:
        assert await twin.said() == "ready"
        assert await twin.said() == ["running", 0]
        for number in range(3):
            await move_away(site, twin)
            with pytest.raises(WorkloadError, match=r"workload twin: its memory still holds a machine; .* standby"):
                await site.machine.begin_incoming()
            assert site.machine.run_state is RunState.POSTMIGRATE
            twin.tell("standby")
            assert await twin.said() == "standby"
            await site.machine.begin_incoming()
            assert site.machine.run_state is RunState.INMIGRATE
            await site.machine.wait_declared(["heap"], ["cpu"], 10)
            (block,), (device,) = site.machine.ram_blocks(), site.machine.devices()
            await still(site)
            block.pages[0, 0] = number + 1
            await device.load(b"state", 1)
            assert await twin.said() == ["load", list(b"state"), 1]
            await site.machine.cont()
            assert await twin.said() == "on_cont"
            assert await twin.said() == ["running", number + 1]


async def test_a_machine_that_runs_cannot_be_overwritten(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        await site.machine.begin_incoming()  # an empty one can
        assert site.machine.run_state is RunState.INMIGRATE
    async with Site(tmp_path) as site, workload(site, TWIN) as twin:
        assert await twin.said() == "ready"
        with pytest.raises(WorkloadError, match="workload twin: it runs here"):
            await site.machine.begin_incoming()
        assert site.machine.run_state is RunState.RUNNING


async def test_the_memory_of_a_machine_that_moved_is_kept_until_released(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        async with workload(site, TWIN) as twin:
            assert await twin.said() == "ready"
            assert await twin.said() == ["running", 0]
            await move_away(site, twin)
            (block,) = site.machine.ram_blocks()
            block.pages[5, 5] = 55
        await site.until("X_MIGRATED_WORKLOAD_LEFT")
        assert site.machine.ram_blocks() == [block]
        assert block.mappings == ()
        assert block.pages[5, 5] == 55
        with pytest.raises(WorkloadError, match="RAM block heap"):
            await site.machine.wait_declared(["heap"], [], 0)
        await site.machine.release()
        assert site.machine.ram_blocks() == []


async def test_the_memory_of_a_machine_that_moved_makes_room_for_the_next(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        async with workload(site, TWIN) as twin:
            assert await twin.said() == "ready"
            assert await twin.said() == ["running", 0]
            await move_away(site, twin)
        await site.until("X_MIGRATED_WORKLOAD_LEFT")
        await site.machine.begin_incoming()
        assert site.machine.ram_blocks() == []
        async with workload(site, TWIN) as twin:
            await declared(site, "heap")
            await site.machine.cont()
            assert await twin.said() == "ready"
            assert await twin.said() == ["running", 0]


async def test_a_workload_that_comes_when_the_machine_is_away_is_told_so(tmp_path: Path) -> None:
    async with Site(tmp_path, RunState.POSTMIGRATE) as site:
        site.machine.peer = "there"
        async with workload(site, TWIN) as twin:
            assert await twin.said() == "ready"
            assert await twin.said() == ["moved", "there"]
            twin.tell("standby")
            assert await twin.said() == "standby"
            await site.machine.begin_incoming()


async def test_a_part_that_is_lost_on_arrival_keeps_the_machine_from_running(tmp_path: Path) -> None:
    async with Site(tmp_path, RunState.INMIGRATE) as site:
        await site.machine.begin_incoming()
        async with workload(site, TWIN) as twin:
            assert await twin.said() == "ready"
            await declared(site, "heap")
        await site.until("X_MIGRATED_WORKLOAD_LEFT")
        async with workload(site, TWIN) as twin:  # a new one is not the one that was loaded
            await site.until("X_MIGRATED_WORKLOAD_ATTACHED", 2)
            with pytest.raises(WorkloadError, match="workload twin: its process exited"):
                await site.machine.cont()
            assert site.machine.run_state is RunState.INMIGRATE
            await site.machine.begin_incoming()
            await site.machine.cont()
            assert await twin.said() == "ready"
            assert await twin.said() == ["running", 0]


# -- devices ---------------------------------------------------------------------------------------------------------


async def test_devices_answer_with_their_state_or_their_error(tmp_path: Path) -> None:
    source = """
state = {}
def fail(*args):
    raise ValueError("no\\nway")
with attach(name="dev") as machine:
    machine.device("good", save=lambda: state["now"], load=lambda blob, version: state.update(now=blob[::-1]))
    machine.device("bad", save=fail, load=fail)
    machine.device("none", save=lambda: None, load=print)
    machine.device("good", save=lambda: b"", load=print, instance_id=1)
    machine.ready()
    hear()
"""
    async with (
        Site(tmp_path, RunState.PAUSED) as site,
        workload(site, source, stderr=asyncio.subprocess.DEVNULL) as process,
    ):
        await site.machine.wait_declared([], ["good", "bad"], 10)
        good, bad, none, empty = site.machine.devices()
        assert (good.idstr, good.instance_id, good.version_id, good.workload) == ("good", 0, 1, "dev")
        large = os.urandom(3 << 20)
        await good.load(large, 1)
        assert await good.save() == DeviceState(large[::-1])
        assert await empty.save() == DeviceState(b"")
        await good.load(b"", 1)
        assert await good.save() == DeviceState(b"")
        with pytest.raises(WorkloadError, match="workload dev: saving device bad/0: ValueError: no\nway"):
            await bad.save()
        with pytest.raises(WorkloadError, match="workload dev: loading device bad/0: ValueError"):
            await bad.load(b"x", 1)
        with pytest.raises(WorkloadError, match=r"save\(\) returned NoneType, expected bytes"):
            await none.save()
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            await good.load(b"x", 1)
            await good.save()
        for _ in range(20):  # the migration fails elsewhere, before its state is written
            loading = asyncio.create_task(good.load(b"x", 1))
            await asyncio.sleep(0)
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        assert len(os.listdir("/proc/self/fd")) == files
        process.kill()
        await site.until("X_MIGRATED_WORKLOAD_LEFT")
        assert site.devices == []
        with pytest.raises(WorkloadError, match="workload dev"):
            await good.save()


async def test_a_lying_device_is_refused(tmp_path: Path) -> None:
    async with Site(tmp_path, RunState.PAUSED) as site, raw_client(site) as raw:
        await raw.hello()
        await raw.ask({"type": "device", "id": 1, "name": "cpu"})
        (device,) = site.machine.devices()
        reader, writer = os.pipe()
        files = len(os.listdir("/proc/self/fd"))
        saving = asyncio.ensure_future(device.save())
        order = await raw.receive()
        assert (order["type"], order["device"], order["instance_id"]) == ("save", "cpu", 0)
        await raw.send({"type": "saved", "id": order["id"]}, [reader])
        with pytest.raises(WorkloadError, match="saving device cpu/0: F_ADD_SEALS: EINVAL"):
            await saving
        huge = os.memfd_create("huge", os.MFD_ALLOW_SEALING)
        os.ftruncate(huge, (1 << 30) + 1)
        saving = asyncio.ensure_future(device.save())
        order = await raw.receive()
        await raw.send({"type": "saved", "id": order["id"]}, [huge])
        with pytest.raises(WorkloadError, match=f"expected a state of at most {1 << 30} bytes, found {(1 << 30) + 1}"):
            await saving
        os.close(huge)
        assert len(os.listdir("/proc/self/fd")) == files
        saving = asyncio.ensure_future(device.save())
        order = await raw.receive()
        await raw.send({"type": "loaded", "id": order["id"]})
        with pytest.raises(WorkloadError, match=r"it broke the attach protocol: a wrong answer, expected saved"):
            await saving
        os.close(reader)
        os.close(writer)


async def test_throttle_reaches_cooperative_workloads_also_later_ones(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        assert await site.machine.throttle(30) is False
        async with raw_client(site) as raw:
            await raw.hello()
            assert await raw.ask({"type": "ready", "id": 1}) == {"type": "ok", "id": 1}
            assert await raw.receive() == {"type": "throttle", "percent": 30}
            assert await site.machine.throttle(50) is True
            assert await raw.receive() == {"type": "throttle", "percent": 50}


# -- pause="signal" ---------------------------------------------------------------------------------------------------

SIGNALLED = """
machine = attach(name="sig", pause="signal")
heap = machine.ram("heap", 64 << 12)
declare = lambda: machine.device("d", save=bytes, load=print)
for wrong in (declare, lambda: machine.on_stop(print), lambda: machine.on_cont(print)):
    try:
        wrong()
    except AttachError as error:
        say(str(error))
machine.ready()
def write(part):
    machine.wait_running()
    say("running")
    n = 0
    while True:
        n += 1
        heap[part * 4096 + n % 4096] = n // 4096 & 255
for part in range(2):
    threading.Thread(target=write, args=(part,)).start()
"""


async def test_a_signal_workload_is_frozen_and_goes_on(tmp_path: Path) -> None:
    async with Site(tmp_path) as site, workload(site, SIGNALLED) as process:
        for what in ("device()", "on_stop()", "on_cont()"):
            assert await process.said() == (
                f'{what} needs pause="cooperative": a signal workload\'s threads are all stopped'
            )
        assert [await process.said(), await process.said()] == ["running"] * 2
        await writes(site)
        assert await site.machine.throttle(50) is False
        for _ in range(3):
            await site.machine.stop(RunState.PAUSED)
            assert all_tasks_stopped(process.pid)
            await still(site)
            await site.machine.cont()
            await writes(site)


async def test_a_signal_twin_is_frozen_until_the_machine_arrives(tmp_path: Path) -> None:
    async with Site(tmp_path, RunState.INMIGRATE) as site, workload(site, SIGNALLED) as process:
        for _ in range(3):
            await process.said()
        await declared(site, "heap")
        assert all_tasks_stopped(process.pid), "until then it would write over what arrives"
        await site.machine.begin_incoming()
        await site.machine.cont()
        assert [await process.said(), await process.said()] == ["running"] * 2
        await site.machine.stop(RunState.FINISH_MIGRATE)
        site.machine.set_run_state(RunState.POSTMIGRATE)
        await site.machine.moved("there")
        assert all_tasks_stopped(process.pid)
        await site.machine.begin_incoming()  # frozen, it stands by without a word
        await site.machine.cont()
        await writes(site)


async def test_a_signal_workload_that_dies_while_frozen_is_missed(tmp_path: Path) -> None:
    async with Site(tmp_path) as site, workload(site, SIGNALLED) as process:
        for _ in range(3):
            await process.said()
        await declared(site, "heap")
        await site.machine.stop(RunState.PAUSED)
        site.machine.watch()
        process.kill()
        with pytest.raises(WorkloadError, match="workload sig: its process exited"):
            await site.machine.lost()


async def test_a_device_is_declared_in_one_of_two_ways(tmp_path: Path) -> None:
    source = """
from migrated.wire.vmstate import VMState, uint8
class Chip(VMState):
    name = "chip"
    fields = (uint8("a"),)
with attach(name="dev") as machine:
    said = []
    for wrong in ({}, {"save": bytes}, {"load": print}, {"save": bytes, "load": print, "vmstate": Chip}):
        try:
            machine.device("chip", **wrong)
        except ValueError as error:
            said.append(str(error))
    machine.device(said[0] if len(set(said)) == 1 and len(said) == 4 else "wrong", vmstate=Chip, state=None)
    machine.ready()
    hear()
"""
    async with Site(tmp_path, RunState.PAUSED) as site, workload(site, source):
        name = "device 'chip' needs either save= and load=, or vmstate= and state="
        await site.machine.wait_declared([], [name], 10)
