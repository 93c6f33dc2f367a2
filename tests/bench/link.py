"""A machine whose memory can be compressed, over a link of 1 Gbit/s: packed by zstd, as auto decides, and as it is.

The rule of the file: the ends are in two network namespaces, joined by a cable with a token bucket at each end; the
memory is lines as in a log. Both use two multifd channels, packed or not, which is how many both have unasked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench import qemu
from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import MIB, text_file, warm
from tests.bench.movers import channels_config
from tests.bench.site import site
from tests.support.namespaces import ADDRESSES, PORT, Cable, why_not

SIZE_BYTES = 256 * MIB
RATE = "1gbit"
CHANNELS = 2
HOW = "total-time, 256 MiB of lines as in a log, 2 multifd channels, veth with tbf at 1 Gbit/s between two namespaces"


def run(bench: Bench) -> list[Figure]:
    """Measure everybody in turn."""
    if reason := why_not():
        bench.say(f"link: left out, {reason}")
        return []
    packed = Figure("link", "total time with zstd", "ms", HOW, Target("<=", 0.5), "uncompressed")
    beside = Figure("link", "total time with zstd", "ms", HOW, Target("<=", 1.0), "qemu zstd")
    theirs = Figure("link", "total time with zstd", "ms", HOW, None, "qemu uncompressed", who="qemu zstd")
    chosen = Figure("link", "total time with auto", "ms", HOW, Target("<=", 0.5), "uncompressed")
    size = bench.size(SIZE_BYTES)
    with text_file(bench.memory, size) as content, Cable() as cable:
        cable.slow_down(RATE)
        competitors: dict[str, Callable[[], float]] = {
            "zstd": partial(_ours, bench, cable, content, size, "zstd"),
            "auto": partial(_ours, bench, cable, content, size, "auto"),
            "uncompressed": partial(_ours, bench, cable, content, size, "none"),
        }
        if bench.qemu:
            competitors["qemu zstd"] = partial(_theirs, bench, cable, content, size, "zstd")
            competitors["qemu uncompressed"] = partial(_theirs, bench, cable, content, size, "none")
        for result in bench.rounds("link", competitors):
            packed.pair(result["zstd"], result["uncompressed"])
            chosen.pair(result["auto"], result["uncompressed"])
            if bench.qemu:
                beside.pair(result["zstd"], result["qemu zstd"])
                theirs.pair(result["qemu zstd"], result["qemu uncompressed"])
    return [packed, chosen, beside, theirs]


def _ours(bench: Bench, cable: Cable, content: Path, size: int, compression: str) -> float:
    config = f'{channels_config(CHANNELS, compression)}[tls]\nmode = "off"\n'
    waits = f'incoming = "tcp:{ADDRESSES["B"]}:{PORT}"\nallow = ["{ADDRESSES["A"]}"]'
    programs = {name: [*cable.launcher(name), sys.executable, "-m", "migrated"] for name in ADDRESSES}
    with (
        site(bench.directory, "source", size, ["--content", content], config=config, program=programs["A"]) as source,
        site(bench.directory, "target", size, incoming=waits, config=config, program=programs["B"]) as target,
    ):
        warm(size)
        source.qmp.execute("migrate", {"uri": target.address})
        return float(qemu.follow(source.qmp)["total-time"])


def _theirs(bench: Bench, cable: Cable, content: Path, size: int, compression: str) -> float:
    common = [*qemu.EMPTY, "-m", str(size // MIB)]
    here = [*common, *qemu.backend_file(content, size), "-S"]
    there = [*common, *qemu.backend_cold(size), "-incoming", "defer"]
    with (
        qemu.qemu(bench.directory, qemu.SOURCE, here, cable.launcher("A")) as source,
        qemu.qemu(bench.directory, qemu.TARGET, there, cable.launcher("B")) as target,
    ):
        qemu.use_multifd((source, target), CHANNELS, **{"multifd-compression": compression})
        warm(size)
        qemu.start(source, target, host=ADDRESSES["B"])
        return float(qemu.follow(source)["total-time"])
