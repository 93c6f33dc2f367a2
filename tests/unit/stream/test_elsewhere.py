"""A stream whose peer is silent here and sends on other channels of the same migration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrated.errors import ChannelTimeout
from migrated.model.stats import BandwidthMeter
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.memory import MemoryChannel as Bytes
from tests.support.channel import MemoryChannel

SILENCE_S = 0.01


def counting(counts: list[int]) -> Iterator[int]:
    yield from counts
    while True:
        yield counts[-1]


@pytest.mark.parametrize("between_elements", [False, True])
async def test_silence_is_none_while_something_comes_elsewhere(between_elements: bool) -> None:
    channel = MemoryChannel()
    stream = IncomingStream(channel, silence_timeout_s=lambda: SILENCE_S)
    stream.idle_timeout_s = SILENCE_S
    asked: list[int] = []
    # Before and behind each wait; what is here already needs none.
    counts = counting([*([] if between_elements else [0]), 0, 1, 1, 2, 2, 3, 3])

    def elsewhere() -> int:
        asked.append(next(counts))
        return asked[-1]

    stream.received_elsewhere = elsewhere
    if not between_elements:
        channel.feed(b"ab")
    with pytest.raises(ChannelTimeout):
        await (stream.wait_for_element() if between_elements else stream.read_exactly(4))
    assert asked[-2:] == [3, 3]
    assert 2 in asked


async def test_what_goes_elsewhere_counts_for_the_rate_and_not_for_the_stream() -> None:
    sent: list[int] = []
    meter = BandwidthMeter()
    meter.set_limit(100)
    f = OutgoingStream(Bytes(), meter, on_sent=sent.append, clock=lambda: 1.0)
    f.account(11)
    assert (f.position, sent, f.rate_limit_exceeded()) == (0, [11], True)
