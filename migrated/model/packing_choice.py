"""Whether pages are packed before they are sent (``multifd-compression`` auto): from what either way has cost.

The rule of the file: what is chosen follows from times that were measured in this migration, and can be said in a
sentence. A channel's job takes, for each byte of memory, the time to pack it and the time to send what is left:

    plain:   send          packed:   pack + ratio x send

``send`` is what a byte on the wire took, or what the rate limit leaves for one, whichever is longer. It is measured by
jobs that go as they are: a channel that packs waits less than its network would have it wait. So it rises at once and
falls slowly, because the first bytes behind a pause only fill the kernel's buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Jobs of each channel before the first try: the first ones only fill the kernel's buffers.
WARM_UP_JOBS = 3
#: Every so many jobs go the other way: what is sent, and the network, may have changed.
PROBE_EVERY = 32
#: Packing has to win by this much before it begins; to end it, it has to lose.
MARGIN = 0.9
#: Weight of what is newest, where it says that a byte costs less than was thought.
_FALLS = 0.1
_NEWEST = 0.5


@dataclass(frozen=True, slots=True)
class JobCost:
    """What one job was: bytes of memory and on the wire, seconds of packing (0: it went as it was) and of sending."""

    plain_bytes: int
    wire_bytes: int
    pack_s: float
    send_s: float


class PackingChoice:
    """The choice of one migration."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing is chosen, and nothing is known."""
        self._lanes = 0
        self._given = 0
        self._packs = False
        self._send_s = 0.0
        self._pack_s = 0.0
        self._ratio = 1.0
        self._limit_bps = 0.0
        self._tried = False
        self.packed_bytes = 0
        """Of memory that went packed."""

    def begin(self, lanes: int) -> None:
        """There are so many channels, and something is to be chosen."""
        self.reset()
        self._lanes = lanes

    @property
    def active(self) -> bool:
        """True where something is chosen."""
        return self._lanes > 0

    def next_packs(self, limit_bps: float | None) -> bool:
        """Say whether the next job is packed; at most ``limit_bps`` bytes per second are sent by all channels."""
        self._limit_bps = limit_bps or 0.0
        self._given += 1
        if self._given <= WARM_UP_JOBS * self._lanes:
            return False
        if not self._tried:
            self._tried = True
            return True
        if self._pack_s:
            bar = 1.0 if self._packs else MARGIN
            self._packs = self._packed_s < bar * self._sending_s
        return self._packs != (self._given % PROBE_EVERY == 0)

    def took(self, cost: JobCost) -> None:
        """Learn from a job that was done."""
        if not cost.plain_bytes:
            return
        if cost.pack_s:
            newest = _NEWEST if self._pack_s else 1.0
            self._pack_s += newest * (cost.pack_s / cost.plain_bytes - self._pack_s)
            self._ratio += newest * (cost.wire_bytes / cost.plain_bytes - self._ratio)
            self.packed_bytes += cost.plain_bytes
            return
        send_s = cost.send_s / cost.wire_bytes
        self._send_s += (1.0 if send_s > self._send_s else _FALLS) * (send_s - self._send_s)

    @property
    def _sending_s(self) -> float:
        return max(self._send_s, self._lanes / self._limit_bps if self._limit_bps else 0.0)

    @property
    def _packed_s(self) -> float:
        return self._pack_s + self._ratio * self._sending_s

    def as_dict(self) -> dict[str, object]:
        """Return what is chosen and why (``x-migrated-packing``)."""
        return {"chosen": "zstd" if self._packs else "none", "why": self._why(), "packed-bytes": self.packed_bytes}

    def _why(self) -> str:
        if not (self._pack_s and self._sending_s):
            return "too little was sent to know"
        gain = self._sending_s / self._packed_s
        return (
            f"a channel sends {_mib_s(self._sending_s)} and packs {_mib_s(self._pack_s)} to {self._ratio:.0%}:"
            f" packed, memory goes {gain:.2g} times as fast"
        )


def _mib_s(seconds_per_byte: float) -> str:
    return f"{1 / seconds_per_byte / (1 << 20):.0f} MiB/s"
