"""The source's queue of requested pages: first come, first served; nonsense is refused in QEMU's words."""

from __future__ import annotations

import pytest

from migrated.errors import RemoteProtocolError
from migrated.ram.page_requests import OPEN_MAX, PageRequests

PAGE = 4096


def queue() -> PageRequests:
    return PageRequests({"mem0": 16 * PAGE, "vram": 4 * PAGE})


def test_first_come_first_served() -> None:
    requests = queue()
    requests.add("mem0", 3 * PAGE, PAGE)
    requests.add(None, 0, 2 * PAGE)
    requests.add("vram", 3 * PAGE, PAGE)
    assert len(requests) == 3
    assert [requests.pop() for _ in range(3)] == [("mem0", 3, 4), ("mem0", 0, 2), ("vram", 3, 4)]
    assert not requests


@pytest.mark.parametrize(
    ("block", "start", "length", "text"),
    [
        ("mem0", 1, PAGE, "MIG_RP_MSG_REQ_PAGES: Misaligned page request, start: 1 len: 4096"),
        ("mem0", 0, 1, "Misaligned page request, start: 0 len: 1"),
        ("mem0", 0, 0, "Misaligned page request, start: 0 len: 0"),
        (None, 0, PAGE, "ram_save_queue_pages no previous block"),
        ("ghost", 0, PAGE, "ram_save_queue_pages no block 'ghost'"),
        ("vram", 4 * PAGE, PAGE, "ram_save_queue_pages request overrun start=4000 len=1000 blocklen=4000"),
        ("vram", 0, 5 * PAGE, "request overrun start=0 len=5000 blocklen=4000"),
    ],
)
def test_nonsense(block: str | None, start: int, length: int, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        queue().add(block, start, length)


def test_a_flood_is_refused() -> None:
    requests = queue()
    for _ in range(OPEN_MAX):
        requests.add("mem0", 0, PAGE)
    with pytest.raises(RemoteProtocolError, match="more than 65536 requests are open"):
        requests.add("mem0", 0, PAGE)
