"""What the thread of a channel with pages does: packets of them, from where they lie or from a copy.

The rule of the file: it knows a socket, a block and numbers of pages, and nothing of the event loop.

Long runs leave from where they lie: a page is sent as it is when the kernel gets to it, which may be later than it was
summed up. One that the machine wrote to in between differs from its sum, and is dirty: it goes again, and only the last
time has to be right (`ram.arrivals`). Scattered pages, and those that are packed, are read into a buffer. Pages that
are zero are not sent, but reported. Format: `wire.multifd`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migrated.kernel.memory import has_no_holes, is_resident
from migrated.model.packing_choice import JobCost
from migrated.ram.page_read import long_runs, read_pages, zero_pages
from migrated.savevm.ports import RamBlockPort
from migrated.transport.blocking import BlockingSocket
from migrated.wire.multifd import (
    CHECKED_FORM,
    PACKET_PAGES,
    PLAIN,
    QEMU_FORM,
    Form,
    PacketFlag,
    Sums,
    encode_head,
    page_sums,
)
from migrated.wire.packing import Packer
from migrated.wire.ram import PAGE

NO_PAGES = np.empty(0, np.int64)
#: Pages that follow each other: the first one, and what is in them, where it lies.
Runs = list[tuple[int, NDArray[np.uint8]]]
#: The longest head of pages that are copied.
_HEAD_ROOM_BYTES = CHECKED_FORM.head_bytes(PACKET_PAGES)
assert _HEAD_ROOM_BYTES >= QEMU_FORM.head_max_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Pages of a block to be sent; a SYNC where there is none."""

    block: RamBlockPort | None
    pages: NDArray[np.int64]
    form: Form
    packs: bool = False


@dataclass(slots=True, eq=False)
class Done:
    """What became of a job."""

    block: RamBlockPort | None
    zero: list[NDArray[np.int64]]
    """Pages that are for the main stream to tell."""
    pages: int = 0
    """How many it had."""
    took_s: float = 0.0
    normal: int = 0
    sent_bytes: int = 0
    pack_s: float = 0.0
    send_s: float = 0.0

    @property
    def cost(self) -> JobCost:
        return JobCost(self.normal * PAGE, self.sent_bytes, self.pack_s, self.send_s)


class _Packet:
    """A buffer for one packet of pages that are copied: room for the longest head, and the pages behind it."""

    def __init__(self) -> None:
        self._raw = np.empty(_HEAD_ROOM_BYTES + PACKET_PAGES * PAGE, np.uint8)
        self._rows = self._raw[_HEAD_ROOM_BYTES:].reshape(-1, PAGE)
        self._block = ""
        self.pages = NO_PAGES

    def read(self, block: RamBlockPort, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read pages as they are at this moment, and keep those that are not zero; return those that are."""
        rows = self._rows[: len(pages)]
        read_pages(block, pages, rows)
        zero = zero_pages(rows.view(np.uint64))
        self._block, self.pages = block.name, pages
        if not len(zero):
            return NO_PAGES
        keep = np.ones(len(pages), bool)
        keep[zero] = False
        self.pages = pages[keep]
        self._rows[: len(self.pages)] = rows[keep]
        return pages[zero]

    @property
    def content(self) -> memoryview:
        """The pages, one behind the other."""
        return self._raw[_HEAD_ROOM_BYTES : _HEAD_ROOM_BYTES + len(self.pages) * PAGE].data

    def sealed(self, form: Form, number: int, flags: PacketFlag = PLAIN, packed: bytes | None = None) -> memoryview:
        """Return what is to be sent, head and pages, these ``packed`` or as they are."""
        head_bytes = form.head_bytes(len(self.pages))
        size = len(self.pages) * PAGE if packed is None else len(packed)
        whole = self._raw[_HEAD_ROOM_BYTES - head_bytes : _HEAD_ROOM_BYTES + size]
        if packed is not None:
            whole = np.empty(head_bytes + size, np.uint8)
            whole[head_bytes:] = np.frombuffer(packed, np.uint8)
        sums = page_sums(self._rows[: len(self.pages)]) if form.checked else None
        encode_head(
            whole[:head_bytes], self._block, self.pages, form, number=number, flags=flags, size_bytes=size, sums=sums
        )
        return whole.data


def _sync_packet(form: Form, number: int) -> memoryview:
    """Return the packet behind which a channel waits."""
    head = np.empty(form.head_bytes(0), np.uint8)
    encode_head(head, "", NO_PAGES, form, number=number, flags=PacketFlag.SYNC)
    return head.data


class Sender:
    """One channel's end, as its thread uses it."""

    def __init__(self, end: BlockingSocket, numbers: Iterator[int], packer: Packer | None, method: PacketFlag) -> None:
        self._end = end
        self._numbers = numbers
        self._packer = packer
        self._method = method
        self._packet = _Packet()

    def do(self, job: Job, report: Done) -> None:
        """Send what a job says. Raises ChannelError."""
        if job.block is None:
            self._send(_sync_packet(job.form, next(self._numbers)), report)
            return
        for first in range(0, len(job.pages), job.form.room):
            self._send_pages(job, job.block, job.pages[first : first + job.form.room], report)

    def _send_pages(self, job: Job, block: RamBlockPort, pages: NDArray[np.int64], report: Done) -> None:
        runs = [] if job.packs else _views(block, pages)
        if runs and _is_there(block, runs):
            sums = np.concatenate([page_sums(rows) for _, rows in runs]) if job.form.checked else None
            # Of zeros the sum is zero, so where none is there is nothing to look for.
            if (sums is None or not sums.all()) and (zero := _zeros(runs)).any():
                report.zero.append(pages[zero])
                pages, sums = pages[~zero], sums[~zero] if sums is not None else None
                runs = _views(block, pages)
            if runs:
                self._send_lying(job.form, block, pages, runs, sums, report)
                return
        for start in range(0, len(pages), PACKET_PAGES):
            self._send_copied(job, block, pages[start : start + PACKET_PAGES], report)

    def _send_lying(
        self, form: Form, block: RamBlockPort, pages: NDArray[np.int64], runs: Runs, sums: Sums | None, report: Done
    ) -> None:
        head = np.empty(form.head_bytes(len(pages)), np.uint8)
        encode_head(head, block.name, pages, form, number=next(self._numbers), sums=sums)
        began = time.monotonic()
        self._end.send(head.data, more=True)
        for first, rows in runs:
            if block.page_size == PAGE:
                self._end.send_file(block.memfd, first * PAGE, rows.reshape(-1).data)
            else:
                self._end.send(rows.reshape(-1).data)
        report.send_s += time.monotonic() - began
        report.sent_bytes += len(head) + len(pages) * PAGE
        report.normal += len(pages)

    def _send_copied(self, job: Job, block: RamBlockPort, pages: NDArray[np.int64], report: Done) -> None:
        packet = self._packet
        zero = packet.read(block, pages)
        if len(zero):
            report.zero.append(zero)
        if len(packet.pages):
            flags, packed = (self._method, self._pack(report)) if job.packs else (PLAIN, None)
            self._send(packet.sealed(job.form, next(self._numbers), flags, packed), report)
            report.normal += len(packet.pages)

    def _pack(self, report: Done) -> bytes:
        assert self._packer is not None
        began = time.monotonic()
        packed = self._packer.pack(self._packet.content)
        report.pack_s += time.monotonic() - began
        return packed

    def _send(self, data: memoryview, report: Done) -> None:
        began = time.monotonic()
        self._end.send(data)
        report.send_s += time.monotonic() - began
        report.sent_bytes += len(data)


def _views(block: RamBlockPort, pages: NDArray[np.int64]) -> Runs:
    """Return long runs of pages where they lie; none where they are scattered."""
    firsts = ((int(pages[start]), end - start) for start, end in long_runs(pages))
    return [(first, block.pages[first : first + count]) for first, count in firsts]


def _is_there(block: RamBlockPort, runs: Runs) -> bool:
    """Say whether looking at pages where they lie takes no memory: some may have been given back."""
    if has_no_holes(block.memfd, block.size_bytes):
        return True
    if block.page_size > PAGE:
        return False
    return all(is_resident(rows.__array_interface__["data"][0], rows.nbytes) for _, rows in runs)


def _zeros(runs: Runs) -> NDArray[np.bool_]:
    """Say of each page whether it is all zero at this moment."""
    found = [np.zeros(len(rows), bool) for _, rows in runs]
    for zero, (_, rows) in zip(found, runs, strict=True):
        zero[zero_pages(rows.view(np.uint64))] = True
    return np.concatenate(found)
