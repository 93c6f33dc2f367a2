"""Streams in files: an independent dissector reads ours and QEMU's to the end, and each side loads the other's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import SIZE, content
from tests.support.dissect import Dissection, dissect, dissect_postcopy
from tests.support.holding_site import HoldingSite, MakeSite
from tests.support.proxy import Proxy
from tests.support.qemu import BLOCK, MakeQemu
from tests.unit.wire.captures import CONTENT, PAGES, STREAM, UUID

DISK = bytes(range(200)) + bytes(56)


def capture_of(site: HoldingSite, uri: str, path: Path) -> Dissection:
    figures = site.migrate(uri)
    assert figures["x-migrated-outcome"] == "destination-owns"
    assert site.run_state() == "postmigrate"
    return dissect(path.read_bytes())


@pytest.mark.parametrize("way", ["file:{}", "exec:cat > {}"])
def test_a_machine_with_devices_in_a_file(way: str, make_site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "capture"
    blocks = {BLOCK: SIZE, "vram": 64 << 10}
    site = make_site("site", incoming=None, blocks=blocks, devices={"disk": len(DISK), "empty": 0})
    site.wait_event("running")
    site.poke(BLOCK, 0, content(1))
    state = site.device("disk")
    found = capture_of(site, way.format(path), path)
    assert found.machine_type == "none"
    assert found.configuration == {}
    assert found.commands == [], "a file has no return path, and analyze-migration.py knows no commands"
    assert found.blocks == blocks
    assert list(found.blocks) == [BLOCK, "vram"], "largest first"
    assert found.memory == {BLOCK: content(1), "vram": bytes(64 << 10)}
    assert found.missing() == {}
    assert [(s.idstr, s.instance, s.version) for s in found.devices()] == [
        ("globalstate", 0, 1),
        ("disk", 0, 1),
        ("empty", 0, 1),
    ]
    bodies = {section.idstr: section.body for section in found.devices()}
    assert bodies["disk"] == len(state).to_bytes(4, "big") + state
    assert bodies["globalstate"] == b"\0\0\0\x08running".ljust(104, b"\0")


def test_the_last_byte_of_a_file_is_the_last_of_the_description(make_site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "capture"
    site = make_site("site", incoming=None)
    path.write_bytes(b"left over from something longer" * SIZE)
    capture_of(site, f"file:{path}", path)
    assert path.read_bytes()[-1:] == b"}"


def test_an_offset_into_a_file(make_site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "capture"
    path.write_bytes(b"#" * 4096)
    site = make_site("site", incoming=None)
    site.poke(BLOCK, 0, content(1))
    site.migrate(f"file:{path},offset=4k")
    written = path.read_bytes()
    assert written[:4096] == b"#" * 4096
    assert dissect(written[4096:]).memory == {BLOCK: content(1)}
    other = make_site("other", incoming=f"file:{path},offset=4k")
    other.wait_status("completed")
    assert other.peek(BLOCK) == content(1)


def test_a_uuid_is_sent_where_it_is_to_be_checked(make_qemu: MakeQemu, tmp_path: Path) -> None:
    """The dissector against a QEMU of today, with a configuration subsection and a whole file of sorts of pages."""
    uuid = "00112233-4455-6677-8899-aabbccddeeff"
    source = make_qemu("source", ram=content(6), arguments=["-uuid", uuid])
    source.capability("validate-uuid")
    source.migrate(f"exec:cat > {tmp_path}/capture")
    found = dissect((tmp_path / "capture").read_bytes())
    assert found.configuration == {"configuration/uuid": bytes.fromhex(uuid.replace("-", ""))}
    assert found.memory == {BLOCK: content(6)}
    assert [(s.idstr, s.version, len(s.body)) for s in found.devices()] == [("timer", 2, 24), ("globalstate", 1, 104)]
    assert found.description["devices"][0]["vmsd_name"] == "timer"


def test_a_qemu_loads_our_file(make_site: MakeSite, make_qemu: MakeQemu, tmp_path: Path) -> None:
    site = make_site("site", incoming=None)
    site.poke(BLOCK, 0, content(7))
    capture_of(site, f"file:{tmp_path}/capture", tmp_path / "capture")
    target = make_qemu("target", incoming=f"exec:cat {tmp_path}/capture")
    target.wait_status({"completed"})
    assert target.ram() == content(7)
    assert target.run_state() == "running"


def test_a_daemon_loads_a_qemus_file(make_site: MakeSite, tmp_path: Path) -> None:
    """The one that is kept in this repository, so that there is one such test without any QEMU."""
    path = tmp_path / "capture"
    path.write_bytes(STREAM)
    found = dissect(STREAM)
    assert found.configuration == {"configuration/uuid": UUID}
    site = make_site("site", blocks={BLOCK: PAGES * 4096}, incoming="defer")
    site.qmp.execute("migrate-incoming", {"uri": f"file:{path}"})
    site.wait_status("completed")
    expected = b"".join(CONTENT.get(page, bytes(4096)) for page in range(PAGES))
    assert site.peek(BLOCK) == expected == found.memory[BLOCK]
    assert site.run_state() == "prelaunch"


def test_a_postcopy_between_two_daemons_with_devices(make_site: MakeSite) -> None:
    every: dict[str, Any] = {"blocks": {BLOCK: SIZE, "vram": 64 << 10}, "devices": {"disk": len(DISK), "empty": 0}}
    source, target = make_site("source", incoming=None, **every), make_site("target", **every)
    source.wait_event("running")
    source.poke(BLOCK, 0, content(1))
    state = source.device("disk")
    for site in (source, target):
        site.capability("postcopy-ram")
    source.parameter("downtime-limit", 1)
    source.parameter("max-bandwidth", SIZE // 64)
    with Proxy(("127.0.0.1", target.port)) as link:
        link.forward.kept = bytearray()
        source.qmp.execute("migrate", {"uri": link.uri})
        source.qmp.execute("migrate-start-postcopy")
        source.wait_status("completed")
        found = dissect_postcopy(link.take_forward())
    assert found.memory == {BLOCK: content(1), "vram": bytes(64 << 10)}
    assert found.missing() == {}
    bodies = {section.idstr: section.body for section in found.devices()}
    assert list(bodies) == ["globalstate", "disk", "empty"]
    assert bodies["disk"] == len(state).to_bytes(4, "big") + state
    assert target.peek(BLOCK) == content(1)
