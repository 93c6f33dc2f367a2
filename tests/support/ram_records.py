"""Page records of pages that lie in an array, for tests: the sending side reads them from a memfd instead."""

from __future__ import annotations

from migrated.wire.ram import Bytes, Pages
from migrated.wire.ram_encoder import RamEncoder, bodies


def page_run(encoder: RamEncoder, block: str, pages: Pages, source: Bytes, out: Bytes) -> int:
    """Write page records for ``pages`` of ``source`` (pages of the block, PAGE) into ``out``; return their bytes."""
    count = min(len(pages), encoder.max_pages(len(out), block))
    bodies(out, encoder.body_offsets(block, count))[:] = source[pages[:count]]
    return encoder.page_heads(block, pages, out)
