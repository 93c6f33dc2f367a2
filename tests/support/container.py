"""A container with a booted systemd, this host's /usr, this tree's units, and nothing else of this host.

The rule of the file: the root directory is made from scratch below a directory of the test's; /usr and the tree are
bound read-only, so that whatever goes wrong inside stays inside. Nothing is left behind outside of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import uuid
from pathlib import Path
from typing import Any

from tests.house.repository import ROOT

DEADLINE_S = 40
#: The interpreter must be below /usr, and that for which the installed packages were built.
PYTHON = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
#: nspawn makes a directory per container here; where /run is no tmpfs it does not dare to remove it.
PROPAGATE = Path("/run/systemd/nspawn/propagate")

CONFIG = '[migration]\nincoming = "tcp:127.0.0.1:{port}"\n'
#: A walker ends when its standard input does.
OWN = f"""[workload]
command = ["/bin/sh", "-c", '''
sleep 600 | exec {PYTHON} -m migrated.demo.walker --attach $MIGRATED_ATTACH --ram 8388608 --name walker-own
''']
"""
#: As an operator would say that the program is elsewhere; a watchdog that can be waited for.
DROP_IN = f"""[Service]
ExecStart=
ExecStart={PYTHON} -m migrated --config /etc/migrated/{{file}}.toml
Environment=PYTHONPATH=/opt/tree:/opt/site PYTHONDONTWRITEBYTECODE=1
WatchdogSec=1
TimeoutAbortSec=1
"""
PROBE = f"""[Unit]
Requires=basic.target
After=basic.target
SuccessAction=exit
FailureAction=exit
FailureActionExitStatus=1
[Service]
Type=oneshot
TimeoutStopSec=5
Environment=PYTHONPATH=/opt/tree:/opt/site PYTHONDONTWRITEBYTECODE=1
ExecStart={PYTHON} -m tests.support.systemd_probe /opt/seen/seen.json
StandardError=file:/opt/seen/errors
"""


class Container:
    """Made of a directory that exists."""

    def __init__(self, directory: Path) -> None:
        self._root = directory / "root"
        self._seen = directory / "seen"
        self._name = f"migrated-{uuid.uuid4().hex[:12]}"
        self._seen.mkdir()
        self._make_root()

    def _make_root(self) -> None:
        root = self._root
        for name in ("usr", "etc/systemd/system", "etc/sysusers.d", "etc/tmpfiles.d", "etc/migrated", "var", "root"):
            (root / name).mkdir(parents=True)
        for link in ("bin", "sbin", "lib", "lib64"):
            (root / link).symlink_to(f"usr/{link}")
        shutil.copy("/usr/lib/os-release", root / "etc" / "os-release")
        (root / "etc" / "machine-id").write_text(f"{uuid.uuid4().hex}\n")
        shutil.copy(ROOT / "systemd" / "migrated.sysusers", root / "etc" / "sysusers.d" / "migrated.conf")
        shutil.copy(ROOT / "systemd" / "migrated.tmpfiles", root / "etc" / "tmpfiles.d" / "migrated.conf")
        units = root / "etc" / "systemd" / "system"
        for unit, file in (("migrated.service", "migrated"), ("migrated@.service", "%i")):
            shutil.copy(ROOT / "systemd" / unit, units)
            (units / f"{unit}.d").mkdir()
            (units / f"{unit}.d" / "test.conf").write_text(DROP_IN.format(file=file))
        (units / "probe.service").write_text(PROBE)
        for name, port in (("migrated", 7400), ("demo", 7401)):
            (root / "etc" / "migrated" / f"{name}.toml").write_text(CONFIG.format(port=port))
        (root / "etc" / "migrated" / "own.toml").write_text(OWN)

    def why_not(self) -> str:
        """Return why no container can run here (this may be one that forbids it); empty where one can."""
        status, said = self._nspawn("/bin/true")
        return "" if status == 0 else f"systemd-nspawn cannot run here: {said.strip().rpartition(chr(10))[2]}"

    def run(self) -> dict[str, Any]:
        """Boot, let the probe look, return what it saw. Raises AssertionError with the console where it saw nothing."""
        _, console = self._nspawn("--boot", "systemd.unit=probe.service")
        try:
            seen: dict[str, Any] = json.loads((self._seen / "seen.json").read_text())
        except OSError:
            raise AssertionError(f"the probe wrote nothing:\n{console}") from None
        seen["errors"] = (self._seen / "errors").read_text()
        return seen

    def _nspawn(self, *words: str) -> tuple[int, str]:
        """Run until the container has ended; return status and console. What hangs is ended with its processes."""
        command = [
            "systemd-nspawn", f"--directory={self._root}", f"--machine={self._name}", "--quiet", "--register=no",
            "--keep-unit", "--private-network", "--console=pipe", "--bind-ro=/usr", f"--bind-ro={ROOT}:/opt/tree",
            f"--bind-ro={sysconfig.get_path('purelib')}:/opt/site", f"--bind={self._seen}:/opt/seen", *words,
        ]  # fmt: skip
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        ) as nspawn:  # fmt: skip
            try:
                said = nspawn.communicate(timeout=DEADLINE_S)[0]
            except BaseException:
                # The container's first process outlives an nspawn that is killed; all others end with it.
                for pid in Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
                nspawn.kill()
                raise
            finally:
                with contextlib.suppress(OSError):
                    (PROPAGATE / self._name).rmdir()
        return nspawn.returncode, said
