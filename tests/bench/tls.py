"""Bulk precopy under mutual TLS: 1 GiB that cannot be compressed, beside the same without, and beside a QEMU.

The rule of the file: the same keys for all, made by `migratectl pki`; figures as in `tests.bench.bulk`, handshake
included.
"""

from __future__ import annotations

from functools import partial

from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, random_file
from tests.bench.movers import HOW, Job, ours, theirs
from tests.support.keys import Keys, tls

SIZE_BYTES = GIB


def run(bench: Bench) -> list[Figure]:
    """Measure triples: migrated without TLS, with, and QEMU with tls-creds-x509."""
    size = bench.size(SIZE_BYTES)
    name = f"{size / GIB:g} GiB, idle, mutual TLS"
    against_qemu = Figure("tls", name, "MiB/s", HOW, Target(">=", 1.2), "qemu")
    against_plain = Figure("tls", name, "MiB/s", HOW, None, "cleartext")
    keys = Keys(bench.directory / "keys").host("bench")
    there, here = (
        ["-object", f"tls-creds-x509,id=tls0,dir={keys},endpoint={end},verify-peer=on"] for end in ("client", "server")
    )
    with random_file(bench.memory, size) as content:
        job = Job(size, content)
        competitors = {
            "cleartext": partial(ours, bench, job),
            "migrated": partial(ours, bench, job, tls(keys)),
        }
        if bench.qemu:
            competitors["qemu"] = partial(theirs, bench, job, 0, (there, here), tls_creds="tls0")
        for result in bench.rounds("tls", competitors):
            against_plain.pair(result["migrated"].mib_per_s, result["cleartext"].mib_per_s)
            if bench.qemu:
                against_qemu.pair(result["migrated"].mib_per_s, result["qemu"].mib_per_s)
    return [against_qemu, against_plain] if bench.qemu else [against_plain]
