"""Fixtures of the integration tests: real daemons, real workloads, driven over QMP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.site import Site
from tests.support.pager import PagerSite, compile_pager, pager_site

MIB = 1 << 20

MakeSite = Callable[..., Site]
MakePager = Callable[..., PagerSite]


@pytest.fixture
def make_site(tmp_path: Path) -> Iterator[MakeSite]:
    """Return a function that starts a daemon with a walker; everything ends with the test."""
    with ExitStack() as stack:

        def make(name: str, *, ram_bytes: int = 16 * MIB, kind: type[Site] = Site, **options: Any) -> Site:
            return stack.enter_context(kind(name, tmp_path, ram_bytes=ram_bytes, **options))

        yield make


@pytest.fixture
def pair(make_site: MakeSite) -> tuple[Site, Site]:
    """Two sites; the machine runs at the first."""
    a, b = make_site("A"), make_site("B")
    a.qmp.execute("cont")
    a.wait_event("running")
    return a, b


@pytest.fixture(scope="session")
def pager_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The multi-threaded workload, compiled once."""
    return compile_pager(tmp_path_factory.mktemp("pager"))


@pytest.fixture
def make_pager(pager_program: Path, tmp_path: Path) -> Iterator[MakePager]:
    """Return a function that starts a daemon with a pager; everything ends with the test."""
    with ExitStack() as stack:

        def make(name: str, **options: Any) -> PagerSite:
            return stack.enter_context(pager_site(pager_program, name, tmp_path, **options))

        yield make
