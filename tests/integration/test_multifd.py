"""Multifd between two daemons: pages over channels of their own, and what becomes of it when one of them breaks."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.site import Site
from migrated.errors import CommandError
from migrated.migration.data_channels import unasked_channels
from migrated.wire.multifd import CHECKED_FORM, INITIAL_BYTES, OFFSETS_AT, Initial, encode_initial
from tests.integration.conftest import MIB, MakePager
from tests.integration.test_pager import assert_sound, start_pair
from tests.integration.test_postcopy import follow
from tests.integration.test_precopy import footprint
from tests.support.following import assert_still_runs, migrate, run_state, wait_status, wait_until
from tests.support.holding_site import HoldingSite
from tests.support.keys import Keys, tls
from tests.support.relay import Plan, Relay

#: The connections of a migration are made in this order: the stream, then the channels.
STREAM, FIRST_CHANNEL = 0, 1
#: How many channels there are where nobody says anything.
UNASKED = unasked_channels(2, len(os.sched_getaffinity(0)), works=False)
RAM_BYTES = 32 * MIB
CONTENT = bytes(range(256)) * 4096


def speak_multifd(site: Any, channels: int, **capabilities: bool) -> None:
    """Have a source use multifd; a destination does as its source."""
    on = {"multifd": True, **capabilities}
    switched = [{"capability": name.replace("_", "-"), "state": state} for name, state in on.items()]
    site.qmp.execute("migrate-set-capabilities", {"capabilities": switched})
    site.qmp.execute("migrate-set-parameters", {"multifd-channels": channels})


def address(site: Site) -> tuple[str, int]:
    return "127.0.0.1", int(site.address.rpartition(":")[2])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_walker_moves_there_and_back_and_is_whole(pair: tuple[Site, Site], channels: int) -> None:
    a, b = pair
    for site in pair:
        speak_multifd(site, channels)
    figures = migrate(a, b)
    assert figures["ram"]["multifd-bytes"] > figures["ram"]["total"] / 2
    assert figures["ram"]["transferred"] > figures["ram"]["multifd-bytes"]
    migrate(b, a)


def test_nothing_is_left_of_the_channels(pair: tuple[Site, Site]) -> None:
    a, b = pair
    for site in pair:
        speak_multifd(site, 3)

    def held() -> list[object]:
        return [footprint(site)["fds"] for site in pair]

    migrate(a, b)
    migrate(b, a)
    before = held()
    migrate(a, b)
    migrate(b, a)
    wait_until(lambda: held() == before, f"{before} again")


def test_the_destination_does_as_its_source_and_forgets_it_again(pair: tuple[Site, Site]) -> None:
    a, b = pair
    before = [b.qmp.execute(f"query-migrate-{what}") for what in ("capabilities", "parameters")]
    speak_multifd(a, 5)
    migrate(a, b)
    assert b.log_path.read_text().count('"multifd_channel"') == 5
    assert [b.qmp.execute(f"query-migrate-{what}") for what in ("capabilities", "parameters")] == before
    migrate(b, a)
    assert a.log_path.read_text().count('"multifd_channel"') == UNASKED


@pytest.mark.parametrize("preempt", [False, True])
def test_postcopy_behind_it(make_pager: MakePager, preempt: bool) -> None:
    a, b = start_pair(make_pager, ram_bytes=RAM_BYTES)
    speak_multifd(a, 2, postcopy_ram=True, postcopy_preempt=preempt)
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 16 * MIB, "downtime-limit": 1})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: a.qmp.execute("query-migrate").get("ram", {}).get("multifd-bytes", 0) > MIB, "pages go")
    a.qmp.execute("migrate-start-postcopy")
    follow(a, b)
    assert_sound(b)
    assert ('"second_channel"' in b.log_path.read_text()) is preempt


@contextmanager
def holders(directory: Path, *configs: str) -> Iterator[tuple[HoldingSite, HoldingSite]]:
    """Two daemons with holders; the first has the machine, and `CONTENT` in it."""
    options: dict[str, Any] = {"blocks": {"heap": len(CONTENT)}}
    configs = configs or ("", "")
    with (
        HoldingSite("A", directory, incoming=None, config=configs[0], **options) as a,
        HoldingSite("B", directory, config=configs[1], **options) as b,
    ):
        a.poke("heap", 0, CONTENT)
        yield a, b


def test_over_tls(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    with holders(tmp_path, *(tls(keys.host(name)) for name in ("a", "b"))) as (a, b):
        speak_multifd(a, 4)
        a.migrate(b.address)
        assert b.peek("heap") == CONTENT
        assert b.log_path.read_text().count('"multifd_channel"') == 4


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_packed(compression: str, tmp_path: Path) -> None:
    with holders(tmp_path) as (a, b):
        speak_multifd(a, 2)
        a.parameter("multifd-compression", compression)
        figures = a.migrate(b.address)
        assert b.peek("heap") == CONTENT
        assert 0 < figures["ram"]["multifd-bytes"] < len(CONTENT) / 2


@pytest.mark.parametrize("multifd", [False, True])
def test_packed_where_that_pays(multifd: bool, tmp_path: Path) -> None:
    """The rate limit makes a slow network of this one."""
    with holders(tmp_path) as (a, b):
        a.capability("multifd", state=multifd)
        a.parameter("multifd-compression", "auto")
        a.parameter("max-bandwidth", 4 * MIB)
        figures = a.migrate(b.address)
        assert b.peek("heap") == CONTENT
        packing = figures["x-migrated-packing"]
        assert packing["chosen"] == "zstd"
        assert "packed, memory goes" in packing["why"]
        assert 0 < packing["packed-bytes"] < len(CONTENT)
        assert 0 < figures["ram"]["multifd-bytes"] < len(CONTENT)


def test_one_connection_where_no_more_are_wanted(tmp_path: Path) -> None:
    with holders(tmp_path) as (a, b):
        a.parameter("x-migrated-data-channels", value=False)
        figures = a.migrate(b.address)
        assert b.peek("heap") == CONTENT
        assert figures["ram"]["multifd-bytes"] == 0
        assert '"multifd_channel"' not in b.log_path.read_text()


def test_channels_by_themselves_between_two_daemons(pair: tuple[Site, Site]) -> None:
    a, b = pair
    figures = migrate(a, b)
    assert figures["ram"]["multifd-bytes"] > figures["ram"]["total"] / 2
    assert b.log_path.read_text().count('"multifd_channel"') == UNASKED
    migrate(b, a)


def test_channels_may_come_before_the_stream(pair: tuple[Site, Site]) -> None:
    a, b = pair
    speak_multifd(a, 2)
    plans = {STREAM: Plan(behind=FIRST_CHANNEL + 1), FIRST_CHANNEL: Plan(behind=FIRST_CHANNEL + 1)}
    with Relay(address(b), plans) as relay:
        migrate(a, b, uri=relay.uri)
    assert b.log_path.read_text().index('"multifd_channel"') < b.log_path.read_text().index('"migration_status"')


def test_a_channel_without_a_machine_is_sent_away(pair: tuple[Site, Site]) -> None:
    a, b = pair
    b.qmp.execute("migrate-set-parameters", {"x-migrated-silence-timeout": 200})
    with socket.create_connection(address(b)) as stranger:
        stranger.settimeout(30)
        stranger.sendall(encode_initial(Initial(0)))
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    said = "no machine behind its multifd channel within 0.2 s"
    wait_until(lambda: said in b.log_path.read_text(), "it is said why")
    b.qmp.execute("migrate-set-parameters", {"x-migrated-silence-timeout": 10_000})
    migrate(a, b)


def test_cancelled_and_once_more(pair: tuple[Site, Site]) -> None:
    a, b = pair
    speak_multifd(a, 3)
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": MIB})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: a.qmp.execute("query-migrate").get("ram", {}).get("multifd-bytes", 0) > MIB, "pages go")
    a.qmp.execute("migrate_cancel")
    wait_status(a, {"cancelled"})
    assert_still_runs(a)
    wait_status(b, {"failed"})
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
    migrate(a, b)


@pytest.mark.row(18)
def test_a_channel_that_breaks_ends_the_migration_and_is_named(pair: tuple[Site, Site]) -> None:
    a, b = pair
    speak_multifd(a, 2)
    with Relay(address(b), {FIRST_CHANNEL + 1: Plan(cut_at=MIB)}) as relay:
        a.qmp.execute("migrate", {"uri": relay.uri})
        said = wait_status(a, {"failed"})["error-desc"]
    assert "multifd channel 1: " in said
    assert "multifd channel 1: " in wait_status(b, {"failed"})["error-desc"]
    assert_still_runs(a)
    assert run_state(b) == "inmigrate"
    migrate(a, b)


def test_what_changes_on_the_way_is_noticed(pair: tuple[Site, Site]) -> None:
    a, b = pair
    speak_multifd(a, 1)
    a.qmp.execute("stop")  # what is still written to is sent again
    in_a_page = INITIAL_BYTES + 2 * CHECKED_FORM.head_max_bytes + 100_000
    with Relay(address(b), {FIRST_CHANNEL: Plan(flip_at=in_a_page)}) as relay:
        a.qmp.execute("migrate", {"uri": relay.uri})
        said = wait_status(a, {"failed"})["error-desc"]
    assert "what arrived is not what was sent: it changed on the way" in said
    assert "1 others in block" in said
    a.qmp.execute("cont")
    assert_still_runs(a)
    migrate(a, b)


def test_a_head_that_changes_on_the_way_is_noticed(pair: tuple[Site, Site]) -> None:
    a, b = pair
    speak_multifd(a, 1)
    sync_bytes = CHECKED_FORM.head_min_bytes
    with Relay(address(b), {FIRST_CHANNEL: Plan(flip_at=INITIAL_BYTES + sync_bytes + OFFSETS_AT + 1)}) as relay:
        a.qmp.execute("migrate", {"uri": relay.uri})
        said = wait_status(a, {"failed"})["error-desc"]
    assert "what arrived is not what was sent: it changed on the way, expected checksum" in said
    assert "section multifd channel 0" in said
    assert_still_runs(a)
    migrate(a, b)


def test_not_together_with_deltas(pair: tuple[Site, Site]) -> None:
    a, _ = pair
    speak_multifd(a, 2)
    with pytest.raises(CommandError, match="Multifd is not compatible with xbzrle"):
        speak_multifd(a, 2, xbzrle=True)


def test_a_way_without_several_connections(pair: tuple[Site, Site], tmp_path: Path) -> None:
    a, _ = pair
    speak_multifd(a, 2)
    with pytest.raises(CommandError, match="multifd is not supported by current protocol"):
        a.qmp.execute("migrate", {"uri": f"file:{tmp_path}/out"})
    assert_still_runs(a)
