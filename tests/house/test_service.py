"""The systemd units are valid, and as closed as they were."""

from __future__ import annotations

import os
import shutil
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
