"""The attach socket: who may attach, and the conversation with each workload.

The rule of the file: nothing a workload says is believed before it is checked; what cannot be met is answered with
what was expected and found (`error`), what breaks the protocol ends the connection (`refused`). A connection handles
one message at a time and answers it before it reads the next, so a workload can make this daemon hold no more than one
message and the limits of `machine.declarations`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence

import structlog

from migrated.errors import ChannelError, KernelError, MigratedError, RemoteProtocolError, WorkloadError
from migrated.kernel import process
from migrated.machine.admission import admit, check_name_free, initial_facts
from migrated.machine.claims import ClaimRefused, check_descriptors
from migrated.machine.machine import Machine
from migrated.machine.workload import SEND_TIMEOUT_S, Workload, close_all
from migrated.model.runstate import RunState
from migrated.transport.fd_socket import FdSocket, UnixServer, serve_unix
from migrated.transport.local_peer import AccessRule, local_peer
from migrated.transport.readiness import Readiness
from migrated.wire import attach

#: A workload sends its hello right after connect.
HELLO_TIMEOUT_S = 5.0
#: Five descriptors each (socket, pidfd, pagemap, two userfaultfds); RLIMIT_NOFILE is 1024 by default.
MAX_WORKLOADS = 64
#: How long to wait for news of a process whose connection ended.
EXIT_GRACE_S = 0.1

#: Packets read and dropped before a refusal; the kernel queues few more (net.unix.max_dgram_qlen, buffer sizes).
UNREAD_PACKETS = 64
#: How many descriptors come with a message; all others carry none.
_CARRIED = {attach.MapRequest: 1, attach.Saved: 1}


class AttachServer:
    """Lets workloads attach to one machine. ``group`` is the name of a group whose members may attach."""

    def __init__(
        self,
        machine: Machine,
        path: str,
        *,
        mode: int = 0o660,
        group: str | None = None,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
    ) -> None:
        self._machine = machine
        self._path = path
        self._mode = mode
        self._group = group
        self._access = AccessRule(frozenset())
        self._hello_timeout_s = hello_timeout_s
        self._server: UnixServer | None = None
        self._log = structlog.get_logger().bind(machine=machine.name)

    async def start(self) -> None:
        """Listen. Raises ChannelError."""
        self._access = AccessRule.of(self._group)
        self._server = await serve_unix(
            self._path, socket.SOCK_SEQPACKET, self._mode, self._group, self._serve, log=self._log
        )

    async def close(self) -> None:
        """Stop listening and let all workloads go; they stay as they are. Twice does no harm."""
        server, self._server = self._server, None
        if server is not None:
            await server.close()

    async def _serve(self, connection: FdSocket) -> None:
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                workload = await self._greet(connection)
        except TimeoutError:
            await self._refuse(connection, f"no hello within {self._hello_timeout_s:g} s", again=True)
        except (ClaimRefused, RemoteProtocolError, KernelError) as error:
            again = isinstance(error, ClaimRefused) and error.again
            await self._refuse(connection, str(error), again=again)
        else:
            await Session(self._machine, connection, workload).run()

    async def _greet(self, connection: FdSocket) -> Workload:
        packet, fds = await connection.receive(attach.MAX_MESSAGE_BYTES)
        try:
            pid = self._check_credentials(connection.sock)
            if not packet:
                raise RemoteProtocolError("closed before hello")
            hello = attach.parse_from_workload(packet)
            if not isinstance(hello, attach.Hello):
                raise RemoteProtocolError("the first message", expected="hello", found=type(hello).__name__)
            named = _named_descriptors(hello, fds)
            check_descriptors(pid, *named)
            await check_name_free(self._machine, hello.name, pid)
            if len(self._machine.workloads) >= MAX_WORKLOADS:
                raise ClaimRefused(
                    "too many workloads", expected=f"at most {MAX_WORKLOADS}", found=str(MAX_WORKLOADS + 1), again=True
                )
            facts = initial_facts(hello.state, self._machine)
            pagemap, tracking, sync = named
            workload = Workload(
                connection, hello, pid=pid, pidfd=process.peer_pidfd(connection.sock, pid),
                pagemap=pagemap, tracking=tracking, sync=sync,
            )  # fmt: skip
            fds = []
        finally:
            close_all(fds)
        admit(self._machine, workload, facts)
        return workload

    def _check_credentials(self, sock: socket.socket) -> int:
        peer = local_peer(sock)
        if peer.pid <= 0:
            raise ClaimRefused("your process is not visible here (another pid namespace)")
        if self._access.access(peer) is None:
            raise ClaimRefused("you may not attach to this machine", expected=str(self._access), found=str(peer))
        return peer.pid

    async def _refuse(self, connection: FdSocket, why: str, *, again: bool) -> None:
        self._log.warning("workload_refused", reason=why)
        await send_refusal(connection, why, again=again)


class Session:
    """The conversation with one workload, from `welcome` to the end of the connection."""

    def __init__(self, machine: Machine, connection: FdSocket, workload: Workload) -> None:
        self._machine = machine
        self._connection = connection
        self._workload = workload
        self._log = structlog.get_logger().bind(machine=machine.name, workload=workload.name)

    async def run(self) -> None:
        """Talk until the workload leaves; then the machine knows that it did, and why."""
        why = "the daemon let it go"
        exit_ = Readiness(self._workload.pidfd)
        async with asyncio.TaskGroup() as group:
            try:
                watcher = group.create_task(self._watch_process(exit_))
                await self._send(_welcome(self._machine, self._workload))
                group.create_task(self._settle())
                why = await self._converse(group)
                # A process that dies closes its socket a moment before its pidfd says so.
                await asyncio.wait([watcher], timeout=EXIT_GRACE_S)
            finally:
                exit_.close()
                # Fails what is still asked of it, so that the group's tasks end.
                self._machine.detach(self._workload, self._workload.why_gone or why)

    async def _watch_process(self, exit_: Readiness) -> None:
        """Notice the end of the process also where a child that it forked still holds the socket."""
        with contextlib.suppress(ConnectionAbortedError):
            await exit_.readable()
            self._workload.disconnect("its process exited")

    async def _converse(self, group: asyncio.TaskGroup) -> str:
        while True:
            try:
                packet, fds = await self._connection.receive(attach.MAX_MESSAGE_BYTES)
            except ChannelError as error:
                return f"its attach connection broke: {error}"
            except RemoteProtocolError as error:
                return await self._break_off(error)
            if not packet:
                return "it closed its attach connection"
            try:
                message = attach.parse_from_workload(packet)
                _check_carried(message, fds)
            except RemoteProtocolError as error:
                close_all(fds)
                return await self._break_off(error)
            if isinstance(message, attach.Bye):
                return "it left"
            try:
                await self._handle(message, fds, group)
            except RemoteProtocolError as error:
                return await self._break_off(error)

    async def _handle(self, message: attach.FromWorkload, fds: Sequence[int], group: asyncio.TaskGroup) -> None:
        """Do what a message asks. Owns ``fds``."""
        if isinstance(message, attach.Stopped | attach.Running | attach.Saved | attach.Loaded | attach.Failed):
            self._workload.take_answer(message, fds)
            return
        if isinstance(message, attach.Hello | attach.Bye):
            raise RemoteProtocolError("a second hello", expected="one per connection")
        try:
            carried: list[int] = []
            answer: attach.FromDaemon = attach.Ok(message.id)
            match message:
                case attach.BlockRequest():
                    answer, carried = self._offer(message)
                case attach.MapRequest():
                    await self._machine.declared.map_block(self._workload, message, fds[0])
                case attach.DeviceRequest():
                    self._machine.declared.add_device(self._workload, message)
                case attach.Standby():
                    self._stand_by()
                case attach.Ready():
                    pass
        except ClaimRefused as error:
            self._log.warning("declaration_refused", error=str(error))
            await self._send(attach.Error(message.id, attach.cut_text(str(error)), error.again))
            return
        await self._send(answer, carried)
        if isinstance(message, attach.Ready):
            # After the answer: a signal workload may be frozen at once.
            self._machine.set_ready(self._workload)
            group.create_task(self._settle())

    def _offer(self, request: attach.BlockRequest) -> tuple[attach.BlockAnswer, list[int]]:
        block = self._machine.declared.offer_block(self._workload, request)
        if block is None:
            return attach.BlockAnswer(request.id, exists=False), []
        return attach.BlockAnswer(request.id, exists=True, size=block.size_bytes), [block.memfd]

    def _stand_by(self) -> None:
        state = self._machine.run_state
        if state not in (RunState.POSTMIGRATE, RunState.INMIGRATE):
            raise ClaimRefused(
                "standby", expected="a machine that moved away or is about to arrive", found=f"run state {state}"
            )
        self._workload.replaceable = True

    async def _settle(self) -> None:
        try:
            await self._machine.settle(self._workload)
        except WorkloadError as error:
            # It cannot be made to do what the machine does: it has no place in it.
            self._log.warning("workload_not_settled", error=error.what)
            self._workload.disconnect(error.what)

    async def _send(self, message: attach.FromDaemon, fds: Sequence[int] = ()) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._connection.send(attach.encode_message(message), fds)
        except TimeoutError:
            self._workload.disconnect("it does not read its attach socket")
        except ChannelError as error:
            self._workload.disconnect(f"its attach connection broke: {error}")

    async def _break_off(self, error: MigratedError) -> str:
        await send_refusal(self._connection, str(error), again=False)
        return f"it broke the attach protocol: {error}"


async def send_refusal(connection: FdSocket, why: str, *, again: bool) -> None:
    """Say why the connection ends; somebody who does not listen is not waited for."""
    try:
        # A socket closed with something unread in it takes away what the other end has not read yet (ECONNRESET).
        async with asyncio.timeout(0):
            for _ in range(UNREAD_PACKETS):
                close_all((await connection.receive(attach.MAX_MESSAGE_BYTES))[1])
    except (TimeoutError, ChannelError, RemoteProtocolError):
        pass
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await connection.send(attach.encode_message(attach.Refused(attach.cut_text(why), again)))
    except (TimeoutError, ChannelError):
        return


def _welcome(machine: Machine, workload: Workload) -> attach.Welcome:
    state = {RunState.RUNNING: "running", RunState.POSTMIGRATE: "moved"}.get(machine.run_state, "stopped")
    if machine.run_state is RunState.INMIGRATE and workload.replaceable:
        state = "incoming"
    return attach.Welcome(
        attach.VERSION, attach.cut_name(machine.name), state, attach.cut_name(machine.peer) if machine.peer else ""
    )


def _named_descriptors(hello: attach.Hello, fds: Sequence[int]) -> tuple[int, int, int]:
    """Return pagemap, tracking and sync descriptor, -1 where not given. Raises RemoteProtocolError or ClaimRefused."""
    if hello.version != attach.VERSION:
        raise ClaimRefused("attach protocol version", expected=str(attach.VERSION), found=str(hello.version))
    known = [name for name in attach.HELLO_FDS if name in hello.fds]
    if list(hello.fds) != known:
        raise RemoteProtocolError(
            "attach message 'hello', field 'fds'",
            expected="some of " + ", ".join(attach.HELLO_FDS) + ", in this order",
            found=", ".join(hello.fds),
        )
    if len(fds) != len(hello.fds):
        raise RemoteProtocolError("descriptors of 'hello'", expected=str(len(hello.fds)), found=str(len(fds)))
    given = dict(zip(hello.fds, fds, strict=True))
    return given.get("pagemap", -1), given.get("tracking", -1), given.get("sync", -1)


def _check_carried(message: attach.FromWorkload, fds: Sequence[int]) -> None:
    expected = _CARRIED.get(type(message), 0)
    if len(fds) != expected:
        raise RemoteProtocolError(
            f"descriptors of an attach message '{type(message).__name__}'", expected=str(expected), found=str(len(fds))
        )
