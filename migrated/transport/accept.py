"""Accepting connections on a raw listening socket.

The rule of the file: a failing accept(2) never ends a server and never spins.
"""

from __future__ import annotations

import asyncio
import socket

from structlog.typing import FilteringBoundLogger

from migrated.transport.readiness import Readiness

#: How long to leave the backlog alone after accept(2) failed (mostly: out of descriptors); trying at once would spin.
EXHAUSTED_PAUSE_S = 0.2


async def accept(listener: socket.socket, readiness: Readiness, log: FilteringBoundLogger) -> socket.socket:
    """Return the next connection. Raises ConnectionAbortedError once ``readiness`` is closed."""
    while True:
        # A flood of connections must not keep the loop to itself.
        await asyncio.sleep(0)
        if readiness.closed:
            raise ConnectionAbortedError("closed at this end")
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            await readiness.readable()
        except OSError as error:
            log.error("accept_failed", error=str(error))
            await asyncio.sleep(EXHAUSTED_PAUSE_S)
        else:
            return sock
