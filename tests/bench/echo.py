"""The yardstick of fault latency: a process that answers 12 bytes with a page, over one blocking socket.

The rule of the file: as little as possible. Says ``port N``; ends with its connection.
"""

from __future__ import annotations

import socket

from migrated.kernel.memory import PAGE_SIZE


def main() -> None:
    """Answer one connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    print("port", listener.getsockname()[1], flush=True)
    sock, _ = listener.accept()
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        page = bytes(PAGE_SIZE)
        while sock.recv(12):
            sock.sendall(page)


if __name__ == "__main__":
    main()
