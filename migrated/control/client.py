"""A small synchronous QMP client, for programs that steer a daemon: `migratectl` and the demo.

The rule of the file: standard library and `wire.qmp` only, for it is on the way of every `migratectl` call; one
command at a time, every wait has a deadline. Answers are matched by id, so that an answer nobody waits for any more
cannot be taken for another's; events are kept in order until somebody asks for them.
Refusals are CommandError with the server's class and text; a connection that cannot be made, or is lost, is a
ChannelError.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from migrated.error_ids import ERROR_IDS
from migrated.errors import ChannelClosed, ChannelTimeout, CommandError
from migrated.wire import qmp

ANSWER_DEADLINE_S = 60.0
"""The slowest commands wait for a workload to stop (seconds at most); beyond a minute the daemon hangs."""

MAX_EVENTS = 10_000
"""Events kept for `next_event`; the oldest go first when nobody asks for them."""


class QmpClient:
    """A negotiated connection to a QMP server on a Unix socket."""

    def __init__(self, path: str, *, deadline_s: float = ANSWER_DEADLINE_S) -> None:
        self._path = path
        self._deadline_s = deadline_s
        self._stream = qmp.JsonStream(max_bytes=64 << 20)  # a QEMU's schema alone is several hundred KiB
        self._messages: deque[dict[str, Any]] = deque()
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._last_id = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()

    def execute(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a command and return its result. Raises CommandError when it is refused."""
        self._last_id += 1
        self._send(qmp.encode_command(name, arguments or {}, self._last_id))
        deadline = time.monotonic() + self._deadline_s
        while True:
            answer = self._next_message(deadline)
            if answer is None:
                raise ChannelTimeout(f"No answer to {name} within {self._deadline_s:g} s", role="qmp", peer=self._path)
            if "event" in answer:
                self._events.append(answer)
            elif answer.get("id") == self._last_id:
                return _result(answer)

    def next_event(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """Return the oldest event, waiting for one at most ``timeout_s`` (None: for ever); None when there is none."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._events:
            message = self._next_message(deadline)
            if message is None:
                return None
            if "event" in message:
                self._events.append(message)
        return self._events.popleft()

    def _connect(self) -> None:
        self._socket.settimeout(self._deadline_s)
        try:
            self._socket.connect(self._path)
        except OSError as error:
            why = error.strerror or error
            raise ChannelClosed(f"Failed to connect to '{self._path}': {why}", role="qmp") from error
        greeting = self._next_message(time.monotonic() + self._deadline_s)
        if greeting is None:
            raise ChannelTimeout("No QMP greeting (QEMU serves one client at a time)", role="qmp", peer=self._path)
        if "error" in greeting:
            _result(greeting)
        if "QMP" not in greeting:
            raise ChannelClosed("Not a QMP server", role="qmp", peer=self._path)
        self.execute("qmp_capabilities")

    def _send(self, line: bytes) -> None:
        self._socket.settimeout(self._deadline_s)
        try:
            self._socket.sendall(line)
        except OSError as error:
            raise ChannelClosed(f"Connection lost: {error.strerror or error}", role="qmp", peer=self._path) from error

    def _next_message(self, deadline: float | None) -> dict[str, Any] | None:
        """Return the next object received, or None when the deadline passes first."""
        while not self._messages:
            data = self._receive(deadline)
            if data is None:
                return None
            for event in self._stream.feed(data):
                if isinstance(event, qmp.Malformed) or not isinstance(event.value, dict):
                    raise ChannelClosed("Not a QMP server: it sent no JSON object", role="qmp", peer=self._path)
                self._messages.append(event.value)
        return self._messages.popleft()

    def _receive(self, deadline: float | None) -> bytes | None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return None
        self._socket.settimeout(left)
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            return None
        except OSError as error:
            raise ChannelClosed(f"Connection lost: {error.strerror or error}", role="qmp", peer=self._path) from error
        if not data:
            raise ChannelClosed("The daemon closed the connection", role="qmp", peer=self._path)
        return data


def _result(answer: Mapping[str, Any]) -> Any:
    if "error" in answer:
        error = answer["error"]
        known = error.get("x-migrated-error", {}).get("id")
        # A newer daemon may have ids that are not known here, and a QEMU has none.
        error_id = known if known in ERROR_IDS else ""
        raise CommandError(str(error.get("desc")), str(error.get("class")), error_id=error_id)
    return answer["return"]
