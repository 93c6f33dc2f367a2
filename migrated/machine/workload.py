"""One attached process: what it may be asked, and how it is stopped.

The rule of the file: whatever is asked of a workload has a deadline, and an answer that does not come, or comes too
late, is a WorkloadError that names it. An answer to a question that was given up is dropped with its descriptors.

A *cooperative* workload stops when its own code agrees; a *signal* workload is stopped by SIGSTOP through its pidfd and
counts as stopped when each of its threads is in state T.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

from migrated.errors import ChannelError, KernelError, RemoteProtocolError, WorkloadError
from migrated.kernel import memory, process
from migrated.savevm.ports import DeviceState
from migrated.transport.fd_socket import FdSocket
from migrated.transport.thread import in_thread
from migrated.wire import attach

#: A device's `save` or `load` may copy a gigabyte; QEMU has no such limit, but a hung one must not stop us for good.
DEVICE_TIMEOUT_S = 10.0
#: How long a message may wait for room in a workload's socket: its service thread does nothing but read.
SEND_TIMEOUT_S = 2.0
#: How often to look whether all threads are stopped (SIGSTOP takes 50 us for an idle machine, 1-5 ms for a busy one).
STOPPED_POLL_S = 0.001

Answer = tuple[attach.FromWorkload, Sequence[int]]


class Workload:
    """One attached process. Owns ``pidfd`` and ``socket``; the tracking descriptors are owned by the machine."""

    def __init__(
        self, socket: FdSocket, hello: attach.Hello, *, pid: int, pidfd: int, pagemap: int, tracking: int, sync: int
    ) -> None:
        self.name = hello.name
        self.pid = pid
        self.pidfd = pidfd
        self.pagemap = pagemap
        self.tracking = tracking
        self.sync = sync
        self.signalled = hello.pause == "signal"
        self.ready = False
        self.attached = False
        self.running = hello.state == "running"
        """False from the moment it acknowledged a stop until it is told to go on."""
        self.unsettled = False
        """True when it was asked to stop and did not say that it did: it may stop at any time."""
        self.replaceable = False
        """True when its blocks do not hold a machine: they may be overwritten by one that arrives."""
        self.why_gone = ""
        self._socket = socket
        self._pending: dict[int, tuple[type[attach.FromWorkload], asyncio.Future[Answer]]] = {}
        self._next_id = 1
        # Stop and cont of one workload never overlap, whoever asks for them.
        self._turn = asyncio.Lock()

    # -- stop and go -------------------------------------------------------------------------------------------

    async def stop(self, timeout_s: float) -> None:
        """Stop it, or raise WorkloadError within ``timeout_s``; then it is ``unsettled`` until `cont`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        async with self._exclusively("stop", timeout_s):
            if not self.running:
                return
            self.unsettled = True
            left_s = max(deadline - asyncio.get_running_loop().time(), 0)
            if self.signalled:
                await self._stop_by_signal(left_s)
            else:
                deadline_ms = int(left_s * 1000)
                await self._ask("stop", lambda number: attach.Stop(number, deadline_ms), attach.Stopped, left_s)
            self.running = self.unsettled = False

    @asynccontextmanager
    async def _exclusively(self, what: str, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                await self._turn.acquire()
        except TimeoutError as error:
            raise WorkloadError(self.name, f"{what}: it is busy with another stop or cont") from error
        try:
            yield
        finally:
            self._turn.release()

    async def _stop_by_signal(self, timeout_s: float) -> None:
        try:
            process.send_signal(self.pidfd, signal.SIGSTOP)
            async with asyncio.timeout(timeout_s):
                # The kernel has no event for "all threads of somebody else's process are stopped".
                while not process.all_tasks_stopped(self.pid):  # noqa: ASYNC110
                    await asyncio.sleep(STOPPED_POLL_S)
        except KernelError as error:
            raise WorkloadError(self.name, f"it cannot be stopped by signal: {error}") from error
        except TimeoutError as error:
            raise WorkloadError(self.name, f"not all its threads are stopped {timeout_s:g} s after SIGSTOP") from error
        if process.has_exited(self.pidfd):
            raise WorkloadError(self.name, "its process exited")

    async def cont(self, timeout_s: float, *, confirm: bool = True) -> None:
        """Let it go on, also after a stop that failed half-way. Raises WorkloadError when it does not say so in time.

        It counts as running from the moment it was told. One that did not answer the stop is told, and not waited for.
        """
        async with self._exclusively("cont", timeout_s):
            waited_for = confirm and not self.unsettled
            self.running = True
            self.unsettled = self.replaceable = False
            if self.signalled:
                await self._cont_by_signal()
            elif waited_for:
                await self._ask("cont", attach.Cont, attach.Running, timeout_s)
            else:
                await self._send(attach.Cont(self._take_id()))

    async def _cont_by_signal(self) -> None:
        try:
            process.send_signal(self.pidfd, signal.SIGCONT)
        except KernelError as error:
            raise WorkloadError(self.name, f"it cannot be continued by signal: {error}") from error
        # For its `wait_running`. It need not read its socket, so nobody waits for an answer.
        await self._send(attach.Cont(self._take_id()))

    # -- devices -----------------------------------------------------------------------------------------------

    async def save_device(self, device: str, instance_id: int) -> DeviceState:
        """Return the state of one of its devices. Raises WorkloadError."""
        what = f"saving device {device}/{instance_id}"
        saved, fds = await self._ask(
            what, lambda number: attach.Save(number, device, instance_id), attach.Saved, DEVICE_TIMEOUT_S
        )
        assert isinstance(saved, attach.Saved)
        try:
            return DeviceState(await asyncio.to_thread(_read_state, fds[0]), saved.description)
        except (KernelError, ValueError) as error:
            raise WorkloadError(self.name, f"{what}: {error}") from error
        finally:
            close_all(fds)

    async def load_device(self, device: str, instance_id: int, version_id: int, state: bytes) -> None:
        """Give a state to one of its devices. Raises WorkloadError."""
        what = f"loading device {device}/{instance_id}"
        memfd = memory.create_memfd(device, len(state))
        try:
            await in_thread(_write_state, memfd, state)
            await self._ask(
                what,
                lambda number: attach.Load(number, device, instance_id, version_id, len(state)),
                attach.Loaded,
                DEVICE_TIMEOUT_S,
                fds=[memfd],
            )
        finally:
            os.close(memfd)

    # -- messages without an answer ----------------------------------------------------------------------------

    async def throttle(self, percent: int) -> None:
        """Slow a cooperative workload down."""
        await self._send(attach.Throttle(percent))

    async def moved(self, peer: str) -> None:
        """Say that the machine runs elsewhere.

        A frozen process is not told: it cannot object to being overwritten, and when it goes on, the machine is back.
        One that stood by and never ran what arrived (it came paused) still stands by.
        """
        self.replaceable = self.replaceable or self.signalled
        if not self.signalled:
            await self._send(attach.Moved(attach.cut_name(peer)))

    # -- questions and answers ---------------------------------------------------------------------------------

    def take_answer(self, message: attach.FromWorkload, fds: Sequence[int]) -> None:
        """Deliver an answer that arrived. Owns ``fds``. Raises RemoteProtocolError when nobody asked for such a one."""
        number = getattr(message, "id", -1)
        expected, future = self._pending.get(number, (attach.Failed, None))
        try:
            if not 0 < number < self._next_id:
                raise RemoteProtocolError("an answer to a question that was never asked", found=f"id {number}")
            if future is None or future.done():
                return  # too late: given up
            if not isinstance(message, expected | attach.Failed):
                raise RemoteProtocolError(
                    "a wrong answer", expected=_kind(expected), found=f"{_kind(type(message))} (id {number})"
                )
            future.set_result((message, fds))
            fds = ()
        finally:
            close_all(fds)

    def hung_up(self) -> bool:
        """Say whether its end of the connection is closed, though that may not have been read yet."""
        if self._socket.sock.fileno() < 0:
            return True  # it was disconnected, and its session has not ended yet
        poll = select.poll()
        poll.register(self._socket.sock, select.POLLRDHUP)
        return any(event & (select.POLLHUP | select.POLLRDHUP | select.POLLERR) for _, event in poll.poll(0))

    def disconnect(self, why: str) -> None:
        """End its connection; whoever serves it reports ``why``."""
        self.why_gone = self.why_gone or why
        self._socket.close()

    def gone(self, error: WorkloadError) -> None:
        """It left: fail what is still asked of it, and close what this object owns. Twice does no harm."""
        self.attached = False
        for _, future in self._pending.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # asked for, so that one nobody awaits any more is not logged
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    async def _ask(
        self,
        what: str,
        make: Callable[[int], attach.FromDaemon],
        expected: type[attach.FromWorkload],
        timeout_s: float,
        fds: Sequence[int] = (),
    ) -> Answer:
        number = self._take_id()
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[number] = expected, future
        delivered = False
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(make(number), fds)
                answer, carried = await future
                delivered = True
        except TimeoutError as error:
            raise WorkloadError(self.name, f"{what}: no answer within {timeout_s:g} s") from error
        finally:
            del self._pending[number]
            # Cancelled between the answer's arrival and this task's turn: nobody else would close these.
            if not delivered and future.done() and not future.cancelled() and future.exception() is None:
                close_all(future.result()[1])
        if isinstance(answer, attach.Failed):
            close_all(carried)
            raise WorkloadError(self.name, f"{what}: {answer.error}")
        return answer, carried

    async def _send(self, message: attach.FromDaemon, fds: Sequence[int] = ()) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._socket.send(attach.encode_message(message), fds)
        except TimeoutError as error:
            raise WorkloadError(self.name, "it does not read its attach socket") from error
        except ChannelError as error:
            raise WorkloadError(self.name, f"its attach connection broke: {error}") from error

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody wanted."""
    for fd in fds:
        os.close(fd)


def _kind(cls: type[attach.FromWorkload]) -> str:
    return next(name for name, known in attach.FROM_WORKLOAD.items() if known is cls)


def _read_state(memfd: int) -> bytes:
    """Return the content of a memfd from a workload. Raises KernelError or ValueError."""
    size = os.fstat(memfd).st_size
    if not 0 <= size <= attach.MAX_STATE_BYTES:
        raise ValueError(f"expected a state of at most {attach.MAX_STATE_BYTES} bytes, found {size}")
    # Sealed, a regular file in memory: reading can neither block nor come up short.
    memory.seal_size(memfd, size)
    content = os.pread(memfd, size, 0)
    if len(content) != size:
        raise ValueError(f"expected {size} bytes of state, found {len(content)}")
    return content


def _write_state(memfd: int, state: bytes) -> None:
    written = 0
    while written < len(state):
        written += os.pwrite(memfd, memoryview(state)[written:], written)
    memory.seal_all(memfd)
