"""The multi-threaded workload in C (pager.h says why and what), compiled, and a site that runs it.

The rule of the file: what the program says on stdout is read by `Site`; nothing here knows how a machine migrates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.site import Site
from tests.support.compiler import NEEDS, compile_c, has_compiler

SOURCES = sorted(Path(__file__).parent.glob("pager*.c"))
MIB = 1 << 20


def compile_pager(directory: Path) -> Path:
    """Return the program, compiled into ``directory``. Skips the test where there is no C compiler."""
    if not has_compiler():
        pytest.skip(NEEDS)
    return compile_c(directory / "pager", SOURCES)


class PagerSite(Site):
    """A site whose walker is the pager; each method is one of its commands and returns its answer."""

    def ask(self, command: str, event: str) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self.order(command)
        return self.wait_event(event)

    def order(self, command: str) -> None:
        """Give a command; whoever asks waits for the answer by `wait_event`."""
        assert self.walker.stdin is not None
        self.walker.stdin.write(command + "\n")
        self.walker.stdin.flush()

    def syscall_read(self, page: int) -> dict[str, Any]:
        return self.ask(f"syscall-read {page}", "syscall-read")

    def punch(self, page: int) -> dict[str, Any]:
        return self.ask(f"punch {page}", "punched")

    def lose(self, page: int) -> dict[str, Any]:
        return self.ask(f"lose {page}", "lost")

    def age(self, page: int) -> dict[str, Any]:
        return self.ask(f"age {page}", "aged")

    def fork(self, page: int) -> dict[str, Any]:
        return self.ask(f"fork {page}", "forked")

    def touch(self, count: int) -> dict[str, Any]:
        return self.ask(f"touch {count}", "touched")

    def run(self) -> None:
        """Let the machine run here for the first time."""
        self.qmp.execute("cont")
        assert self.wait_event("running")["filled"]


def pager_site(
    program: Path,
    name: str,
    directory: Path,
    *,
    ram_bytes: int = 16 * MIB,
    walkers: int = 4,
    readers: int = 1,
    processes: int = 1,
    rate: float = 0,
    read_rate: float = 0,
    pattern: str = "linear",
    blocks: Mapping[str, int] | None = None,
    blank: Mapping[str, int] | None = None,
    device: str = "",
    touch_on_load: int | None = None,
    twin: bool = False,
    **options: Any,
) -> PagerSite:
    """Return a site, not entered yet, with a pager; the other ``options`` are those of `Site`.

    ``walkers`` and ``readers`` are threads of each process; ``rate`` and ``read_rate`` count what all of them do in a
    second (0: as fast as they can). ``blank`` blocks are never written. A ``twin`` never fills memory: a machine has to
    arrive in it. ``touch_on_load``: how many pages the device reads while it is loaded (None: it touches no memory).
    """
    arguments = ["--walkers", str(walkers), "--readers", str(readers), "--processes", str(processes)]
    arguments += ["--rate", str(rate), "--read-rate", str(read_rate), "--pattern", pattern]
    for option, named in (("--block", blocks), ("--blank", blank)):
        for block, size in (named or {}).items():
            arguments += [option, f"{block}:{size}"]
    if device:
        arguments += ["--device", device]
    if touch_on_load is not None:
        arguments += ["--touch-on-load", str(touch_on_load)]
    if twin:
        arguments.append("--twin")
    return PagerSite(
        name, directory, ram_bytes=ram_bytes, program=[str(program)], walker_arguments=arguments, **options
    )
