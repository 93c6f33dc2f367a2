"""A stream in chunks: onto the disk, back, and what a comparison finds."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_hexdigest

from migrated.errors import ChannelClosed, RemoteProtocolError
from migrated.transport import chunk_reader
from migrated.transport.chunk_file import create_chunk_file
from migrated.transport.chunk_reader import open_chunk_file, verify_chunks
from migrated.transport.thread import in_thread
from migrated.wire.manifest import CHUNK_MAX_BYTES, Chunk, Manifest, SavedMachine, SavedSection, hash_of

#: Two full chunks and a bit.
CONTENT = random.Random(1).randbytes(2 * CHUNK_MAX_BYTES + 12345)


async def write(path: Path, *parts: bytes, cuts: bool = True, expected: int = 1) -> list[Chunk]:
    writer = await create_chunk_file(path, expected)
    try:
        for part in parts:
            if cuts:
                writer.cut()
            await writer.send(part)
        await writer.finish()
    finally:
        await writer.close()
    return writer.chunks


def manifest_of(chunks: list[Chunk]) -> Manifest:
    """A manifest whose every chunk is a section of its own, but the first."""
    sections = tuple(
        SavedSection("FULL", f"dev{number}", 0, 1, chunk.offset, chunk.length, hash_of([chunk.hash]))
        for number, chunk in enumerate(chunks)
        if number
    )
    length = chunks[-1].offset + chunks[-1].length
    return Manifest(1, "test", "", SavedMachine("kv", "", "none", "running"), length, (), sections, tuple(chunks))


@pytest.mark.parametrize("directory", ["/var/tmp", "/dev/shm"])
async def test_chunks_end_at_cuts_and_where_a_write_does(directory: str) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as name:
        await check_chunks(Path(name) / "stream")


async def check_chunks(path: Path) -> None:
    chunks = await write(path, b"head", b"", CONTENT, b"x", expected=len(CONTENT))
    assert path.read_bytes() == b"head" + CONTENT + b"x"
    assert [chunk.length for chunk in chunks] == [4, CHUNK_MAX_BYTES, CHUNK_MAX_BYTES - 4, 12345 + 4, 1]
    whole = path.read_bytes()
    for chunk in chunks:
        assert chunk.hash == xxh3_128_hexdigest(whole[chunk.offset : chunk.offset + chunk.length])
    assert path.stat().st_mode & 0o777 == 0o600


async def test_room_that_was_not_needed_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    writer = await create_chunk_file(path, 10 << 20)
    assert path.stat().st_size == 10 << 20
    await writer.send(b"little")
    await writer.finish()
    await writer.close()
    await writer.close()
    assert path.read_bytes() == b"little"
    assert path.stat().st_blocks * 512 < 1 << 20


async def test_the_buffer_is_the_callers_again(tmp_path: Path) -> None:
    buffer = bytearray(CONTENT)
    writer = await create_chunk_file(tmp_path / "stream", 1)
    await writer.send(buffer)
    buffer[:] = bytes(len(buffer))
    await writer.finish()
    await writer.close()
    assert (tmp_path / "stream").read_bytes() == CONTENT


async def test_a_name_that_is_taken_and_a_disk_that_is_full(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"mine")
    with pytest.raises(ChannelClosed, match="File exists"):
        await create_chunk_file(tmp_path / "taken", 1)
    assert (tmp_path / "taken").read_bytes() == b"mine"
    with pytest.raises(ChannelClosed, match=r"Could not create a file of .* bytes: (No space left|File too large)"):
        await create_chunk_file(tmp_path / "huge", 1 << 62)


async def test_a_disk_that_fills_up_on_the_way(tmp_path: Path) -> None:
    writer = await create_chunk_file(tmp_path / "stream", 1)
    # Less than a chunk, so that nothing is written before `finish` waits for it.
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        await writer.send(CONTENT[: CHUNK_MAX_BYTES - 1])
        with pytest.raises(ChannelClosed, match="Unable to write to file: File too large"):
            await writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        await writer.close()


async def test_a_writer_has_no_way_back(tmp_path: Path) -> None:
    writer = await create_chunk_file(tmp_path / "stream", 1)
    writer.shutdown_write()
    writer.abort()
    with pytest.raises(ChannelClosed):
        await writer.receive_into(memoryview(bytearray(1)))
    await writer.close()


async def test_only_what_was_found_right_is_given_away(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    chunks = await write(path, b"head", CONTENT, b"x")
    reader = await open_chunk_file(path, manifest_of(chunks))
    found, view = bytearray(), memoryview(bytearray(reader.piece_bytes))
    while count := await reader.receive_into(view):
        found += view[:count]
    assert found == b"head" + CONTENT + b"x"
    assert reader.bytes_received == len(found)
    with pytest.raises(ChannelClosed):
        await reader.send(b"x")
    reader.shutdown_write()
    reader.abort()
    await reader.close()
    await reader.close()
    await flip(path, 4 + CHUNK_MAX_BYTES + 7)
    reader = await open_chunk_file(path, manifest_of(chunks))
    small = memoryview(bytearray(CHUNK_MAX_BYTES))
    assert [await reader.receive_into(small) for _ in range(2)] == [4, CHUNK_MAX_BYTES]
    with pytest.raises(RemoteProtocolError, match=r"section dev2/0 \(FULL\), stream offset 0x200004"):
        await reader.receive_into(small)
    await reader.close()
    await in_thread(os.truncate, path, 3)
    with pytest.raises(RemoteProtocolError, match="cut short"):
        await open_chunk_file(path, manifest_of(chunks))
    path.unlink()
    with pytest.raises(RemoteProtocolError, match="cannot be read: No such file"):
        await open_chunk_file(path, manifest_of(chunks))


async def test_a_comparison_that_finds_nothing(tmp_path: Path) -> None:
    chunks = await write(tmp_path / "stream", b"head", CONTENT, *[bytes([n]) * 100 for n in range(40)])
    read: list[int] = []
    await verify_chunks(tmp_path / "stream", manifest_of(chunks), read.append)
    assert sum(read) == (tmp_path / "stream").stat().st_size


async def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x10
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda path: flip(path, 0), r"damaged within 4 bytes, .*\(section stream header, stream offset 0x0\)"),
        (lambda path: flip(path, 4 + CHUNK_MAX_BYTES), r"\(section dev2/0 \(FULL\), stream offset 0x200004\)"),
        (lambda path: flip(path, 4 + len(CONTENT) + 3050), r"damaged within 100 bytes, .*section dev34/0"),
        (lambda path: in_thread(os.truncate, path, 3), r"cut short, .*found 3 bytes \(section stream header"),
        (lambda path: in_thread(path.unlink), "the stream cannot be read: No such file"),
        (lambda path: in_thread(os.truncate, path, 1 << 30), "goes on behind its end"),
    ],
)
async def test_a_comparison_names_the_place(
    tmp_path: Path, spoil: Callable[[Path], Coroutine[Any, Any, None]], text: str
) -> None:
    path = tmp_path / "stream"
    chunks = await write(path, b"head", CONTENT, *[bytes([n]) * 100 for n in range(40)])
    await spoil(path)
    with pytest.raises(RemoteProtocolError, match=text):
        await verify_chunks(path, manifest_of(chunks))


async def test_of_two_wrong_chunks_the_first_is_named(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    chunks = await write(path, *[bytes([n]) * 100 for n in range(100)])
    await flip(path, 9_000)
    await flip(path, chunk_reader.STRETCH_CHUNKS * 100)  # the other lane's
    with pytest.raises(RemoteProtocolError, match="section dev16/0"):
        await verify_chunks(path, manifest_of(chunks))


async def test_a_cancelled_writer_lets_go_of_nothing_that_a_thread_still_uses(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        writing = asyncio.ensure_future(write(tmp_path / "stream", CONTENT))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        (tmp_path / "stream").unlink(missing_ok=True)
    left = {fd for fd in set(os.listdir("/proc/self/fd")) - before if "stream" in os.readlink(f"/proc/self/fd/{fd}")}
    assert not left
