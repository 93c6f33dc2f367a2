"""The yardstick "raw": blocking sockets and as little else as possible, in two processes.

The rule of the file: what Python can do without a protocol: ``sendall`` of 1 MiB views of the source mapping, receives
of 128 KiB, landed by ``pwrite`` in a fresh memfd or received into the mapping of one that is populated, whichever is
faster there; a thread per channel at both ends, each with its part of the memory. Time runs from before connect until
the receiver has acknowledged that the last byte is in its memory.

Run as ``python -m tests.bench.raw receive SIZE CHANNELS cold|populated`` (says ``port N``) and ``... send SIZE FILE
PORT CHANNELS`` (says ``ready``, waits for a line, sends, says ``took SECONDS``).
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from migrated.kernel.memory import create_memfd
from tests.bench.host import MIB, warm
from tests.bench.processes import expect, module, running, tell

SEND_BYTES = MIB
RECEIVE_BYTES = 128 << 10
MADV_POPULATE_WRITE = 23
#: What a channel says first: where its part begins and ends.
_PART = struct.Struct("<QQ")


def push(content: Path, size_bytes: int, log: Path, channels: int = 1, *, populated: bool = False) -> float:
    """Push the content once and return how many MiB/s that were."""
    landing = "populated" if populated else "cold"
    with running(module("tests.bench.raw", "receive", size_bytes, channels, landing), log=log) as receiver:
        (port,) = expect(receiver, "port", log)
        with running(module("tests.bench.raw", "send", size_bytes, content, port, channels), log=log) as sender:
            expect(sender, "ready", log)
            warm(size_bytes)
            tell(sender, "go")
            (seconds,) = expect(sender, "took", log)
            return size_bytes / MIB / float(seconds)


def _parts(size_bytes: int, channels: int) -> list[range]:
    part = -(-size_bytes // channels)
    return [range(start, min(start + part, size_bytes)) for start in range(0, size_bytes, part)]


def _receive(size_bytes: int, channels: int, landing: str) -> None:
    memfd = create_memfd("raw", size_bytes)
    mapping = mmap.mmap(memfd, size_bytes)
    if landing == "populated":
        mapping.madvise(MADV_POPULATE_WRITE)
    land, memory = LANDINGS[landing], memoryview(mapping)
    listener = socket.create_server(("127.0.0.1", 0))
    print("port", listener.getsockname()[1], flush=True)

    def take(connection: socket.socket) -> None:
        with connection:
            part = range(*_PART.unpack(connection.recv(_PART.size, socket.MSG_WAITALL)))
            land(connection, memfd, memory, part)
            connection.sendall(b"!")

    with ThreadPoolExecutor(channels) as threads:
        for taken in [threads.submit(take, listener.accept()[0]) for _ in range(channels)]:
            taken.result()


def _by_pwrite(connection: socket.socket, memfd: int, memory: memoryview, part: range) -> None:
    view = memoryview(bytearray(RECEIVE_BYTES))
    offset = part.start
    while offset < part.stop:
        count = _some(connection.recv_into(view[: part.stop - offset]), offset)
        placed = 0
        while placed < count:
            placed += os.pwrite(memfd, view[placed:count], offset + placed)
        offset += count


def _into_mapping(connection: socket.socket, memfd: int, memory: memoryview, part: range) -> None:
    offset = part.start
    while offset < part.stop:
        end = min(offset + RECEIVE_BYTES, part.stop)
        offset += _some(connection.recv_into(memory[offset:end]), offset)


LANDINGS: dict[str, Callable[[socket.socket, int, memoryview, range], None]] = {
    "cold": _by_pwrite,
    "populated": _into_mapping,
}


def _some(count: int, offset: int) -> int:
    if not count:
        raise EOFError(f"ended at {offset}")
    return count


def _send(size_bytes: int, content: str, port: int, channels: int) -> None:
    with open(content, "rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ))
    print("ready", flush=True)
    sys.stdin.readline()

    def give(part: range) -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(_PART.pack(part.start, part.stop))
            for offset in range(part.start, part.stop, SEND_BYTES):
                connection.sendall(memory[offset : min(offset + SEND_BYTES, part.stop)])
            if connection.recv(1) != b"!":
                raise EOFError("no acknowledgement")

    started = time.monotonic()
    with ThreadPoolExecutor(channels) as threads:
        for given in [threads.submit(give, part) for part in _parts(size_bytes, channels)]:
            given.result()
    print("took", time.monotonic() - started, flush=True)


if __name__ == "__main__":
    roles: dict[str, Callable[..., None]] = {
        "receive": lambda size, channels, landing: _receive(int(size), int(channels), landing),
        "send": lambda size, path, port, channels: _send(int(size), path, int(port), int(channels)),
    }
    if len(sys.argv) < 2 or sys.argv[1] not in roles:
        sys.exit(__doc__)
    roles[sys.argv[1]](*sys.argv[2:])
