"""Where connections wait until it is known who is there.

The rule of the file: a stranger costs one socket, a few buffers and a deadline, and never keeps anybody else out: where
too many wait, whoever has waited longest goes. Nothing of a machine is touched, and the listener is not busy, before
this is over.
"""

from __future__ import annotations

import asyncio
import contextlib

from structlog.typing import FilteringBoundLogger

from migrated.errors import ChannelError, ChannelTimeout, TlsError
from migrated.transport.tls_channel import TlsChannel
from migrated.transport.tls_problem import TlsProblem

#: How long a peer may take to prove who it is: some round trips, and a processor that is busy otherwise.
PROOF_TIMEOUT_S = 10.0
#: Strangers at a time. A good peer is through in a few round trips: a flood has to bring this many in that time.
MAX_STRANGERS = 32


class Door:
    """The strangers of one listener."""

    def __init__(
        self, log: FilteringBoundLogger, cleartext_answer: bytes = b"", *, timeout_s: float = PROOF_TIMEOUT_S
    ) -> None:
        self._log = log
        self._cleartext_answer = cleartext_answer
        self._timeout_s = timeout_s
        self._waiting: dict[TlsChannel, None] = {}

    async def admit(self, channel: TlsChannel) -> bool:
        """Wait until ``channel`` has proven who is there; False where it did not, and is closed."""
        if len(self._waiting) >= MAX_STRANGERS:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.abort()
        self._waiting[channel] = None
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._authenticate(channel)
        except TimeoutError:
            self._refuse(channel, ChannelTimeout(f"it had not proven who it is within {self._timeout_s:g} s"))
        except ChannelError as error:
            self._refuse(channel, error)
        except BaseException:
            channel.abort()
            raise
        else:
            if not channel.only_asks:
                return True
            self._log.info("peer_checked", peer=channel.peer, certificate=str(channel.certificate))
        finally:
            self._waiting.pop(channel, None)
        with contextlib.suppress(ChannelError):
            await channel.close()
        return False

    async def _authenticate(self, channel: TlsChannel) -> None:
        try:
            await channel.authenticate()
        except TlsError as error:
            if error.problem == TlsProblem.CLEARTEXT:
                with contextlib.suppress(ChannelError):
                    await channel.answer_in_cleartext(self._cleartext_answer)
            raise

    def _refuse(self, channel: TlsChannel, error: ChannelError) -> None:
        problem = error.problem if isinstance(error, TlsError) else ""
        self._log.warning("connection_refused", peer=channel.peer, reason=str(error), problem=problem)

    def close(self) -> None:
        """Send all of them away."""
        for channel in list(self._waiting):
            channel.abort()
