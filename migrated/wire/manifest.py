"""The manifest of a snapshot: what is in its stream, and a hash of every piece of it.

The rule of the file: a manifest is believed only as a whole. It carries its own hash, its chunks cover the stream
without a gap, a chunk never crosses the border of a section, and a section's hash is that of its chunks' hashes; so a
wrong byte anywhere is found, and the chunk it is in says which section it belongs to.

Format: JSON, our own. Hashes are xxh3_128 in hexadecimal: they find damage, not forgery.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Annotated, TypeVar

import msgspec
from xxhash import xxh3_128_hexdigest

from migrated.errors import RemoteProtocolError

#: Raised with every change that an older version would misread; a version reads exactly its own.
FORMAT = 1
#: One write, one hash: large enough for the disk, small enough for the cache and to name the place of a wrong byte.
#: With half and with twice as much, writing was slower by a tenth or more.
CHUNK_MAX_BYTES = 2 << 20
#: 60 bytes describe 2 MiB of stream: this is enough for several TiB.
MANIFEST_MAX_BYTES = 256 << 20
#: What is not a section: header and configuration before the first, end and description behind the last.
HEADER, DESCRIPTION = "stream header", "vmdescription"

_MANIFEST = "manifest"
_Uuid = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?$")]


class _Part(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """Base: hyphenated member names, and no member that nobody knows."""


class SavedMachine(_Part, frozen=True):
    """The machine that was saved."""

    name: str
    uuid: _Uuid
    type: str
    run_state: str
    """What it did when it was stopped for the snapshot."""


class SavedBlock(_Part, frozen=True):
    """One RAM block; ``hash`` is that of its content (`ram.content`)."""

    name: str
    size: int
    page_size: int
    hash: str


class SavedSection(_Part, frozen=True):
    """One section of the stream, from its type byte to the end of its footer."""

    kind: str
    idstr: str
    instance_id: int
    version_id: int
    offset: int
    length: int
    hash: str

    @property
    def title(self) -> str:
        """How messages name it."""
        return f"{self.idstr}/{self.instance_id} ({self.kind})"


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A piece of the stream: ``[offset, length, hash]``."""

    offset: int
    length: int
    hash: str


class Manifest(_Part, frozen=True):
    """All of it. ``hash`` is that of the manifest with an empty one."""

    format: int
    tool: str
    created: str
    """UTC, ISO 8601."""
    machine: SavedMachine
    length: int
    """Bytes of stream."""
    blocks: tuple[SavedBlock, ...]
    sections: tuple[SavedSection, ...]
    chunks: tuple[Chunk, ...]
    hash: str = ""


class Summary(msgspec.Struct, frozen=True, rename="kebab"):
    """What a list shows of a manifest: read without looking at its chunks, and not checked."""

    format: int
    created: str
    machine: SavedMachine
    length: int
    blocks: tuple[SavedBlock, ...]


class _Version(msgspec.Struct, frozen=True):
    format: int


def hash_of(hashes: Iterable[str]) -> str:
    """Return the hash of what has these hashes."""
    return xxh3_128_hexdigest("".join(hashes).encode())


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode, with the manifest's own hash."""
    return _encode(msgspec.structs.replace(manifest, hash=_own_hash(manifest))) + b"\n"


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.encode(manifest)


def _own_hash(manifest: Manifest) -> str:
    return xxh3_128_hexdigest(_encode(msgspec.structs.replace(manifest, hash="")))


def parse_summary(raw: bytes) -> Summary:
    """Parse what a list shows. Raises RemoteProtocolError."""
    return _decode(raw, Summary)


def parse_manifest(raw: bytes) -> Manifest:
    """Parse and check. Raises RemoteProtocolError."""
    manifest = _decode(raw, Manifest)
    if (found := _own_hash(manifest)) != manifest.hash:
        raise RemoteProtocolError(
            "the manifest is damaged", section=_MANIFEST, expected=f"hash {manifest.hash}", found=f"hash {found}"
        )
    _check_chunks(manifest)
    return manifest


T = TypeVar("T", Summary, Manifest)


def _decode(raw: bytes, kind: type[T]) -> T:
    if len(raw) > MANIFEST_MAX_BYTES:
        raise RemoteProtocolError(
            "the manifest is too long",
            section=_MANIFEST, expected=f"at most {MANIFEST_MAX_BYTES} bytes", found=f"{len(raw)} bytes",
        )  # fmt: skip
    try:
        if (version := msgspec.json.decode(raw, type=_Version).format) != FORMAT:
            raise RemoteProtocolError(
                "this version does not read snapshots of that format",
                section=_MANIFEST, expected=f"format {FORMAT}", found=f"format {version}",
            )  # fmt: skip
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError("the manifest cannot be understood", section=_MANIFEST, found=str(error)) from error


def _check_chunks(manifest: Manifest) -> None:
    position = 0
    for chunk in manifest.chunks:
        if chunk.offset != position or not 0 < chunk.length <= CHUNK_MAX_BYTES:
            raise RemoteProtocolError(
                "the chunks do not cover the stream",
                section=_MANIFEST, offset=position, expected=f"at most {CHUNK_MAX_BYTES} bytes from {position:#x}",
                found=f"{chunk.length} bytes from {chunk.offset:#x}",
            )  # fmt: skip
        position += chunk.length
    if position != manifest.length:
        raise RemoteProtocolError(
            "the chunks do not cover the stream",
            section=_MANIFEST, expected=f"{manifest.length} bytes", found=f"{position} bytes",
        )  # fmt: skip
    position = 0
    for section in manifest.sections:
        inside = chunks_of(manifest.chunks, section.offset, section.length)
        if section.offset < position or hash_of(chunk.hash for chunk in inside) != section.hash:
            raise RemoteProtocolError(
                f"section {section.title} is not made of its chunks", section=_MANIFEST, offset=section.offset
            )
        position = section.offset + section.length


def chunks_of(chunks: Sequence[Chunk], offset: int, length: int) -> Sequence[Chunk]:
    """Return the chunks that begin within a range of the stream."""
    first, end = (bisect.bisect_left(chunks, at, key=lambda chunk: chunk.offset) for at in (offset, offset + length))
    return chunks[first:end]


def section_at(manifest: Manifest, offset: int) -> str:
    """Name the section that a byte of the stream is in."""
    index = bisect.bisect_right(manifest.sections, offset, key=lambda section: section.offset) - 1
    if index < 0:
        return HEADER
    section = manifest.sections[index]
    return section.title if offset < section.offset + section.length else DESCRIPTION


def check_length(manifest: Manifest, found: int) -> None:
    """Raise RemoteProtocolError unless the stream has as many bytes as the manifest says."""
    if found < manifest.length:
        raise RemoteProtocolError(
            "the stream is cut short",
            section=section_at(manifest, found), offset=found, expected=f"{manifest.length} bytes",
            found=f"{found} bytes",
        )  # fmt: skip
    if found > manifest.length:
        raise RemoteProtocolError(
            "the stream goes on behind its end",
            section=DESCRIPTION, offset=manifest.length, expected=f"{manifest.length} bytes", found=f"{found} bytes",
        )  # fmt: skip


def check_chunk(manifest: Manifest, chunk: Chunk, found: str) -> None:
    """Raise RemoteProtocolError unless the bytes of a chunk have its hash."""
    if found != chunk.hash:
        raise RemoteProtocolError(
            f"the stream is damaged within {chunk.length} bytes",
            section=section_at(manifest, chunk.offset), offset=chunk.offset, expected=f"hash {chunk.hash}",
            found=f"hash {found}",
        )  # fmt: skip
