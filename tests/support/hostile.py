"""Streams that must be refused, each with what the refusal has to say: one table.

The rule of the file: data only, made with `craft`. A case begins as a good stream does and goes wrong at one place;
`says` lists what an operator must find in the refusal: what, where, expected, found.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support import craft
from tests.support.craft import CONTINUE, DELTA, EOS, FULL, PAGE, PART, RAM_ID, START, WHOLE, ZERO

MEMORY = {"mem0": random.Random(1).randbytes(6 * PAGE) + bytes(9 * PAGE) + b"\7" * PAGE, "vram": bytes(4 * PAGE)}
DEVICES = {"disk": bytes(range(16))}
BLOCKS = {name: len(content) for name, content in MEMORY.items()}
SECTION = {"idstr": "disk", "instance_id": 0, "version_id": 1, "live": False}
#: What a `migrated` source would say before it sends this machine.
NEEDS: dict[str, object] = {
    "protocol": 1, "tool": "test", "dry_run": False, "migration_id": "m", "name": "kv", "machine_type": "none",
    "uuid": None, "clock_ms": 0, "capabilities": {}, "parameters": {},
    "blocks": [{"name": name, "size_bytes": size, "page_size": 4096} for name, size in BLOCKS.items()],
    "sections": [{"idstr": "ram", "instance_id": 0, "version_id": 4, "live": True}, SECTION],
}  # fmt: skip

HEAD = craft.header() + craft.configuration()
LEAD = HEAD + craft.open_return_path()
RAM = craft.ram_start(craft.block_list(BLOCKS.items()))
ALL_PAGES = b"".join(craft.ram_part(craft.pages(name, content), PART) for name, content in MEMORY.items())
WHOLE_RAM = RAM + ALL_PAGES + craft.ram_part(b"")
TAIL = craft.device("disk", DEVICES["disk"]) + craft.globalstate("paused")
ALL_BUT_THE_END = LEAD + WHOLE_RAM + TAIL
HUGE32, HUGE63 = 2**32 - 1, 2**63


@dataclass(frozen=True)
class Case:
    """One bad stream. ``told``: the source has a return path, so it must be told (SHUT 1)."""

    name: str
    stream: bytes
    says: tuple[str, ...]
    told: bool = True


def head(name: str, stream: bytes, *says: str) -> Case:
    """Refused before there is a return path."""
    return Case(name, stream, says, told=False)


def after_lead(name: str, stream: bytes, *says: str) -> Case:
    return Case(name, LEAD + stream, says)


def in_blocks(name: str, body: bytes, *says: str) -> Case:
    """Something is wrong with the block list."""
    return after_lead(f"block list, {name}", craft.ram_start(body), "section ram", *says)


def in_pages(name: str, record: bytes, *says: str) -> Case:
    """Something is wrong with a record behind a good block list."""
    return after_lead(f"pages, {name}", RAM + craft.short_head(PART, RAM_ID) + record, "section ram", *says)


def in_device(name: str, stream: bytes, *says: str) -> Case:
    return after_lead(f"device, {name}", WHOLE_RAM + stream, *says)


def config(name: str, section: bytes, *says: str) -> Case:
    return head(f"configuration, {name}", craft.header() + section + craft.open_return_path() + RAM, *says)


def misfit(name: str, section: bytes, *says: str) -> Case:
    """A good configuration, of a machine that does not belong here: its source may ask what else stands in its way."""
    return Case(f"configuration, {name}", craft.header() + section + craft.open_return_path() + RAM, says)


def _head_cases() -> Iterator[Case]:
    in_head = "section stream header"
    magic = "expected 0x5145564d"
    yield head("wrong magic", b"QEVN" + LEAD[4:], "Not a migration stream", magic, "found 0x5145564e", in_head)
    yield head("http", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "Not a migration stream", magic, in_head)
    yield head("zeros", bytes(1 << 16), "Not a migration stream", "found 0x0")
    for seed in range(3):
        yield head(f"garbage {seed}", random.Random(seed).randbytes(1 << 16), "Not a migration stream", magic)
    yield head("version 2", craft.header(version=2) + HEAD[8:], "v2 format is obsolete", "expected 3", "found 2")
    yield head("version 4", craft.header(version=4) + HEAD[8:], "Unsupported migration stream version", "found 4")
    yield head("no configuration", craft.header() + RAM, "Configuration section missing", "expected 0x07", "found 0x01")


def _configuration_cases() -> Iterator[Case]:
    bits, names, uuid = (f"configuration/{name}" for name in ("target-page-bits", "capabilities", "uuid"))
    for name in ("other", "no", "nonesuch", ""):
        yield misfit(
            f"machine type {name!r}",
            craft.configuration(name),
            f"Machine type received is '{name}' and local is 'none'",
        )
    yield config("long name", craft.configuration(length=HUGE32), "too long", "at most 255", f"found {HUGE32}")
    # What is shown must not steer a terminal, nor break a JSON reader that knows no NUL.
    yield config("name of a terminal", craft.configuration("\x1b[2J"), "cannot be printed", "found b'\\x1b[2J'")
    yield config("name no text", b"\x07" + craft.number(4, 4) + b"\xff\xfe\xfd\xfc", "not UTF-8", "configuration")

    def sub(title: str, body: bytes, version: int = 1) -> bytes:
        return craft.configuration(subsections=craft.subsection(title, body, version))

    yield config(
        "unknown subsection", sub("configuration/magic", b""), "unknown subsection", "found configuration/magic"
    )
    yield config("subsection v9", sub(uuid, bytes(16), 9), f"unsupported version of subsection {uuid}", "found 9")
    twice = craft.configuration(subsections=craft.subsection(uuid, bytes(16)) * 2)
    yield config("subsection twice", twice, "subsection sent twice", uuid)
    yield misfit("page bits", sub(bits, craft.number(14, 4)), "Received TARGET_PAGE_BITS is 14 but local is 12")
    one = craft.number(1, 4) + craft.name("x-ignore-shared")
    yield misfit("capability", sub(names, one), "Capability x-ignore-shared is off, but received capability is on")
    yield config("capabilities", sub(names, craft.number(HUGE32, 4)), "too long", "at most 64", f"found {HUGE32}")


def _command_cases() -> Iterator[Case]:
    yield head("ping without return path", HEAD + craft.ping(7), "CMD_PING (0x7) received with no return path")
    no_path = "did not open a return path", "expected OPEN_RETURN_PATH", "x-migrated-allow-no-return-path"
    yield head("no return path", HEAD + RAM, *no_path)
    yield after_lead("command 0", craft.command(0), "MIG_CMD 0x0 unknown (len 0x0)")
    yield after_lead("command 99", craft.command(99, b"abc"), "MIG_CMD 0x63 unknown (len 0x3)")
    yield after_lead("long ping", craft.command(craft.PING, bytes(8)), "PING received with bad length", "expecting 4")
    for number, name in ((8, "ENABLE_COLO"), (11, "SWITCHOVER_START")):
        yield after_lead(name, craft.command(number), f"command {name} is not implemented", f"found {name}")


def _preflight_cases() -> Iterator[Case]:
    """What a source says it needs, before anything moves."""

    def piece(body: bytes, more: int = 0) -> bytes:
        return craft.command(0x4D10, bytes([more]) + body)

    def said(body: bytes) -> bytes:
        return piece(body) + RAM

    complete = json.dumps(NEEDS).encode()
    yield after_lead("needs, nothing", craft.command(0x4D10) + RAM, "X_PREFLIGHT goes on or not", "found nothing")
    yield after_lead("needs, of a kind", piece(b"", 2), "X_PREFLIGHT goes on or not", "found 02")
    yield after_lead("needs, no JSON", said(b"{"), "X_PREFLIGHT cannot be understood", "section preflight")
    yield after_lead("needs, deep", said(b"[" * 60000), "X_PREFLIGHT cannot be understood")
    yield after_lead("needs, nobody's", said(b"{}"), "X_PREFLIGHT cannot be understood", "missing required field")
    endless = piece(b" " * 65000, 1) * 65
    yield after_lead("needs, endless", endless, "X_PREFLIGHT is too long", "at most 4194304 bytes")
    odd = json.dumps({**NEEDS, "name": "kv\x1b[2J"}).encode()
    yield after_lead("needs, a name for a terminal", said(odd), "characters that cannot be printed")
    yield after_lead("needs, twice", piece(complete) + piece(complete), "X_PREFLIGHT behind the last one")
    negative = {**NEEDS, "blocks": [{"name": "mem0", "size_bytes": -1, "page_size": 4096}]}
    yield after_lead(
        "needs, less than nothing", said(json.dumps(negative).encode()), "X_PREFLIGHT cannot be understood"
    )
    many = {**NEEDS, "sections": [SECTION] * 4097}
    yield after_lead("needs, 4097 sections", piece_of(json.dumps(many).encode()), "X_PREFLIGHT cannot be understood")
    late = RAM + piece(complete)
    yield after_lead("needs, late", late, "command X_PREFLIGHT is not implemented")


def piece_of(body: bytes) -> bytes:
    """Return a preflight in as many commands as it takes."""
    parts = [body[at : at + 65000] for at in range(0, len(body), 65000)]
    return b"".join(craft.command(0x4D10, bytes([at < len(parts) - 1]) + part) for at, part in enumerate(parts))


def _postcopy_cases() -> Iterator[Case]:
    def discard(block: str = "mem0", start: int = 0, length: int = PAGE, version: int = 0, end: int = 0) -> bytes:
        ranges = craft.number(start, 8) + craft.number(length, 8)
        return craft.command(6, bytes([version]) + craft.name(block) + bytes([end]) + ranges)

    def advise(*sizes: int) -> bytes:
        return craft.command(3, b"".join(craft.number(size, 8) for size in sizes))

    def packaged(content: bytes) -> bytes:
        return craft.command(7, craft.number(len(content), 4)) + content

    good, listen, run = advise(PAGE, PAGE), craft.command(4), craft.command(5)
    wrong = "in wrong postcopy state"
    yield after_lead("advise of nothing", advise(), "RAM postcopy is enabled but have 0 byte advise")
    yield after_lead("short advise", advise(PAGE), "CMD_POSTCOPY_ADVISE invalid length (8)")
    sizes = "Postcopy needs matching RAM page sizes (s=40201000 d=201000)"
    yield after_lead("advise of huge pages", advise(0x40201000, PAGE), sizes)
    sizes = "Postcopy needs matching target page sizes (s=8192 d=4096)"
    yield after_lead("advise of other pages", advise(PAGE, 2 * PAGE), sizes)
    yield after_lead("advise twice", good + good, f"CMD_POSTCOPY_ADVISE {wrong} (1)", "expected NONE", "found ADVISE")
    yield after_lead("discard unadvised", discard(), f"CMD_POSTCOPY_RAM_DISCARD {wrong} (0)")
    yield after_lead("listen unadvised", listen, f"CMD_POSTCOPY_LISTEN {wrong} (0)", "expected ADVISE or DISCARD")
    yield after_lead("run unadvised", run, f"CMD_POSTCOPY_RUN {wrong} (0)", "expected LISTENING")
    yield after_lead("listen in the middle", WHOLE_RAM + listen, f"CMD_POSTCOPY_LISTEN {wrong} (0)")
    for name, command, *says in (
        ("unknown block", discard("ghost"), "Can't find block ghost"),
        ("odd range", discard(start=1), "discard of a wrong range", "whole pages below 0x10000"),
        ("beyond", discard(start=16 * PAGE), "discard of a wrong range", "found 0x1000 bytes from 0x10000"),
        ("2^63", discard(start=HUGE63, length=HUGE63), "discard of a wrong range"),
        ("version", discard(version=1), "CMD_POSTCOPY_RAM_DISCARD invalid version (1)"),
        ("no nil", discard(end=7), "CMD_POSTCOPY_RAM_DISCARD missing nil (7)"),
        ("short", craft.command(6, bytes(5)), "CMD_POSTCOPY_RAM_DISCARD invalid length (5)"),
    ):
        yield after_lead(f"discard, {name}", good + RAM + command, *says)
    huge = craft.command(7, craft.number(HUGE32, 4))
    yield after_lead("package of 4 GiB", huge, f"Unreasonably large packaged state: {HUGE32}", "at most 268435456")
    yield after_lead("package, cut", craft.command(7, craft.number(100, 4)) + bytes(50), "the stream ends too early")
    lead = good + RAM + discard()
    yield after_lead("package, empty", lead + packaged(b""), "the stream ends too early")
    yield after_lead("package without LISTEN", lead + packaged(run), f"CMD_POSTCOPY_RUN {wrong} (2)")
    yield after_lead("package without RUN", lead + packaged(listen), "the stream ends too early")
    yield after_lead("package with LISTEN twice", lead + packaged(listen * 2), f"CMD_POSTCOPY_LISTEN {wrong} (3)")
    # The main connection is read beside the package from LISTEN on: its end is noticed first.
    unknown = packaged(listen + craft.full("e1000", bytes(4)) + run)
    yield after_lead("package, unknown device", lead + unknown, "the stream ends too early")
    outside = "expected status postcopy-recover", "found active"
    yield after_lead("resume", craft.command(9), "POSTCOPY_RESUME outside a recovery", *outside)
    yield after_lead("bitmap", craft.command(10, craft.name("mem0")), "RECV_BITMAP outside a recovery", *outside)


def _element_cases() -> Iterator[Case]:
    for kind in (5, 6, 7, 9, 0x7E, 0xFF):
        yield after_lead(f"element {kind}", bytes([kind]) + bytes(40), f"Unknown savevm section type {kind}")
    unknown = "Unknown savevm section"
    yield after_lead("PART of nothing", craft.ram_part(b"", PART, 77), f"{unknown} 77", "found a PART section")
    yield after_lead("END of nothing", craft.ram_part(b"", 3, HUGE32), f"{unknown} {HUGE32}", "found a END section")
    yield after_lead("no idstr", craft.full_head(FULL, 9, "", 0, 1), "Unable to read ID string for section 9")
    yield after_lead("idstr no text", craft.full_head(FULL, 9, b"\xff\xfe", 0, 1), "not UTF-8")
    yield after_lead("ram v3", craft.full_head(START, 2, "ram", 0, 3), "another version", "expected 4", "found 3")
    yield after_lead("ram v5", craft.full_head(START, 2, "ram", 0, 5), "unsupported version 5 for 'ram' v4")
    yield after_lead("ram 1", craft.full_head(START, 2, "ram", 1, 4), "not declared within", "device ram")
    yield after_lead("nothing at all", craft.EOF + craft.description(), "the stream ended without a machine")
    short = craft.short_head(3, RAM_ID) + craft.record(EOS)
    yield after_lead("no footer", RAM + short + b"\x08", "Missing section footer for ram", "0x7e", "found 0x08")
    wrong = short + craft.footer(9)
    yield after_lead("wrong footer", RAM + wrong, "Mismatched section id in footer for ram - read 0x9 expected 0x2")


def _block_cases() -> Iterator[Case]:
    good = list(BLOCKS.items())
    yield in_blocks("wrong size", craft.block_list([("mem0", 17 * PAGE)]), "Size mismatch: mem0: 0x11000 != 0x10000")
    yield in_blocks("twice", craft.block_list([*good, good[0]]), "bad name in the block list", "found 'mem0' twice")
    yield in_blocks("no name", craft.block_list([("", PAGE)]), "bad name in the block list", "found ''")
    yield in_blocks("name with a NUL", craft.block_list([("mem\0", PAGE)]), "cannot be printed", "found b'mem\\x00'")
    yield in_blocks("name no text", craft.block_list([(b"\xff\xff", PAGE)]), "not UTF-8")
    yield in_blocks(
        "odd length", craft.block_list([("mem0", 4097)], PAGE * 2), "bad length", "0x1001", "multiple of 4096"
    )
    yield in_blocks("length 0", craft.block_list([("mem0", 0)], PAGE), "bad length of RAM block 'mem0'", "found 0x0")
    huge = craft.block_list([("mem0", HUGE63)], HUGE63)
    yield in_blocks("length 2^63", huge, "mem0", f"{HUGE63:#x}", "expected")
    yield in_blocks("more than the total", craft.block_list(good, 5 * PAGE), "bad length", "at most 0x5000", "0x10000")
    many = [(f"b{i}", PAGE) for i in range(5000)]
    yield in_blocks("5000 blocks", craft.block_list(many), "too many RAM blocks", "at most 4096")
    again = RAM + craft.short_head(PART, RAM_ID) + craft.block_list(good)
    yield after_lead("block list, again", again, "Unknown combination of migration flags: 0x4", "section ram")
    unknown = craft.ram_start(craft.block_list([("ghost", PAGE)]))
    yield after_lead("block list, unknown block", unknown, "not declared within", "RAM block ghost")


def _page_cases() -> Iterator[Case]:
    page = bytes(PAGE)
    first = craft.record(WHOLE, "mem0", b"x" * PAGE)
    yield in_pages(
        "beyond", craft.record(0x10000 | WHOLE, "mem0", page), "Illegal RAM offset 10000", "10000 in block mem0"
    )
    yield in_pages("beyond, zero", craft.record(0x10000 | ZERO, "mem0", b"\0"), "Illegal RAM offset 10000")
    yield in_pages("2^63", craft.record(HUGE63 | WHOLE, "mem0", page), "Illegal RAM offset 8000000000000000")
    run = b"".join(craft.record(i * PAGE | ZERO | CONTINUE, None, b"\0") for i in range(1, 20))
    yield in_pages("beyond in a run", first + run, "Illegal RAM offset 10000", "expected less than")
    run = b"".join(craft.record(i * PAGE | WHOLE | CONTINUE, None, page) for i in range(1, 20))
    yield in_pages("beyond in a run of pages", first + run, "Illegal RAM offset 10000", "expected less than")
    yield in_pages("unknown block", craft.record(WHOLE, "ghost", page), "Can't find block ghost")
    yield in_pages("block no text", craft.record(WHOLE, b"\xff\xfe", page), "not UTF-8")
    yield in_pages("continued from nothing", craft.record(WHOLE | CONTINUE, None, page), "Ack, bad migration stream!")
    for flags in (0, 0x01, 0x18, 0x30, 0x80, 0x200, DELTA | ZERO, WHOLE | ZERO):
        said = f"Unknown combination of migration flags: {flags:#x}"
        yield in_pages(f"flags {flags:#x}", craft.record(flags, "mem0", page), said)
    for name, delta, said in (
        ("early", b"\5\1\xbb", "expected one for a page that has arrived"),
        ("nothing new", b"\5\0", "found an empty run"),
        ("beyond", b"\xff\x1f\2ab", "found a run up to byte 4097"),
    ):
        head = b"\1" + len(delta).to_bytes(2, "big")
        record = craft.record(DELTA, "mem0", head + delta)
        yield in_pages(f"delta, {name}", record if name == "early" else first + record, said)
    yield in_pages("delta, wrong encoding", craft.record(DELTA, "mem0", b"\2\0\0"), "wrong compression", "found 2")
    yield in_pages("delta, too long", craft.record(DELTA, "mem0", b"\1\x10\1"), "len overflow", "found 4097")
    yield in_pages("compressed", craft.record(0x100, "mem0", page), "unexpected compressed page")
    yield in_pages("EOS with an offset", craft.record(PAGE | EOS), "Unknown combination of migration flags: 0x10")
    before = craft.ram_start(craft.record(EOS)) + craft.ram_part(first)
    yield after_lead("pages, before the block list", before, "Can't find block mem0", "section ram")


def _device_cases() -> Iterator[Case]:
    yield in_device("unknown", craft.full("0000:00:02.0/e1000", bytes(8)), "not declared within", "0000:00:02.0/e1000")
    yield in_device("instance 7", craft.full("disk", bytes(8), instance=7), "'disk' 7", "expected one of", "disk/0")
    yield in_device("version 9", craft.full("disk", bytes(8), version=9), "unsupported version 9 for 'disk' v1")
    yield in_device("id of ram", craft.full("disk", bytes(8), RAM_ID), "announced twice", "expected ram", "found disk")
    yield in_device(
        "2^32 bytes", craft.full("disk", craft.number(HUGE32, 4)), "disk", "too long", f"found {HUGE32} bytes"
    )
    yield in_device("promise of 1 GiB", craft.full("disk", craft.number(1 << 30, 4)), "ends too early", "disk (FULL)")
    yield in_device("too short", craft.full("disk", craft.number(2, 4) + bytes(9)), "Missing section footer for disk")
    yield in_device("too long", craft.full("disk", craft.number(20, 4) + bytes(9)), "disk", "end")
    state = craft.number(7, 4) + b"flying".ljust(100, b"\0")
    yield in_device("run state", craft.full("globalstate", state), "invalid parameter value: flying", "globalstate")
    state = craft.number(5, 4) + b"\x1b\n\r\x7f".ljust(100, b"\0")
    yield in_device("run state of a terminal", craft.full("globalstate", state), "value: ???? (section globalstate")
    state = craft.number(HUGE32, 4) + b"running".ljust(100, b"\0")
    yield in_device(
        "run state length", craft.full("globalstate", state), "globalstate", "wrong length", f"found {HUGE32}"
    )
    state = craft.number(8, 4) + b"\xff" * 100
    yield in_device("run state no text", craft.full("globalstate", state), "globalstate")


def _end_cases() -> Iterator[Case]:
    end = craft.EOF + craft.description()
    yield after_lead(
        "no pages", RAM + TAIL + end, "before all memory had arrived", "mem0: 16 of 16 pages", "vram: 4 of 4"
    )
    one = craft.pages("mem0", MEMORY["mem0"])[: -8 - PAGE]
    most = RAM + craft.ram_part(one) + craft.ram_part(craft.pages("vram", MEMORY["vram"])) + TAIL
    yield after_lead("one page missing", most + end, "missing mem0: 1 of 16 pages", "section ram")
    only = craft.ram_start(craft.block_list([("vram", BLOCKS["vram"])]))
    only += craft.ram_part(craft.pages("vram", MEMORY["vram"])) + TAIL
    yield after_lead("one block missing", only + end, "missing mem0: 16 of 16 pages")
    yield after_lead("no device", WHOLE_RAM + craft.globalstate("running") + end, "without the state of disk/0")
    nothing = "ends too early", "section vmdescription"
    yield Case("no description", ALL_BUT_THE_END + craft.EOF, nothing)
    yield Case("half a description", ALL_BUT_THE_END + end[:-7], nothing)
    other = "Expected vmdescription section, but got 3"
    yield Case("something else", ALL_BUT_THE_END + craft.EOF + craft.ram_part(b""), (other,))
    long = "VMDESCRIPTION is too long", "expected at most 67108864 bytes", f"found {HUGE32} bytes"
    behind = "the source goes on after its description", "expected nothing behind it", "found 4 bytes"
    yield Case("something behind it", ALL_BUT_THE_END + end + b"more", behind)
    yield Case("long description", ALL_BUT_THE_END + craft.EOF + craft.description(b"", HUGE32), long)


CASES = [
    *_head_cases(),
    *_configuration_cases(),
    *_command_cases(),
    *_preflight_cases(),
    *_postcopy_cases(),
    *_element_cases(),
    *_block_cases(),
    *_page_cases(),
    *_device_cases(),
    *_end_cases(),
]
