"""The bounded queue of lines to one client."""

from __future__ import annotations

import asyncio

from migrated.control.outbox import Outbox


async def test_lines_come_out_in_order_joined_up_to_a_size() -> None:
    outbox = Outbox(100)
    for line in (b"one ", b"two ", b"three"):
        assert outbox.offer(line)
    assert await outbox.take(8) == b"one two "
    assert await outbox.take(1) == b"three"  # at least one line


async def test_taking_waits_for_a_line() -> None:
    outbox = Outbox(100)
    taking = asyncio.create_task(outbox.take(100))
    await asyncio.sleep(0)
    assert not taking.done()
    outbox.offer(b"x")
    assert await taking == b"x"


async def test_full_queue_refuses_events_and_makes_answers_wait() -> None:
    outbox = Outbox(4)
    assert outbox.offer(b"longer than that")  # one line may exceed the limit
    assert outbox.is_full()
    assert not outbox.offer(b"event")
    putting = asyncio.create_task(outbox.put(b"answer"))
    await asyncio.sleep(0)
    assert not putting.done()
    assert await outbox.take(100) == b"longer than that"
    await putting
    assert await outbox.take(100) == b"answer"


async def test_finish_hands_out_what_is_queued_and_takes_no_more() -> None:
    outbox = Outbox(100)
    outbox.offer(b"last")
    outbox.finish()
    assert outbox.offer(b"too late")
    assert await outbox.take(100) == b"last"
    assert await outbox.take(100) is None


async def test_discard_forgets_and_wakes_everybody() -> None:
    outbox = Outbox(1)
    outbox.offer(b"never sent")
    putting = asyncio.create_task(outbox.put(b"nor this"))
    await asyncio.sleep(0)
    outbox.discard()
    await putting
    assert await outbox.take(100) is None

    waiting = asyncio.create_task(Outbox.take(idle := Outbox(1), 100))
    await asyncio.sleep(0)
    idle.discard()
    assert await waiting is None
