"""Work in a thread that is waited for to its end, also by whoever is cancelled meanwhile.

The rule of the file: a thread cannot be cancelled. What it works on (a descriptor, a buffer, a file's name) belongs to
it until it returns, so a cancellation is delivered only then.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``work`` in a thread and wait for its end."""
    return await to_the_end(asyncio.to_thread(work, *args, **kwargs))


async def to_the_end(operation: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
    """Wait for an operation to its end; deliver a cancellation only afterwards."""
    running = asyncio.ensure_future(operation)
    cancelled = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        _ = running.cancelled() or running.exception()  # seen: the cancellation is what counts
        raise cancelled
    return running.result()


async def in_own_thread(work: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run ``work``, which may last as long as it likes, in a thread of its own.

    A cancellation calls ``stop``, which has to make it return, and waits for that.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def end(error: BaseException | None) -> None:
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the thread is waited for
            # Its frames hold buffers, and it is held in circles until the collector comes by.
            traceback.clear_frames(error.__traceback__)
            loop.call_soon_threadsafe(end, error)
        else:
            loop.call_soon_threadsafe(end, None)

    threading.Thread(target=run, daemon=True).start()
    try:
        await asyncio.shield(ended)
    except asyncio.CancelledError:
        stop()
        with contextlib.suppress(Exception):  # what it was stopped by
            await to_the_end(ended)
        raise
