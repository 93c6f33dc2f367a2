"""A process that maps the machine's memory while a migration is under way, and leaves again."""

from __future__ import annotations

import subprocess
import sys

from migrated.demo.site import Site
from tests.integration.conftest import MakeSite
from tests.support.following import assert_still_runs, migrate, wait_status, wait_until

#: Maps a block, says what is in its first byte, writes another one if it is given, and leaves.
VISITOR = """
import sys
from migrated.client import attach
with attach(sys.argv[1], name="visitor") as machine:
    scratch = machine.ram("scratch")
    print(scratch[0])
    scratch[0] = int(sys.argv[2]) if len(sys.argv) > 2 else scratch[0]
"""


def visit(site: Site, *value: str) -> int:
    command = [sys.executable, "-c", VISITOR, str(site.directory / "run" / "attach.sock"), *value]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def test_what_a_visitor_wrote_is_not_lost(make_site: MakeSite) -> None:
    options = {"module": "tests.support.misbehave", "walker_arguments": ["--mode", "idle-block"]}
    a, b = make_site("A", **options), make_site("B", **options)
    a.qmp.execute("cont")
    a.wait_event("running")
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 2 << 20})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: a.qmp.execute("query-migrate").get("ram", {}).get("normal", 0) > 512, "memory flows")
    visit(a, "77")
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
    # A mapping that is gone cannot be asked any more what was written through it: the migration ends.
    assert "workload visitor" in wait_status(a, {"failed"})["error-desc"]
    assert_still_runs(a)
    migrate(a, b)
    assert visit(b) == 77
