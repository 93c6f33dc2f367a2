"""The iothread lock knows its owner."""

from __future__ import annotations

import asyncio

import pytest

from migrated.errors import LocalProtocolError
from migrated.savevm.iothread_lock import IothreadLock


async def test_only_the_owning_task_holds_it() -> None:
    lock = IothreadLock()
    seen = []

    async def other() -> None:
        seen.append(lock.held)
        lock.assert_not_held("other")

    async with lock:
        lock.assert_held("here")
        async with asyncio.TaskGroup() as group:
            group.create_task(other())
    assert seen == [False]
    assert not lock.held


async def test_wrong_regimes_fail_at_once() -> None:
    lock = IothreadLock()
    with pytest.raises(LocalProtocolError, match="save_state needs the iothread lock"):
        lock.assert_held("save_state")
    async with lock:
        with pytest.raises(LocalProtocolError, match="must not be called with the iothread lock held"):
            lock.assert_not_held("save_setup")
        with pytest.raises(LocalProtocolError, match="taking the iothread lock"):
            await lock.__aenter__()


async def test_released_lets_others_in_and_takes_it_back() -> None:
    lock = IothreadLock()
    order = []

    async def other() -> None:
        async with lock:
            order.append("other")

    async with lock, asyncio.TaskGroup() as group:
        task = group.create_task(other())
        async with lock.released():
            await task
        lock.assert_held("afterwards")
        order.append("back")
    assert order == ["other", "back"]


async def test_a_cancellation_while_released_still_takes_it_back() -> None:
    lock = IothreadLock()
    outside = asyncio.Event()
    after: list[bool] = []

    async def operator() -> None:
        async with lock:
            try:
                async with lock.released():
                    outside.set()
                    await asyncio.Event().wait()
            finally:
                after.append(lock.held)

    task = asyncio.ensure_future(operator())
    await outside.wait()
    async with lock:
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert after == [True]
    async with lock:
        pass


async def test_hold_times_go_into_buckets() -> None:
    now = iter([0.0, 0.0005, 1.0, 1.05, 2.0, 9.0])
    lock = IothreadLock(clock=lambda: next(now))
    for _ in range(3):
        async with lock:
            pass
    assert lock.holds_by_ms == [1, 0, 1, 0, 1]
