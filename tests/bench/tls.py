"""Bulk precopy under mutual TLS: 1 GiB that cannot be compressed, beside the same without, and beside a QEMU.

The rule of the file: the same keys for all, made by `migratectl pki`; figures as in `throughput`, handshake included.
"""

from __future__ import annotations

from pathlib import Path

from tests.bench import qemu
from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, random_file, warm
from tests.bench.site import migrate, site
from tests.bench.throughput import HOW
from tests.support.keys import Keys, tls

SIZE_BYTES = 1 * GIB


def run(bench: Bench) -> list[Figure]:
    """Measure triples: migrated without TLS, with, and QEMU with tls-creds-x509."""
    against_qemu = Figure("tls", "1 GiB, idle machine, mutual TLS", "MiB/s", HOW, Target(">=", 1.2), "qemu")
    against_plain = Figure("tls", "1 GiB, idle machine, mutual TLS", "MiB/s", HOW, None, "cleartext")
    keys = Keys(bench.directory / "keys").host("bench")
    with random_file(bench.memory, SIZE_BYTES) as content:
        competitors = {
            "cleartext": lambda: _ours(bench, content, ""),
            "migrated": lambda: _ours(bench, content, tls(keys)),
        }
        if bench.qemu:
            competitors["qemu"] = lambda: _qemu(bench, content, keys)
        for result in bench.rounds("tls", competitors):
            against_plain.pair(result["migrated"], result["cleartext"])
            if bench.qemu:
                against_qemu.pair(result["migrated"], result["qemu"])
    return [against_qemu, against_plain] if bench.qemu else [against_plain]


def _ours(bench: Bench, content: Path, config: str) -> float:
    with (
        site(bench.directory, "source", SIZE_BYTES, ["--content", content], config=config) as source,
        site(bench.directory, "target", SIZE_BYTES, incoming=True, config=config) as target,
    ):
        warm(SIZE_BYTES)
        return SIZE_BYTES / MIB * 1000 / float(migrate(source, target)["total-time"])


def _qemu(bench: Bench, content: Path, keys: Path) -> float:
    memory = ["-m", str(SIZE_BYTES // MIB)]
    there, here = (
        ["-object", f"tls-creds-x509,id=tls0,dir={keys},endpoint={end},verify-peer=on"] for end in ("client", "server")
    )
    with (
        qemu.qemu(
            bench.directory,
            "qemu-source",
            [*qemu.EMPTY, *memory, *qemu.backend_file(content, SIZE_BYTES), "-S", *there],
        ) as source,
        qemu.qemu(
            bench.directory,
            "qemu-target",
            [*qemu.EMPTY, *memory, *qemu.backend_cold(SIZE_BYTES), *here, "-incoming", "defer"],
        ) as target,
    ):
        warm(SIZE_BYTES)
        target.execute("migrate-set-parameters", {"tls-creds": "tls0"})
        figures = qemu.migrate(source, target, {"tls-creds": "tls0"})
        return SIZE_BYTES / MIB * 1000 / float(figures["total-time"])
