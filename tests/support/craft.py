"""Migration streams made by hand, good and bad ones: a small builder that shares nothing with the product.

The rule of the file: written from the description of the format; every number may be a wrong one. A stream is a list
of pieces, one per element (or part of one that a test wants to cut off), so that borders are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

PAGE = 4096
START, PART, END, FULL = 1, 2, 3, 4
ZERO, MEM_SIZE, WHOLE, EOS, CONTINUE, DELTA = 0x02, 0x04, 0x08, 0x10, 0x20, 0x40
OPEN_RETURN_PATH, PING, ADVISE, LISTEN, RUN, DISCARD, PACKAGED = 1, 2, 3, 4, 5, 6, 7
#: Ping values: what a QEMU begins with, and what a `migrated` source does.
QEMUS_PING, OUR_PING = 1, 0x4D494752
RAM_ID, DEVICE_ID = 2, 40
#: Between two `migrated` daemons. An offer is named by a counted text and an epoch.
OFFER, COMMIT, WITHDRAW = 0x4D02, 0x4D03, 0x4D04

EOF = b"\0"


def number(value: int, count: int) -> bytes:
    return value.to_bytes(count, "big")


def name(text: str | bytes) -> bytes:
    """A counted string."""
    raw = text if isinstance(text, bytes) else text.encode()
    return bytes([len(raw)]) + raw


def header(magic: bytes = b"QEVM", version: int = 3) -> bytes:
    return magic + number(version, 4)


def configuration(machine_type: str = "none", subsections: bytes = b"", length: int | None = None) -> bytes:
    raw = machine_type.encode()
    return b"\x07" + number(len(raw) if length is None else length, 4) + raw + subsections


def subsection(title: str, body: bytes, version: int = 1) -> bytes:
    return b"\x05" + name(title) + number(version, 4) + body


def command(what: int, payload: bytes = b"", length: int | None = None) -> bytes:
    return b"\x08" + number(what, 2) + number(len(payload) if length is None else length, 2) + payload


def ping(value: int = QEMUS_PING) -> bytes:
    return command(PING, number(value, 4))


def open_return_path(value: int = QEMUS_PING) -> bytes:
    return command(OPEN_RETURN_PATH) + ping(value)


def offer(migration_id: bytes, epoch: int = 1, *, checked: int = 0) -> bytes:
    """An offer; ``checked``: a checksum follows each section."""
    return command(OFFER, name(migration_id) + number(epoch, 8) + bytes([checked]))


def commit(migration_id: bytes, epoch: int = 1, *, serves: int = 1) -> bytes:
    return command(COMMIT, name(migration_id) + number(epoch, 8) + bytes([serves]))


def withdrawal(migration_id: bytes, epoch: int = 1) -> bytes:
    return command(WITHDRAW, name(migration_id) + number(epoch, 8))


def footer(section_id: int) -> bytes:
    return b"\x7e" + number(section_id, 4)


def full_head(kind: int, section_id: int, idstr: str | bytes, instance: int, version: int) -> bytes:
    return bytes([kind]) + number(section_id, 4) + name(idstr) + number(instance, 4) + number(version, 4)


def short_head(kind: int, section_id: int) -> bytes:
    return bytes([kind]) + number(section_id, 4)


def ram_start(body: bytes, section_id: int = RAM_ID, version: int = 4) -> bytes:
    return full_head(START, section_id, "ram", 0, version) + body + footer(section_id)


def ram_part(body: bytes, kind: int = END, section_id: int = RAM_ID) -> bytes:
    return short_head(kind, section_id) + body + record(EOS) + footer(section_id)


def full(idstr: str, body: bytes, section_id: int = DEVICE_ID, instance: int = 0, version: int = 1) -> bytes:
    return full_head(FULL, section_id, idstr, instance, version) + body + footer(section_id)


def block_list(blocks: Iterable[tuple[str | bytes, int]], total: int | None = None) -> bytes:
    """The body of the START section, with its EOS."""
    entries = list(blocks)
    word = sum(length for _, length in entries) if total is None else total
    return number(word | MEM_SIZE, 8) + b"".join(name(n) + number(s, 8) for n, s in entries) + record(EOS)


def record(word: int, block: str | bytes | None = None, body: bytes = b"") -> bytes:
    """One record: offset and flags, a block name where there is one, the body."""
    return number(word, 8) + (name(block) if block is not None else b"") + body


def pages(block: str, content: bytes) -> bytes:
    """Records for all pages of a block; pages of zeros as zero records."""
    records = []
    for at in range(0, len(content), PAGE):
        page = content[at : at + PAGE]
        flags, body = (WHOLE, page) if any(page) else (ZERO, b"\0")
        records.append(record(at | flags | (CONTINUE if at else 0), None if at else block, body))
    return b"".join(records)


def globalstate(run_state: str) -> bytes:
    raw = run_state.encode()
    return full("globalstate", number(len(raw) + 1, 4) + raw.ljust(100, b"\0"), section_id=4)


def device(idstr: str, state: bytes, section_id: int = DEVICE_ID, version: int = 1) -> bytes:
    """A device of an attached workload: its state's length and its state."""
    return full(idstr, number(len(state), 4) + state, section_id, version=version)


def description(text: bytes = b'{"page_size": 4096, "devices": []}', length: int | None = None) -> bytes:
    return b"\x06" + number(len(text) if length is None else length, 4) + text


def machine(
    memory: Mapping[str, bytes],
    devices: Mapping[str, bytes],
    *,
    run_state: str = "paused",
    return_path: bool = True,
    ping_value: int = QEMUS_PING,
) -> list[bytes]:
    """A good stream of a whole machine, in pieces."""
    lead = [header(), configuration()]
    if return_path:
        lead += [command(OPEN_RETURN_PATH), ping(ping_value)]
    listed = [(block, len(content)) for block, content in memory.items()]
    ram = [ram_start(block_list(listed))]
    ram += [ram_part(pages(block, content), PART) for block, content in memory.items()]
    ram += [ram_part(b"")]
    tail = [device(idstr, state, DEVICE_ID + i) for i, (idstr, state) in enumerate(devices.items())]
    return [*lead, *ram, *tail, globalstate(run_state), EOF, description()]


def join(pieces: Sequence[bytes]) -> bytes:
    return b"".join(pieces)


def borders(pieces: Sequence[bytes]) -> list[int]:
    """Offsets between the pieces, and the end."""
    found, at = [], 0
    for piece in pieces:
        at += len(piece)
        found.append(at)
    return found
