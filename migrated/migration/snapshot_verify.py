"""Verifying a snapshot from its files alone.

The rule of the file: nothing is changed, and no daemon is needed.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from migrated.migration.snapshot_store import STREAM, read_manifest
from migrated.transport.chunk_reader import verify_chunks
from migrated.wire.manifest import Manifest


def verify_snapshot(directory: Path) -> Manifest:
    """Compare every byte with the manifest, and return that. Blocking.

    Raises RemoteProtocolError, which names the first wrong chunk's section and offset.
    """
    manifest = read_manifest(directory)
    asyncio.run(verify_chunks(directory / STREAM, manifest))
    return manifest
