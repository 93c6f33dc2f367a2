"""Fixtures of the interop tests: real QEMUs, and daemons with a holder that has the same RAM block."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import qemu
from tests.support.holding_site import HoldingSite, MakeSite
from tests.support.qemu import MakeQemu, Qemu

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def make_qemu(tmp_path: Path) -> Iterator[MakeQemu]:
    """Return a function that starts a QEMU; skip where there is none."""
    if qemu.PROGRAM is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    with ExitStack() as stack:

        def make(name: str, *, size: int = SIZE, **options: Any) -> Qemu:
            return stack.enter_context(Qemu(name, tmp_path, size=size, **options))

        yield make


@pytest.fixture
def make_site(tmp_path: Path) -> Iterator[MakeSite]:
    """Return a function that starts a daemon whose holder has QEMU's block; ``incoming=None`` makes it run at once."""
    with ExitStack() as stack:

        def make(name: str, *, blocks: dict[str, int] | None = None, **options: Any) -> HoldingSite:
            return stack.enter_context(HoldingSite(name, tmp_path, blocks=blocks or {qemu.BLOCK: SIZE}, **options))

        yield make


def content(seed: int, size: int = SIZE) -> bytes:
    """Memory with pages of all sorts: random, zero, filled with one byte, zero but for the last byte."""
    generator = random.Random(seed)
    pages = []
    for _ in range(size // qemu.PAGE):
        match generator.randrange(4):
            case 0:
                pages.append(bytes(qemu.PAGE))
            case 1:
                pages.append(bytes([generator.randrange(256)]) * qemu.PAGE)
            case 2:
                pages.append(bytes(qemu.PAGE - 1) + b"\1")
            case _:
                pages.append(generator.randbytes(qemu.PAGE))
    return b"".join(pages)


def qmp_shell(socket: str) -> list[str]:
    """The command that starts qmp-shell on a socket."""
    return [sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()", "-v", socket]


def with_content(site: HoldingSite) -> HoldingSite:
    """Wait until a site's machine runs, and fill its memory."""
    site.wait_event("running")
    site.poke(qemu.BLOCK, 0, content(1))
    return site
