"""Work in a thread that is waited for to its end, also by whoever is cancelled meanwhile.

The rule of the file: a thread cannot be cancelled. What it works on (a descriptor, a buffer, a file's name) belongs to
it until it returns, so a cancellation is delivered only then.
"""

from __future__ import annotations

import asyncio
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
