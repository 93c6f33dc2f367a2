"""The systemd units are valid, and as closed as they were."""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

import pytest

from tests.house.repository import ROOT, run

UNITS = ["migrated.service", "migrated@.service"]

#: In tenths, as systemd-analyze counts: 1.2 with systemd 252. What is left is the network itself, which a migration
#: needs, and PrivateUsers, which would hide who attaches; newer versions may find a little more.
EXPOSURE_MAX = 15

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_verify(unit: str, tmp_path: Path) -> None:
    # The program is installed elsewhere or not at all; everything else is verified as it is.
    text = (ROOT / "systemd" / unit).read_text()
    assert "ExecStart=/usr/bin/migrated " in text
    copy = tmp_path / unit.replace("@.", "@kv.")
    copy.write_text(text.replace("ExecStart=/usr/bin/migrated ", "ExecStart=/bin/true "))
    run("systemd-analyze", "verify", "--man=no", str(copy))


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_exposure(unit: str) -> None:
    path = str(ROOT / "systemd" / unit)
    run("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", "--no-pager", path)


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed")
@pytest.mark.skipif(os.geteuid() != 0, reason="users and directories are made as root")
def test_users_and_directories(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    run("systemd-sysusers", f"--root={tmp_path}", str(ROOT / "systemd" / "migrated.sysusers"))
    assert "migrated:x:" in (tmp_path / "etc" / "passwd").read_text()
    run("systemd-tmpfiles", f"--root={tmp_path}", "--create", str(ROOT / "systemd" / "migrated.tmpfiles"))
    for directory in ("etc/migrated", "run/migrated", "var/lib/migrated"):
        assert (tmp_path / directory).is_dir()


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="systemd-tmpfiles is not installed")
@pytest.mark.skipif(os.geteuid() != 0, reason="files are given away as root")
def test_keys_that_were_copied_are_the_groups_to_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    run("systemd-sysusers", f"--root={tmp_path}", str(ROOT / "systemd" / "migrated.sysusers"))
    group = re.search(r"^migrated:x:(\d+):", (tmp_path / "etc" / "group").read_text(), re.MULTILINE)
    assert group is not None
    for directory, mode in (("pki", 0o640), ("ca", 0o600), ("issued/host-b", 0o600)):
        key = tmp_path / "etc" / "migrated" / directory / "server-key.pem"
        key.parent.mkdir(parents=True, mode=0o700)
        key.touch(mode=0o600)
        run("systemd-tmpfiles", f"--root={tmp_path}", "--create", str(ROOT / "systemd" / "migrated.tmpfiles"))
        owner = key.stat()
        assert (stat.S_IMODE(owner.st_mode), owner.st_uid) == (mode, 0)
        assert owner.st_gid == (int(group[1]) if directory == "pki" else 0)
