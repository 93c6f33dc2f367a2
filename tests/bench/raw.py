"""The yardstick "raw": blocking sockets and as little else as possible, in two processes.

The rule of the file: what Python can do without a protocol: ``sendall`` of 1 MiB views of the source mapping, receives
of 128 KiB, ``pwrite`` into a fresh memfd. Time runs from before connect until the receiver has acknowledged that the
last byte is in its memory.

Run as ``python -m tests.bench.raw receive SIZE`` (says ``port N``, then ``done``) and ``... send SIZE FILE PORT``
(says ``ready``, waits for a line, sends, says ``took SECONDS``).
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import time
from pathlib import Path

from migrated.kernel.memory import create_memfd
from tests.bench.host import MIB, warm
from tests.bench.processes import expect, module, running, tell

SEND_BYTES = MIB
RECEIVE_BYTES = 128 << 10


def push(content: Path, size_bytes: int, log: Path) -> float:
    """Push the content once and return the seconds it took."""
    with running(module("tests.bench.raw", "receive", size_bytes), log=log) as receiver:
        (port,) = expect(receiver, "port", log)
        with running(module("tests.bench.raw", "send", size_bytes, content, port), log=log) as sender:
            expect(sender, "ready", log)
            warm(size_bytes)
            tell(sender, "go")
            (seconds,) = expect(sender, "took", log)
            return float(seconds)


def _receive(size_bytes: int) -> None:
    memfd = create_memfd("raw", size_bytes)
    listener = socket.create_server(("127.0.0.1", 0))
    print("port", listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    view = memoryview(bytearray(RECEIVE_BYTES))
    offset = 0
    while offset < size_bytes:
        count = connection.recv_into(view)
        if not count:
            raise EOFError(f"{offset} of {size_bytes} bytes")
        placed = 0
        while placed < count:
            placed += os.pwrite(memfd, view[placed:count], offset + placed)
        offset += count
    connection.sendall(b"!")
    connection.close()


def _send(size_bytes: int, content: str, port: int) -> None:
    with open(content, "rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ))
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.monotonic()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for offset in range(0, size_bytes, SEND_BYTES):
        connection.sendall(memory[offset : offset + SEND_BYTES])
    if connection.recv(1) != b"!":
        raise EOFError("no acknowledgement")
    print("took", time.monotonic() - started, flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["receive", size]:
            _receive(int(size))
        case ["send", size, path, port]:
            _send(int(size), path, int(port))
        case _:
            sys.exit(__doc__)
