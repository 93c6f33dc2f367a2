"""Damaged channels with pages (multifd, packed and not) and damaged deltas (XBZRLE) by the hundred.

What is damaged is refused, or is taken for what it says; the daemon holds nothing of it afterwards, and takes a good
machine in the end. Seeded as `test_fuzz_daemon`, by the same environment variables.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from migrated.wire.multifd import LONG_FORM, PLAIN, QEMU_FORM, Form, Initial, PacketFlag, encode_head, encode_initial
from migrated.wire.packing import METHODS, Packer, packers
from migrated.wire.xbzrle import encode_delta
from tests.faults.test_fuzz_daemon import BUGS, ROUNDS, SEED, SIZES
from tests.support import craft
from tests.support.craft import CONTINUE, DELTA, PAGE, PART, ZERO
from tests.support.holding_site import HoldingSite
from tests.support.hostile import BLOCKS, HEAD, LEAD, MEMORY, RAM, TAIL
from tests.support.mutate import EDGES
from tests.support.target import Target
from tests.support.visit import Visit

CHANNELS = 2
#: How long the daemon waits for what does not come; it is what a round without a channel takes.
SILENCE_MS = 150
END = craft.ram_part(b"") + TAIL + craft.EOF + craft.description()
#: Where a head has its numbers, and how long they are; the last ones are offsets of pages.
NUMBERS = [(at, 4) for at in range(0, 24, 4)] + [(24, 8), (56, 8), (64, 8), (320, 8), (328, 8), (1336, 8)]
#: One connection: its pieces, each of which is a packet or an element.
Pieces = list[bytes]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    directory: Path = tmp_path_factory.mktemp("fuzz")
    with HoldingSite("site", directory, blocks=BLOCKS, devices=SIZES, attach_timeout_s=0.02) as site:
        site.parameter("x-migrated-silence-timeout", SILENCE_MS)
        target = Target(site)
        target.settle()
        yield target


def packet(
    block: str, pages: list[int], flags: PacketFlag, packer: Packer | None = None, form: Form = QEMU_FORM
) -> bytes:
    content = b"".join(MEMORY[block][page * PAGE : (page + 1) * PAGE] for page in pages)
    packed = packer.pack(content) if packer is not None and pages else content
    head = np.zeros(form.head_bytes(len(pages)), np.uint8)
    name = block if pages else ""
    encode_head(head, name, np.array(pages, np.int64), form, flags=flags, size_bytes=len(packed))
    return head.tobytes() + packed


def channel(number: int, pages: list[int], method: PacketFlag) -> Pieces:
    """A channel that brings some pages of mem0, two in a packet: SYNCs for the beginning, for them, and for the end."""
    packer = packers(method, 1, 1)[0] if method else None
    sync = packet("", [], PacketFlag.SYNC)
    packets = [packet("mem0", pages[at : at + 2], method, packer) for at in range(0, len(pages), 2)]
    return [encode_initial(Initial(number)), sync, *packets, sync, sync]


def from_a_daemon() -> list[Pieces]:
    """The same as a `migrated` source sends it: packets as long as they are, of runs that are poured."""
    other = craft.ram_part(craft.pages("vram", MEMORY["vram"]), PART)
    count = BLOCKS["mem0"] // PAGE // CHANNELS
    sync = packet("", [], PacketFlag.SYNC, form=LONG_FORM)
    channels = [
        [
            encode_initial(Initial(number)),
            sync,
            packet("mem0", list(range(number * count, (number + 1) * count)), PLAIN, form=LONG_FORM),
            sync,
            sync,
        ]
        for number in range(CHANNELS)
    ]
    return [[HEAD, craft.open_return_path(craft.OUR_PING), RAM, other, END], *channels]


def over_channels(method: PacketFlag) -> list[Pieces]:
    """A machine whose pages come over channels; those that are zero come with the stream."""
    data = [page for page in range(BLOCKS["mem0"] // PAGE) if any(MEMORY["mem0"][page * PAGE : (page + 1) * PAGE])]
    zero = sorted(set(range(BLOCKS["mem0"] // PAGE)) - set(data))
    records = b"".join(
        craft.record(page * PAGE | ZERO | (CONTINUE if at else 0), None if at else "mem0", b"\0")
        for at, page in enumerate(zero)
    )
    records += craft.pages("vram", MEMORY["vram"])
    stream = [LEAD, RAM, craft.ram_part(records, PART), END]
    return [stream, *(channel(number, data[number::CHANNELS], method) for number in range(CHANNELS))]


def by_deltas() -> list[Pieces]:
    """A machine of which two pages come once more, as what is new in them."""
    whole = [craft.ram_part(craft.pages(name, content), PART) for name, content in MEMORY.items()]
    before, deltas = np.frombuffer(MEMORY["mem0"], np.uint8).reshape(-1, PAGE), []
    for page in (0, 15):
        after = before[page].copy()
        after[::97] ^= 0xFF
        delta = encode_delta(before[page], after)
        assert delta is not None
        word = page * PAGE | DELTA
        deltas.append(craft.record(word, "mem0", b"\1" + craft.number(len(delta), 2) + delta))
    return [[LEAD, RAM, *whole, craft.ram_part(b"".join(deltas), PART), END]]


def flip(generator: random.Random, pieces: Pieces) -> None:
    at, data = _pick(generator, pieces)
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    pieces[at] = bytes(data)


def number(generator: random.Random, pieces: Pieces) -> None:
    at, data = _pick(generator, pieces)
    where, size = generator.choice(NUMBERS) if len(data) > 336 else (generator.randrange(len(data)), 2)
    data[where : where + size] = craft.number(generator.choice(EDGES) % (1 << 8 * size), size)
    pieces[at] = bytes(data)


def cut(generator: random.Random, pieces: Pieces) -> None:
    at, data = _pick(generator, pieces)
    pieces[at:] = [bytes(data[: generator.randrange(len(data))])]


def remove(generator: random.Random, pieces: Pieces) -> None:
    del pieces[generator.randrange(len(pieces))]


def double(generator: random.Random, pieces: Pieces) -> None:
    at = generator.randrange(len(pieces))
    pieces.insert(at, pieces[at])


def swap(generator: random.Random, pieces: Pieces) -> None:
    one, other = generator.randrange(len(pieces)), generator.randrange(len(pieces))
    pieces[one], pieces[other] = pieces[other], pieces[one]


def noise(generator: random.Random, pieces: Pieces) -> None:
    at, data = _pick(generator, pieces)
    where = generator.randrange(len(data))
    data[where:where] = generator.randbytes(generator.choice((1, 8, 5000)))
    pieces[at] = bytes(data)


def _pick(generator: random.Random, pieces: Pieces) -> tuple[int, bytearray]:
    at = generator.choice([at for at, piece in enumerate(pieces) if piece])
    return at, bytearray(pieces[at])


STEPS: list[Callable[[random.Random, Pieces], None]] = [
    flip,
    flip,
    number,
    number,
    number,
    cut,
    remove,
    double,
    swap,
    noise,
]


def damaged(connections: list[Pieces], generator: random.Random) -> tuple[list[Pieces], str]:
    """Return damaged copies, and what was done to them."""
    copies, done = [list(pieces) for pieces in connections], []
    for _ in range(generator.randint(1, 3)):
        which = generator.randrange(len(copies))
        if any(copies[which]):
            step = generator.choice(STEPS)
            step(generator, copies[which])
            done.append(f"{step.__name__} in connection {which}")
    return copies, "; ".join(done)


def send(port: int, connections: list[Pieces]) -> None:
    """Send all of them at once, and hear the daemon out."""
    with ExitStack() as stack:
        visitors = [stack.enter_context(Visit(port)) for _ in connections]
        senders = [
            threading.Thread(target=visitor.say, args=(b"".join(pieces),), kwargs={"end": True})
            for visitor, pieces in zip(visitors, connections, strict=True)
        ]
        for sender in senders:
            sender.start()
        for visitor in visitors:
            visitor.hear()
        for sender in senders:
            sender.join()


def outcome(target: Target, connections: list[Pieces]) -> str:
    """Send all of them; return what is said of it. Nothing is left of it then, and the daemon waits for a machine."""
    target.site.capability("multifd", state=len(connections) > 1)
    send(target.port, connections)
    target.alone()
    answer = target.site.query()
    if answer.get("status") == "completed":
        target.site.capability("multifd", state=False)  # a file has no channels
        target.sends_it_away()
        return "completed"
    assert target.site.run_state() == "inmigrate"
    return str(answer.get("error-desc", ""))


KINDS = {
    "plain or zstd": ("auto", over_channels(PacketFlag.ZSTD)),
    "plain": ("auto", over_channels(PacketFlag(0))),
    "zlib": ("zlib", over_channels(PacketFlag.ZLIB)),
    "from a daemon": ("none", from_a_daemon()),
    "deltas": ("none", by_deltas()),
}


@pytest.mark.row(22, 23)
@pytest.mark.limit(90 + ROUNDS / 5)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_pages(kind: str, target: Target) -> None:
    method, connections = KINDS[kind]
    assert method in METHODS
    target.site.parameter("multifd-compression", method)
    assert outcome(target, connections) == "completed", "what is damaged here is taken where it is not damaged"
    said = set()
    for round_number in range(ROUNDS // len(KINDS)):
        pieces, what = damaged(connections, random.Random(f"{SEED}/{kind}/{round_number}"))
        try:
            said.add(outcome(target, pieces))
        except BaseException as error:
            error.add_note(f"seed {SEED}, {kind}, round {round_number}: {what}\n{target.site.log_tail()}")
            raise
    assert len(said) > min(ROUNDS // len(KINDS) // 20, 10), said
    assert outcome(target, connections) == "completed"
    log = target.site.log_path.read_text()
    assert [line for line in log.splitlines() if any(bug in line for bug in BUGS)] == []
