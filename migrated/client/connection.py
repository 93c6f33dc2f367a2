"""The attach connection of a workload and the thread that serves it.

The rule of the file: the workload's own threads never wait for a daemon unless they ask it something. A daemon that
dies is met by attaching again, every 0.2 to 2 s, with what was declared and with the state of the machine as this
process knows it; meanwhile a running workload runs and a stopped one stays stopped.

One thread reads. Answers are handed to the thread that asked; what the daemon asks is done by `Orders` on this thread.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from migrated.client.errors import AttachError, AttachRefused
from migrated.errors import RemoteProtocolError
from migrated.wire import attach

#: How long the daemon may take to answer a hello or a declaration while this thread attaches.
ANSWER_TIMEOUT_S = 10.0
RETRY_FIRST_S = 0.2
RETRY_LAST_S = 2.0
#: Descriptors taken from one message; none carries more than one.
MAX_FDS = 4
#: How often to look for participants that ended instead of parking.
QUIET_POLL_S = 0.010
_NOBODY_THERE = (errno.ENOENT, errno.ECONNREFUSED)

_log = logging.getLogger("migrated.client")

Packet = tuple[attach.FromDaemon, Sequence[int]]


class Orders(Protocol):
    """What the connection needs from the machine object. All of it runs on the service thread."""

    def hello(self) -> tuple[attach.Hello, Sequence[int]]:
        """Say who and in which state we are."""

    def welcomed(self, welcome: attach.Welcome) -> None:
        """The daemon let us in (again)."""

    def declare(self, exchange: Exchange) -> None:
        """Declare again what was declared before. Raises AttachRefused."""

    def obey(self, message: attach.FromDaemon, fds: Sequence[int]) -> None:
        """Do what the daemon wants; owns ``fds``."""

    def pending(self) -> bool:
        """True while a stop waits for threads to park."""

    def look(self) -> None:
        """Look whether they have."""

    def lost(self) -> None:
        """The connection ended."""


class Exchange(Protocol):
    """Send a request (made with its id) and return the answer."""

    def __call__(self, make: Callable[[int], attach.FromWorkload], fds: Sequence[int] = ()) -> Packet: ...


class ConnectionLost(AttachError):
    """The daemon went away before it answered; ask again when it is back."""


class _Question:
    """One question of a thread, until the service thread has its answer."""

    def __init__(self, on_ok: Callable[[], None]) -> None:
        self.on_ok = on_ok
        self.answered = threading.Event()
        self.answer: Packet | None = None


class Connection:
    """One workload's connection. `open` it, then `serve` (starts the thread); `close` ends both."""

    def __init__(self, path: str, orders: Orders) -> None:
        self._path = path
        self._orders = orders
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._sock: socket.socket | None = None
        self._next_id = 1
        self._questions: dict[int, _Question] = {}
        self._backlog: deque[Packet] = deque()
        self._closing = threading.Event()
        self._ended = False
        self._attached = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="migrated-client", daemon=True)

    # -- any thread --------------------------------------------------------------------------------------------

    def open(self, timeout_s: float) -> None:
        """Attach for the first time; a daemon that is not there yet has ``timeout_s``. Raises AttachError."""
        deadline = time.monotonic() + timeout_s
        denied = 0
        while True:
            try:
                self._attach()
            except (OSError, RemoteProtocolError, AttachError) as error:
                # Once is no proof: a daemon that is starting binds its socket before it opens it to others.
                denied += isinstance(error, PermissionError)
                final = denied > 1 or (isinstance(error, AttachRefused) and not error.again)
                if final or time.monotonic() > deadline:
                    self._drop()
                    os.close(self._wake)
                    raise _as_attach_error(self._path, error) from error
            else:
                return
            time.sleep(RETRY_FIRST_S)

    def serve(self) -> None:
        """Start the service thread."""
        self._attached.set()
        self._thread.start()

    @property
    def on_service_thread(self) -> bool:
        """True on the thread that runs hooks and devices."""
        return threading.current_thread() is self._thread

    def wake(self) -> None:
        """Make the service thread look."""
        with self._lock:
            if not self._ended:
                os.eventfd_write(self._wake, 1)

    def ask(
        self,
        make: Callable[[int], attach.FromWorkload],
        fds: Sequence[int] = (),
        on_ok: Callable[[], None] = lambda: None,
    ) -> Packet:
        """Ask the daemon and wait for its answer, for as long as there is none to ask.

        ``on_ok`` runs on the service thread when the answer is no error, before anything else that the daemon says.
        Raises AttachRefused, and ConnectionLost when the daemon died in between.
        """
        if self.on_service_thread:
            raise AttachError("not from on_stop, on_cont, save or restore: the thread that runs these has to answer")
        question = _Question(on_ok)
        self._attached.wait()
        with self._lock:
            if self._closing.is_set():
                raise AttachError("this machine object is closed")
            if self._sock is None or not self._attached.is_set():
                raise ConnectionLost("the daemon went away")
            number = self._take_id()
            self._questions[number] = question
            try:
                _send(self._sock, make(number), fds)
            except OSError as error:
                del self._questions[number]
                raise ConnectionLost(f"the daemon went away: {error}") from error
        question.answered.wait()
        if question.answer is None:
            raise ConnectionLost("the daemon went away before it answered")
        return _accepted(question.answer)

    def send(self, message: attach.FromWorkload, fds: Sequence[int] = ()) -> None:
        """Send an answer. One that cannot be sent is of no use to anybody any more."""
        with self._lock:
            if self._sock is None:
                return
            try:
                _send(self._sock, message, fds)
            except OSError as error:
                _log.debug("answer not sent: %s", error)

    def close(self) -> None:
        """Say bye, end the thread. Twice does no harm."""
        if self._closing.is_set():
            return
        self.send(attach.Bye())
        with self._lock:
            self._closing.set()
        self.wake()
        self._attached.set()
        if not self.on_service_thread:
            self._thread.join()

    # -- the service thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        retry_s = RETRY_FIRST_S
        while not self._closing.is_set():
            try:
                if self._sock is None:
                    self._attach()
                    self._attached.set()
                    _log.info("attached again")
                    retry_s = RETRY_FIRST_S
                self._serve_connection()
            except (OSError, RemoteProtocolError, AttachError) as error:
                if not self._closing.is_set():
                    _log.warning("not attached: %s", _as_attach_error(self._path, error))
            self._drop()
            select.select([self._wake], [], [], 0 if self._closing.is_set() else retry_s)
            retry_s = min(retry_s * 2, RETRY_LAST_S)
        with self._lock:
            self._ended = True
            os.close(self._wake)

    def _serve_connection(self) -> None:
        assert self._sock is not None
        reader = self._sock.fileno()
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._closing.is_set():
            while self._backlog:
                self._handle(self._backlog.popleft())
            if self._orders.pending():
                self._orders.look()
            ready = {fd for fd, _ in poll.poll(QUIET_POLL_S * 1000 if self._orders.pending() else None)}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if reader in ready:
                self._handle(self._receive())

    def _handle(self, packet: Packet) -> None:
        message, fds = packet
        match message:
            case attach.Ok() | attach.Error() | attach.BlockAnswer():
                with self._lock:
                    question = self._questions.pop(message.id, None)
                if question is None:
                    _close_all(fds)
                    raise RemoteProtocolError("an answer to a question that was never asked", found=f"id {message.id}")
                if not isinstance(message, attach.Error):
                    question.on_ok()
                question.answer = packet
                question.answered.set()
            case attach.Refused():
                raise AttachRefused(message.error, again=message.again)
            case attach.Welcome():
                raise RemoteProtocolError("a second welcome")
            case _:
                self._orders.obey(message, fds)

    def _attach(self) -> None:
        """Connect, say hello, declare again. Raises OSError, RemoteProtocolError, AttachError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(ANSWER_TIMEOUT_S)
            sock.connect(self._path)
            hello, fds = self._orders.hello()
            self._sock = sock
            with contextlib.suppress(BrokenPipeError):  # what it said before it closed is the better reason
                _send(sock, hello, fds)
            welcome, _ = self._receive()
            if isinstance(welcome, attach.Refused):
                raise AttachRefused(welcome.error, again=welcome.again)
            if not isinstance(welcome, attach.Welcome):
                raise RemoteProtocolError("the first message", expected="welcome", found=type(welcome).__name__)
            self._orders.welcomed(welcome)
            self._orders.declare(self._exchange)
        except BaseException:
            self._sock = None
            sock.close()
            raise

    def _exchange(self, make: Callable[[int], attach.FromWorkload], fds: Sequence[int] = ()) -> Packet:
        assert self._sock is not None
        number = self._take_id()
        _send(self._sock, make(number), fds)
        while True:
            packet = self._receive()
            message = packet[0]
            if isinstance(message, attach.Ok | attach.Error | attach.BlockAnswer) and message.id == number:
                return _accepted(packet)
            if isinstance(message, attach.Refused):
                raise AttachRefused(message.error, again=message.again)
            # An order: done when everything is declared.
            self._backlog.append(packet)

    def _receive(self) -> Packet:
        assert self._sock is not None
        data, fds, flags, _ = socket.recv_fds(self._sock, attach.MAX_MESSAGE_BYTES, MAX_FDS)
        try:
            for fd in fds:
                os.set_inheritable(fd, False)  # Python 3.11's recv_fds ignores MSG_CMSG_CLOEXEC
            if not data:
                raise ConnectionLost("the daemon closed the connection")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise RemoteProtocolError("an attach message or its descriptors were cut off")
            return attach.parse_from_daemon(data), fds
        except BaseException:
            _close_all(fds)
            raise

    def _drop(self) -> None:
        """Forget the connection; whoever asked something has to ask again."""
        with self._lock:
            if not self._closing.is_set():
                self._attached.clear()
            sock, self._sock = self._sock, None
            questions, self._questions = self._questions, {}
        if sock is not None:
            sock.close()
        while self._backlog:
            _close_all(self._backlog.popleft()[1])
        for question in questions.values():
            question.answered.set()
        self._orders.lost()

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _accepted(packet: Packet) -> Packet:
    if isinstance(packet[0], attach.Error):
        raise AttachRefused(packet[0].error, again=packet[0].again)
    return packet


def _send(sock: socket.socket, message: attach.FromWorkload, fds: Sequence[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([attach.encode_message(message)], rights, socket.MSG_NOSIGNAL)


def _as_attach_error(path: str, error: Exception) -> AttachError:
    if isinstance(error, AttachRefused):
        return AttachRefused(f"{path}: the daemon refuses: {error}", again=error.again)
    if isinstance(error, PermissionError):
        return AttachError(
            f"{path}: {error.strerror}: user {os.geteuid()} may not open this socket; run as the daemon's user, as root"
            " or in the socket's group ([attach] group of the daemon's configuration)"
        )
    if isinstance(error, OSError):
        hint = "; is the daemon of this machine running?" if error.errno in _NOBODY_THERE else ""
        return AttachError(f"{path}: {error.strerror or error}{hint}")
    return AttachError(f"{path}: {error}")
