"""A TCP relay for migrations on several connections at once: each by its number, in the order in which they are made.

The rule of the file: every fault is in the plan of one connection, as a byte count; nothing depends on time. One thread
accepts, and one passes bytes for each connection; all end with the relay.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

CHUNK = 1 << 16


@dataclass
class Plan:
    """What becomes of one connection. Counts are of bytes from the source."""

    behind: int | None = None
    """Reaches the destination only when the connection with this number has passed something."""
    cut_at: int | None = None
    """Is reset in both directions after so many bytes."""
    flip_at: int | None = None
    """A bit of the byte at this offset is flipped."""
    passed: int = 0
    passes: threading.Event = field(default_factory=threading.Event)
    """Set once it has passed something."""


class Relay:
    """Passes connections on to ``target``; those without a plan as they are."""

    def __init__(self, target: tuple[str, int], plans: Mapping[int, Plan]) -> None:
        self._target = target
        self._plans = dict(plans)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stop_r, self._stop_w = socket.socketpair()
        self._threads: list[threading.Thread] = []

    @property
    def uri(self) -> str:
        return f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"

    def plan(self, number: int) -> Plan:
        return self._plans.setdefault(number, Plan())

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop_w.close()
        self._accepting.join()
        for plan in self._plans.values():
            plan.passes.set()
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, self._stop_r):
            sock.close()

    def _accept(self) -> None:
        number = 0
        while self._stop_r not in select.select([self._listener, self._stop_r], [], [])[0]:
            client, _ = self._listener.accept()
            thread = threading.Thread(target=self._pass_on, args=(client, self.plan(number)), daemon=True)
            self._threads.append(thread)
            thread.start()
            number += 1

    def _pass_on(self, client: socket.socket, plan: Plan) -> None:
        if plan.behind is not None:
            self.plan(plan.behind).passes.wait()
        try:
            with client, socket.create_connection(self._target) as server:
                self._pump(client, server, plan)
        except OSError:
            return

    def _pump(self, client: socket.socket, server: socket.socket, plan: Plan) -> None:
        ways = {client: server, server: client}
        while ways:
            readable, _, _ = select.select([*ways, self._stop_r], [], [])
            if self._stop_r in readable:
                return
            for sock in readable:
                room = CHUNK if plan.cut_at is None or sock is server else min(CHUNK, plan.cut_at - plan.passed)
                if not room:
                    _reset(client, server)
                    return
                data = bytearray(sock.recv(room))
                if not data:
                    ways.pop(sock).shutdown(socket.SHUT_WR)
                    continue
                if sock is client:
                    if plan.flip_at is not None and 0 <= (at := plan.flip_at - plan.passed) < len(data):
                        data[at] ^= 0x10
                    plan.passed += len(data)
                ways[sock].sendall(data)
                if sock is client:
                    plan.passes.set()


def _reset(*socks: socket.socket) -> None:
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
