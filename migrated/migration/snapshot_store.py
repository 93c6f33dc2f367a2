"""Where snapshots are kept: one directory for each tag, with a stream and its manifest.

    snapshots/TAG/stream           a valid migration stream
    snapshots/TAG/manifest.json    what is in it (`wire.manifest`)

The rule of the file: a snapshot is there whole or not at all. It is written aside, under a name that no tag can have,
and renamed when all of it is on the disk; it is renamed aside before it is deleted. What a daemon that died left aside
is cleared away by the next one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import aiofiles

from migrated.errors import CommandError, RemoteProtocolError
from migrated.transport.file import FILE_MODE, sync_directory
from migrated.transport.thread import in_thread
from migrated.wire.manifest import (
    MANIFEST_MAX_BYTES,
    Manifest,
    Summary,
    encode_manifest,
    parse_manifest,
    parse_summary,
)

STREAM, MANIFEST = "stream", "manifest.json"
#: A file name that is safe everywhere, and hidden ones are ours.
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@:-]{0,99}")
_ASIDE = "."
#: Memory contents are nobody else's business.
DIRECTORY_MODE = 0o700


class SnapshotStore:
    """The snapshots of one machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def clear(self) -> None:
        """Remove what a daemon that died left aside. Blocking; nobody else may be at work here."""
        if self._directory.is_dir():
            for path in self._directory.iterdir():
                if path.name.startswith(_ASIDE):
                    shutil.rmtree(path)

    def path(self, tag: str) -> Path:
        """Return the directory of a snapshot, there or not. Raises CommandError."""
        if _TAG.fullmatch(tag) is None:
            raise CommandError(
                f"Invalid snapshot tag {tag!r}: expected up to 100 letters, digits and signs of '_.+@:-', the first one"
                " a letter, a digit or '_'"
            )
        return self._directory / tag

    def require(self, tag: str) -> Path:
        """Return the directory of a snapshot that is there. Raises CommandError."""
        if not (path := self.path(tag)).is_dir():
            raise CommandError(f"Snapshot '{tag}' does not exist ({path} is not there)")
        return path

    def require_free(self, tag: str) -> None:
        """Raise CommandError if there is such a snapshot already."""
        if (path := self.path(tag)).exists():
            raise CommandError(f"Snapshot '{tag}' already exists ({path}). Next: delete it, or save under another tag")

    def _aside(self, tag: str) -> Path:
        return self._directory / f"{_ASIDE}{tag}"

    # -- writing -----------------------------------------------------------------------------------------------

    async def begin(self, tag: str) -> Path:
        """Return a new directory to write a snapshot into. Raises CommandError or OSError."""
        self.require_free(tag)
        aside = self._aside(tag)
        await in_thread(self._begin, aside)
        return aside

    def _begin(self, aside: Path) -> None:
        if not self._directory.exists():
            self._directory.mkdir(DIRECTORY_MODE)
            sync_directory(self._directory.parent)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(DIRECTORY_MODE)

    async def write_manifest(self, aside: Path, manifest: Manifest) -> None:
        """Write the manifest; it would survive a crash when this returns."""
        raw = await in_thread(encode_manifest, manifest)
        async with aiofiles.open(aside / MANIFEST, "xb", opener=_open_private) as file:
            await file.write(raw)
            await file.flush()
            await in_thread(os.fsync, file.fileno())

    async def commit(self, aside: Path, tag: str) -> None:
        """Let a snapshot that is all written appear; it would survive a crash when this returns. Raises OSError."""
        await in_thread(self._commit, aside, self.path(tag))

    def _commit(self, aside: Path, target: Path) -> None:
        sync_directory(aside)
        os.rename(aside, target)
        sync_directory(self._directory)

    async def discard(self, aside: Path) -> None:
        """Remove a snapshot that was not committed. Twice does no harm."""
        await in_thread(shutil.rmtree, aside, ignore_errors=True)

    async def delete(self, tag: str) -> None:
        """Remove a snapshot. Raises CommandError, or OSError with the snapshot as it was."""
        await in_thread(self._delete, self.require(tag), self._aside(tag))

    def _delete(self, path: Path, aside: Path) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        sync_directory(self._directory)
        shutil.rmtree(aside)

    # -- reading -----------------------------------------------------------------------------------------------

    async def summaries(self) -> Mapping[str, Summary | RemoteProtocolError]:
        """Return what there is, by tag; an error for what cannot be understood."""
        return await in_thread(self._summaries)

    def _summaries(self) -> Mapping[str, Summary | RemoteProtocolError]:
        found: dict[str, Summary | RemoteProtocolError] = {}
        paths = self._directory.iterdir() if self._directory.is_dir() else ()
        for path in sorted(path for path in paths if not path.name.startswith(_ASIDE)):
            try:
                found[path.name] = parse_summary(_read(path / MANIFEST))
            except RemoteProtocolError as error:
                found[path.name] = error
        return found


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a snapshot. Blocking. Raises RemoteProtocolError."""
    return parse_manifest(_read(directory / MANIFEST))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MANIFEST_MAX_BYTES + 1)
    except OSError as error:
        raise RemoteProtocolError(
            f"the manifest cannot be read: {error.strerror or error}", section="manifest", found=str(path)
        ) from error


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, FILE_MODE)
