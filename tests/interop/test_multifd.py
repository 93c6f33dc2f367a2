"""Multifd with a real QEMU 7.2, in both directions: pages over channels of their own arrive byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.conftest import SIZE, content, with_content
from tests.support.following import wait_until
from tests.support.holding_site import HoldingSite, MakeSite
from tests.support.keys import Keys, tls
from tests.support.qemu import BLOCK, MakeQemu, Qemu

SLOW_BPS = 1 << 20
COMPRESSION = pytest.mark.parametrize("compression", ["zlib", "zstd"])
PACKED = pytest.mark.parametrize(("channels", "level"), [(1, 1), (2, 1), (2, 9), (4, 1)])
CHANNELS = pytest.mark.parametrize("channels", [1, 2, 4])


@pytest.fixture
def source(make_qemu: MakeQemu) -> Qemu:
    source = make_qemu("source", ram=content(1))
    source.capability("return-path")
    return source


@pytest.fixture
def site(make_site: MakeSite) -> HoldingSite:
    """A daemon whose machine runs, with content in its memory."""
    return with_content(make_site("site", incoming=None))


def speak_multifd(channels: int, *sides: HoldingSite | Qemu, compression: str = "none") -> None:
    for side in sides:
        side.capability("multifd")
        side.parameter("multifd-channels", channels)
        side.parameter("multifd-compression", compression)


@CHANNELS
def test_from_a_qemu(channels: int, source: Qemu, make_site: MakeSite) -> None:
    site = make_site("site")
    speak_multifd(channels, source, site)
    theirs = source.migrate(site.address)
    ours = site.wait_status("completed")
    assert site.peek(BLOCK) == source.ram() == content(1)
    assert site.run_state() == "running"
    assert theirs["ram"]["multifd-bytes"] > SIZE // 2
    assert ours["ram"]["normal"] + ours["ram"]["duplicate"] >= SIZE // 4096


@CHANNELS
def test_to_a_qemu(channels: int, site: HoldingSite, make_qemu: MakeQemu) -> None:
    target = make_qemu("target", incoming="defer", ram=content(9))
    speak_multifd(channels, site, target)
    ours = site.migrate(target.listen())
    target.wait_status({"completed"})
    assert target.ram() == content(1)
    assert target.run_state() == "running"
    assert not target.said()
    assert ours["x-migrated-peer"]["kind"] == "qemu"
    assert ours["ram"]["multifd-bytes"] > SIZE // 2


@COMPRESSION
@PACKED
def test_packed_from_a_qemu(compression: str, channels: int, level: int, source: Qemu, make_site: MakeSite) -> None:
    site = make_site("site")
    speak_multifd(channels, source, site, compression=compression)
    source.parameter(f"multifd-{compression}-level", level)
    source.migrate(site.address)
    site.wait_status("completed")
    assert site.peek(BLOCK) == source.ram() == content(1)


@COMPRESSION
@PACKED
def test_packed_to_a_qemu(compression: str, channels: int, level: int, site: HoldingSite, make_qemu: MakeQemu) -> None:
    target = make_qemu("target", incoming="defer", ram=content(9))
    speak_multifd(channels, site, target, compression=compression)
    site.parameter(f"multifd-{compression}-level", level)
    ours = site.migrate(target.listen())
    target.wait_status({"completed"})
    assert target.ram() == content(1)
    assert ours["ram"]["multifd-bytes"] < ours["ram"]["normal-bytes"] / 2


def test_packed_in_another_way_than_is_expected(source: Qemu, make_site: MakeSite) -> None:
    site = make_site("site")
    speak_multifd(1, source, compression="zstd")
    speak_multifd(1, site)
    source.migrate(site.address, {"failed"})
    assert source.run_state() == "running"
    assert "multifd 0: flags received 4 flags expected 0" in site.wait_status("failed")["error-desc"]


def test_memory_that_changes_on_the_way_arrives_as_it_was_last(site: HoldingSite, make_qemu: MakeQemu) -> None:
    """Pages go again, and again over any of the channels: what was sent last has to be what stays."""
    target = make_qemu("target", incoming="defer", ram=content(9))
    speak_multifd(4, site, target)
    site.parameter("max-bandwidth", SLOW_BPS)
    site.parameter("downtime-limit", 1)
    site.qmp.execute("migrate", {"uri": target.listen()})
    for seed in (2, 3, 4):
        wait_transferred(site, seed * SLOW_BPS // 2)
        site.poke(BLOCK, 0, content(seed, SIZE // 2))
    site.parameter("max-bandwidth", 0)
    site.wait_status("completed")
    target.wait_status({"completed"})
    assert target.ram() == content(4, SIZE // 2) + content(1)[SIZE // 2 :]


def wait_transferred(site: HoldingSite, count: int) -> None:
    wait_until(lambda: site.query().get("ram", {}).get("transferred", 0) > count, f"{count} bytes were sent")


def test_from_a_qemu_over_tls(make_site: MakeSite, source: Qemu, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    credentials(source, keys.host("r"), "client")
    site = make_site("site", config=tls(keys.host("b"), '[peers]\nmay-send = ["r"]'))
    speak_multifd(2, source, site)
    source.migrate(site.address)
    site.wait_status("completed")
    assert site.peek(BLOCK) == content(1)


def test_to_a_qemu_over_tls(site: HoldingSite, make_site: MakeSite, make_qemu: MakeQemu, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    target = make_qemu("target", incoming="defer", ram=content(9))
    credentials(target, keys.host("q"), "server")
    source = with_content(make_site("source", incoming=None, config=tls(keys.host("a"))))
    speak_multifd(2, source, target)
    source.migrate(target.listen())
    target.wait_status({"completed"})
    assert target.ram() == content(1)


@pytest.mark.parametrize("preempt", [False, True])
def test_postcopy_from_a_qemu(preempt: bool, source: Qemu, make_site: MakeSite) -> None:
    """Multifd carries what comes before the switch; behind it only the SYNCs go on."""
    site = make_site("site")
    speak_multifd(2, source, site)
    source.parameter("downtime-limit", 1)
    source.parameter("max-bandwidth", SLOW_BPS)
    source.parameter("max-postcopy-bandwidth", 0)
    for side in (source, site):
        side.capability("postcopy-ram")
        side.capability("postcopy-preempt", state=preempt)
    source.qmp.execute("migrate", {"uri": site.address})
    wait_until(lambda: source.query().get("ram", {}).get("multifd-bytes", 0) > SLOW_BPS // 2, "pages were sent")
    source.qmp.execute("migrate-start-postcopy")
    source.wait_status({"completed"})
    site.wait_status("completed")
    assert site.peek(BLOCK) == content(1)


def test_postcopy_to_a_qemu_would_be_its_end(site: HoldingSite, make_qemu: MakeQemu) -> None:
    target = make_qemu("target", incoming="defer", memory="memfd")
    speak_multifd(2, site, target)
    for side in (site, target):
        side.capability("postcopy-ram")
    refused = site.migrate(target.listen(), "failed")
    assert "aborts at the end of postcopy" in refused["error-desc"]
    assert site.run_state() == "running"


@pytest.mark.parametrize("at_qemu", [True, False])
def test_only_one_side_speaks_multifd(at_qemu: bool, source: Qemu, make_site: MakeSite) -> None:
    site = make_site("site", parameters={"x-migrated-silence-timeout": 500})
    speak_multifd(2, source if at_qemu else site)
    source.migrate(site.address, {"failed"})
    assert source.run_state() == "running"
    refused = site.wait_status("failed")["error-desc"]
    expected = "capability multifd is off here" if at_qemu else "0 of 2 multifd channels have come"
    assert expected in refused
    assert site.run_state() == "inmigrate"


def test_another_number_of_channels(source: Qemu, make_site: MakeSite) -> None:
    site = make_site("site", parameters={"x-migrated-silence-timeout": 500})
    speak_multifd(4, source)
    speak_multifd(2, site)
    source.migrate(site.address, {"failed"})
    assert source.run_state() == "running"
    assert "multifd: a channel with number 2" in site.wait_status("failed")["error-desc"]


def test_the_uuid_is_compared(make_qemu: MakeQemu, make_site: MakeSite) -> None:
    theirs, ours = "00112233-4455-6677-8899-aabbccddeeff", "ff112233-4455-6677-8899-aabbccddeeff"
    source = make_qemu("source", ram=content(1), arguments=["-uuid", theirs])
    source.capability("return-path")
    site = make_site("site", uuid=ours)
    speak_multifd(1, source, site)
    source.migrate(site.address, {"failed"})
    assert source.run_state() == "running"
    expected = f"multifd: received uuid '{theirs}' and expected uuid '{ours}' for channel 0"
    assert expected in site.wait_status("failed")["error-desc"]


def test_to_a_qemu_that_expects_none(site: HoldingSite, make_qemu: MakeQemu) -> None:
    target = make_qemu("target", incoming="defer")
    speak_multifd(2, site)
    site.migrate(target.listen(), "failed")
    assert site.run_state() == "running"
    assert site.peek(BLOCK) == content(1)


def credentials(qemu: Qemu, directory: Path, endpoint: str) -> None:
    """Give a QEMU keys, and have its migrations use them."""
    properties = {"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(directory), "endpoint": endpoint}
    qemu.qmp.execute("object-add", {**properties, "verify-peer": True})
    qemu.parameter("tls-creds", "tls0")
