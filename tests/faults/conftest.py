"""Fixtures of the fault tests: a pair of sites, a link between them that breaks on demand, a device that waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.demo.site import Site
from tests.integration.conftest import MakeSite, make_site, pair
from tests.support.proxy import Proxy

__all__ = ["make_site", "pair"]

HELD = '[handlers]\nload = ["tests.support.held_device:register"]\n'


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that rules the held device of every site made by `held_pair`."""
    directory = tmp_path / "hold"
    directory.mkdir()
    monkeypatch.setenv("HELD_DEVICE", str(directory))
    return directory


@pytest.fixture
def held_pair(make_site: MakeSite, hold: Path) -> tuple[Site, Site]:
    """Two sites with a device whose save and load can be held; the machine runs at the first."""
    a, b = make_site("A", config=HELD), make_site("B", config=HELD)
    a.qmp.execute("cont")
    a.wait_event("running")
    return a, b


@pytest.fixture
def link(held_pair: tuple[Site, Site]) -> Iterator[Proxy]:
    """A breakable link to the second site."""
    _, port = held_pair[1].address.removeprefix("tcp:").rsplit(":", 1)
    with Proxy(("127.0.0.1", int(port))) as proxy:
        yield proxy
