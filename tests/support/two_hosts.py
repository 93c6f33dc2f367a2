"""What a test does with two machines: install, pair, move a workload there and back, upgrade, remove.

The rule of the file: it does as README says, with README's own commands and configuration, and writes down what it saw;
the test says what is right. Everything is asked of the machines themselves: systemd, dpkg, `migratectl`, the journal.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.house.repository import ROOT
from tests.support.booted_host import DEADLINE_S, BootedHost, lay_cable
from tests.support.journal import events_of

#: As in README.
ADDRESSES = {"host-a": "10.0.0.7", "host-b": "10.0.0.8"}
MACHINE = "demo"
UNIT = f"migrated@{MACHINE}.service"
RAM_BYTES = 32 << 20
SHOWN = ("ActiveState", "SubState", "Result", "NRestarts", "MainPID", "User", "UnitFileState")

#: Its standard input never ends, and is never waited for.
WALKER = f"""[Unit]
After={UNIT}
[Service]
ExecStart=/bin/sh -c 'exec /usr/lib/migrated/bin/python3 -m migrated.demo.walker \
    --attach /run/migrated/{MACHINE}/attach.sock --ram {RAM_BYTES} --name walker <>/run/walker.in'
StandardOutput=append:/run/walker.out
StandardError=journal
Nice=10
"""
#: A watchdog that can be waited for.
DROP_IN = "[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\n"


def build_package(directory: Path) -> Path:
    """Build the package from this tree. Raises AssertionError with what the script said."""
    pip = Path(sys.executable).with_name("pip")
    built = subprocess.run(
        [ROOT / "packaging" / "build-deb", "--compression", "none", "--output", directory],
        env={**os.environ, "PIP": str(pip)}, capture_output=True, text=True, check=False, timeout=DEADLINE_S * 5,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return Path(built.stdout.splitlines()[-1])


def revise(package: Path) -> Path:
    """Make the same package with Debian revision 2."""
    tree = package.with_name("revision-2")
    revised = package.with_name(package.name.replace("-1_", "-2_"))
    dpkg_deb("--raw-extract", package, tree)
    control = tree / "DEBIAN" / "control"
    control.write_text(re.sub(r"^(Version: .*)-1$", r"\1-2", control.read_text(), flags=re.MULTILINE))
    dpkg_deb("--root-owner-group", "-Znone", "--build", tree, revised)
    shutil.rmtree(tree)
    return revised


def dpkg_deb(*words: str | Path) -> None:
    subprocess.run(["/usr/bin/dpkg-deb", *words], check=True, capture_output=True, timeout=DEADLINE_S)


def pairing() -> tuple[list[list[str]], str]:
    """Return README's commands that pair two hosts, as words, and its configuration, for our machine's name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Pair two hosts")[2]
    block = next(found for found in re.findall(r"```console\n(.*?)```", text, re.DOTALL) if "pki init" in found)
    toml = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert toml is not None
    commands = [shlex.split(line.partition("#")[0].strip("$ ")) for line in block.splitlines()]
    configuration = "\n".join(line.strip() for line in toml[1].splitlines())
    return commands, configuration.replace('"kv"', f'"{MACHINE}"')


class Scene(BootedHost):
    """One of the two, with the words that this test needs."""

    @property
    def address(self) -> str:
        return ADDRESSES[self.name]

    def ctl(self, *words: str) -> dict[str, Any]:
        """Run migratectl for the machine; return its JSON."""
        done = self.run("migratectl", "--machine", MACHINE, "--json", *words)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def show(self, unit: str = UNIT) -> dict[str, str]:
        """Return properties of a unit."""
        lines = self.run("systemctl", "show", unit, f"--property={','.join(SHOWN)}").stdout.splitlines()
        return dict(line.split("=", 1) for line in lines)

    def write(self, path: str, text: str) -> None:
        """Write a file inside, as an editor would."""
        self.run("sh", "-c", 'mkdir -p "${1%/*}" && printf %s "$2" > "$1"', "sh", path, text)

    def walker_said(self) -> list[dict[str, Any]]:
        """Return all events of the walker so far."""
        path = self.root / "run" / "walker.out"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def walker_event(self, name: str, after: int) -> dict[str, Any]:
        """Wait for the next event of that name behind the first ``after`` ones."""

        def found() -> dict[str, Any] | None:
            return next((event for event in self.walker_said()[after:] if event["event"] == name), None)

        event: dict[str, Any] = self.wait_for(found, f"the walker says {name}")
        return event

    def check(self) -> dict[str, Any]:
        """Let the walker check its memory."""
        before = len(self.walker_said())
        self.run("sh", "-c", "echo check > /run/walker.in")
        return self.walker_event("checked", before)

    def install(self, package: Path, *, check: bool = True) -> str:
        """Install or upgrade; return what was said."""
        done = self.run("dpkg", "-i", f"/mnt/{package.name}", check=check)
        return done.stdout + done.stderr

    def journal(self) -> list[dict[str, Any]]:
        """Return the daemon's events in the journal."""
        return events_of(self.run("journalctl", "--no-pager", "-o", "json", "-u", UNIT).stdout)


@contextmanager
def two_hosts(directory: Path, packages: Path) -> Iterator[tuple[Scene, Scene]]:
    """Boot both, joined by a cable."""
    hosts = []
    for name in ADDRESSES:
        (directory / name).mkdir()
        hosts.append(Scene(name, directory / name, packages, ADDRESSES))
    a, b = hosts
    with ExitStack() as stack:
        for host in hosts:
            stack.enter_context(host.booted())
        lay_cable(a, b, ADDRESSES)
        for host in hosts:
            host.wait_until_booted()
        yield a, b


def play(a: Scene, b: Scene, package: Path) -> dict[str, Any]:
    """Do all of it; return what was seen, however far it went."""
    seen: dict[str, Any] = {}
    try:
        for act in (_install, _pair, _start, _there, _restart, _back, _hang, _journals, _busy, _upgrade, _remove):
            act(a, b, package, seen)
    except (AssertionError, LookupError, OSError, ValueError, subprocess.SubprocessError):
        # The tests of what was not seen say it.
        logs = [f"--- {host.name}\n{_last_words(host)}" for host in (a, b)]
        seen["error"] = "\n".join([traceback.format_exc(), *logs])
    return seen


def _last_words(host: Scene) -> str:
    return host.run("journalctl", "--no-pager", "-o", "short-monotonic", "-n", "60", check=False).stdout


def _install(a: Scene, b: Scene, package: Path, seen: dict[str, Any]) -> None:
    for host in (a, b):
        host.install(package)
    seen["installed"] = {
        "status": a.run("dpkg-query", "-W", "-f", "${Status}", "migrated").stdout,
        "changed": a.run("dpkg", "--verify", "migrated").stdout,
        "units": a.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "migrated*").stdout,
        "enabled": a.run("systemctl", "is-enabled", "migrated.service", check=False).stdout.strip(),
        "verified": a.run("systemd-analyze", "verify", "--man=no", UNIT, check=False).stderr,
        "user": a.run("id", "-un", "migrated").stdout.strip(),
    }
    seen["completion"] = a.run("bash", "--norc", "-c", COMPLETE).stdout.split()


#: What the shell does when somebody types "migratectl snapshot v" and the tab key.
COMPLETE = """
. /usr/share/bash-completion/completions/migratectl
COMP_WORDS=(migratectl snapshot v) COMP_CWORD=2
_migratectl_completion migratectl
echo "${COMPREPLY[@]}"
"""


def _pair(a: Scene, b: Scene, package: Path, seen: dict[str, Any]) -> None:
    commands, configuration = pairing()
    for words in commands:
        if words[0] == "scp":
            # As scp -rp does when root at the one host copies to root at the other.
            source, target = words[-2], words[-1].partition(":")[2]
            shutil.copytree(a.root / source.lstrip("/"), b.root / target.lstrip("/"))
        else:
            a.run(*words)
    seen["commands"] = len(commands)
    a.write(f"/etc/migrated/{MACHINE}.toml", configuration)
    swapped = configuration.replace("10.0.0.7", "10.0.0.8").replace("host-b", "host-a")
    b.write(f"/etc/migrated/{MACHINE}.toml", swapped)


def _start(a: Scene, b: Scene, package: Path, seen: dict[str, Any]) -> None:
    for host in (a, b):
        host.write(f"/etc/systemd/system/{UNIT}.d/test.conf", DROP_IN)
        host.write("/etc/systemd/system/walker.service", WALKER)
        host.run("mkfifo", "/run/walker.in")
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "enable", "--now", f"migrated@{MACHINE}")
        host.run("systemctl", "start", "walker")
    for host in (a, b):
        host.walker_event("ready", 0)
    seen["started"] = [host.show() for host in (a, b)]
    seen["keys"] = {host.name: _modes(host, "/etc/migrated/pki") for host in (a, b)}
    seen["other keys"] = _modes(a, "/etc/migrated/ca") | _modes(a, "/etc/migrated/issued/host-b")
    seen["waiting"] = [host.ctl("status")["status"]["status"] for host in (a, b)]
    seen["trust"] = [a.run("migratectl", "pki", "check", b.address).stdout]
    seen["trust"].append(b.run("migratectl", "pki", "check", a.address).stdout)
    seen["names"] = a.run("bash", "--norc", "-c", COMPLETE.replace("snapshot v", "--machine d")).stdout.split()
    a.ctl("cont")
    a.walker_event("running", 0)


def _modes(host: Scene, directory: str) -> set[str]:
    """Return the permissions and owners of private keys."""
    return set(host.run("sh", "-c", f"stat -c '%a %U:%G' {directory}/*-key.pem").stdout.splitlines())


def _move(source: Scene, target: Scene, *options: str) -> dict[str, Any]:
    """Move the machine; return what both sides say about it."""
    before = [len(host.walker_said()) for host in (source, target)]
    report = source.ctl("migrate", f"tcp:{target.address}:7400", *options)
    left = source.walker_event("moved", before[0])
    target.walker_event("running", before[1])
    owners = [host.ctl("whoowns") for host in (source, target)]
    return {"report": report, "left": left, "arrived": target.check(), "owners": owners}


def _there(a: Scene, b: Scene, package: Path, seen: dict[str, Any]) -> None:
    seen["there"] = _move(a, b)


def _back(a: Scene, b: Scene, package: Path, seen: dict[str, Any]) -> None:
    seen["back"] = _move(b, a, "--postcopy=at-once")


def _restart(a: Scene, b: Scene, package: Path, seen: dict[str, Any]) -> None:
    """Restart the daemon of a machine that runs."""
    before = b.show()
    b.run("systemctl", "restart", UNIT)
    seen["restarted"] = {"before": before, "after": b.show(), "state": _is_back(b), "check": b.check()}


def _is_back(host: Scene) -> str:
    """Wait until the workload has attached to the new daemon; return the run state."""
    host.wait_for(lambda: host.ctl("status")["machine"]["workloads"], "the walker is back")
    return str(host.ctl("status")["status"]["status"])


def _hang(a: Scene, b: Scene, package: Path, seen: dict[str, Any]) -> None:
    """Stop the daemon's process: the watchdog must notice, and the next daemon must find its workload."""
    before = a.show()
    a.run("kill", "-STOP", before["MainPID"])
    a.wait_for(lambda: a.show()["NRestarts"] == "1" and a.show()["SubState"] == "running", "a restart")
    seen["hung"] = {"before": before, "after": a.show(), "state": _is_back(a), "check": a.check()}


def _journals(a: Scene, b: Scene, package: Path, seen: dict[str, Any]) -> None:
    seen["journal"] = [host.journal() for host in (a, b)]
    seen["watchdog"] = a.run("journalctl", "--no-pager", "-o", "cat", "-u", UNIT).stdout


def _busy(a: Scene, b: Scene, package: Path, seen: dict[str, Any]) -> None:
    """Upgrade and remove while the machine moves, too slowly to end."""
    a.ctl("parameters", "max-bandwidth=1M")
    a.ctl("migrate", "--detach", f"tcp:{b.address}:7400")
    a.wait_for(lambda: a.ctl("status")["migration"]["status"] == "active", "it moves")
    before = a.show()
    said = a.install(revise(package))
    removal = a.run("dpkg", "-r", "migrated", check=False)
    arriving = b.run("/usr/lib/migrated/instances", "stop", check=False)
    seen["busy"] = {
        "before": before,
        "said": said,
        "removal": (removal.returncode, removal.stdout + removal.stderr),
        "arriving": (arriving.returncode, arriving.stderr),
        "after": a.show(),
        "version": a.run("dpkg-query", "-W", "-f", "${Version}", "migrated").stdout,
        "status": a.ctl("status")["migration"]["status"],
        "cancelled": a.ctl("cancel")["status"],
    }
    a.wait_for(lambda: a.ctl("status")["migration"]["status"] == "cancelled", "it is cancelled")
    seen["busy"]["state"] = a.ctl("status")["status"]["status"]


def _upgrade(a: Scene, b: Scene, package: Path, seen: dict[str, Any]) -> None:
    """Upgrade under a machine that runs."""
    before = a.show()
    said = a.install(package.with_name(package.name.replace("-1_", "-2_")))
    seen["upgraded"] = {
        "said": said,
        "before": before,
        "after": a.show(),
        "state": _is_back(a),
        "check": a.check(),
    }


def _remove(a: Scene, b: Scene, package: Path, seen: dict[str, Any]) -> None:
    walker = a.show("walker.service")
    # What the programs would have compiled anew would be seen as well.
    changed = a.run("dpkg", "--verify", "migrated").stdout
    removed = a.run("dpkg", "-r", "migrated")
    seen["removed"] = {
        "said": removed.stdout + removed.stderr,
        "changed": changed,
        "unit": a.show(),
        "walkers": (walker["MainPID"], a.show("walker.service")["MainPID"]),
        "configuration": _files(a, "/etc/migrated"),
        "program": _files(a, "/usr/lib/migrated"),
    }
    purged = a.run("dpkg", "--purge", "migrated")
    seen["purged"] = {
        "said": purged.stdout + purged.stderr,
        "configuration": _files(a, "/etc/migrated"),
        "state": _files(a, "/var/lib/migrated"),
        "enabled": a.run("find", "/etc/systemd/system", "-name", "migrated*", "-type", "l").stdout,
        "known": a.run("dpkg-query", "-W", "-f", "${Status}", "migrated", check=False).stdout,
    }


def _files(host: Scene, directory: str) -> list[str]:
    return sorted(host.run("find", directory, "-type", "f", check=False).stdout.split())
