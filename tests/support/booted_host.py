"""A machine with a booted systemd on an overlay of this host's root, in which commands run as root.

The rule of the file: whatever is written inside goes to a tmpfs that only the container's own mount namespace has; so
there is nothing to unmount, and when its first process is killed, all of it is gone, network included.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.container import PROPAGATE
from tests.support.following import wait_until

#: Far beyond what any step takes on a slow machine.
DEADLINE_S = 60.0
#: A package of 120 MB, twice, and what the workloads write.
TMPFS_BYTES = 2 << 30
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Services that this host has enabled are its own; so are its name, its journal, and a migrated that it may run.
ROOT = """
mount -t tmpfs -o size={size} tmpfs {at}
mkdir {at}/upper {at}/work {at}/root
mount -t overlay -o lowerdir=/,upperdir={at}/upper,workdir={at}/work overlay {at}/root
cd {at}/root
rm -rf etc/systemd/system etc/fstab var/log/journal etc/migrated var/lib/migrated
mkdir -p etc/systemd/system var/log/journal
# Nobody reads the manual here, and its index takes longer than all the rest. Images forbid packages to start services.
rm -f var/lib/man-db/auto-update usr/sbin/policy-rc.d
echo {machine_id} > etc/machine-id
echo {name} > etc/hostname
printf '127.0.0.1 localhost\\n{hosts}' > etc/hosts
cd /
exec systemd-nspawn --directory={at}/root --machine={unique} --hostname={name} --quiet --register=no --keep-unit \
    --private-network --console=pipe --resolv-conf=off --bind-ro={packages}:/mnt {words}
"""


class BootedHost:
    """One of the machines; ``directory`` exists, and is empty again when it is gone."""

    def __init__(self, name: str, directory: Path, packages: Path, hosts: dict[str, str]) -> None:
        self.name = name
        self._directory = directory
        self._packages = packages
        self._hosts = hosts
        self._unique = f"{name}-{uuid.uuid4().hex[:12]}"
        self._console = directory.with_name(f"{name}.console")
        self.leader = 0

    @property
    def root(self) -> Path:
        """Its root directory as it is seen from here."""
        return Path(f"/proc/{self.leader}/root")

    def why_not(self) -> str:
        """Return why no such machine can run here (this may be one that forbids it); empty where one can."""
        with self._console.open("wb") as console:
            done = subprocess.run(
                self._command("/bin/true"), stdin=subprocess.DEVNULL, stdout=console, stderr=console, check=False,
                timeout=DEADLINE_S,
            )  # fmt: skip
        self._forget()
        if done.returncode:
            return f"a container on an overlay of / cannot run here: {self.console().strip()}"
        cable = ["unshare", "--net", "ip", "link", "add", "one", "type", "veth", "peer", "name", "other"]
        laid = subprocess.run(cable, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
        return f"no veth pair can be made here: {laid.stderr.strip()}" if laid.returncode else ""

    @contextmanager
    def booted(self) -> Iterator[None]:
        """Boot; end it however this is left."""
        with (
            self._console.open("wb") as console,
            subprocess.Popen(
                self._command("--boot", "systemd.unit=multi-user.target"), stdin=subprocess.DEVNULL, stdout=console,
                stderr=console,
            ) as nspawn,
        ):  # fmt: skip
            try:
                self.leader = self.wait_for(lambda: self._first_process(nspawn), "a first process")
                yield
            finally:
                _end(nspawn)
                self._forget()

    def wait_until_booted(self) -> None:
        self.wait_for(
            lambda: self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded"),
            "the boot",
        )

    def _command(self, *words: str) -> list[str]:
        script = ROOT.format(
            size=TMPFS_BYTES,
            at=shlex.quote(str(self._directory)),
            machine_id=uuid.uuid4().hex,
            name=self.name,
            unique=self._unique,
            hosts="".join(f"{address} {host}\\n" for host, address in self._hosts.items()),
            packages=shlex.quote(str(self._packages)),
            words=shlex.join(words),
        )
        # Where the tests are killed, nspawn is told, and shuts the machine down.
        return ["setpriv", "--pdeathsig=TERM", "unshare", "--mount", "--propagation=private", "sh", "-ec", script]

    def _first_process(self, nspawn: subprocess.Popen[bytes]) -> int | None:
        """Return the pid, here, of the process that is number one in there."""
        assert nspawn.poll() is None, f"{self.name} did not start:\n{self.console()}"
        for pid in _children(nspawn.pid):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                if f"\nNSpid:\t{pid}\t1\n" in status and "Name:\tsystemd\n" in status:
                    return pid
        return None

    def run(self, *command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root. Raises AssertionError with all that it said where it fails and ``check``."""
        enter = ["nsenter", f"--target={self.leader}", "--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd"]
        environment = ["env", "-i", f"PATH={PATH}", "HOME=/root", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"]
        done = subprocess.run(
            [*enter, "--", *environment, *command], capture_output=True, text=True, errors="replace", check=False,
            stdin=subprocess.DEVNULL, timeout=DEADLINE_S, **options,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{self.name}: {shlex.join(command)}: {done.stdout}{done.stderr}"
        return done

    def network(self, *words: str) -> None:
        """Run ip(8) in its network, with this host's program."""
        enter = ["nsenter", f"--target={self.leader}", "--net"]
        subprocess.run([*enter, "ip", *words], check=True, timeout=DEADLINE_S)

    def wait_for(self, probe: Callable[[], Any], what: str) -> Any:
        """Ask until there is an answer."""
        try:
            return wait_until(probe, f"{self.name}: {what}", DEADLINE_S)
        except AssertionError as error:
            error.add_note(self.console())
            raise

    def console(self) -> str:
        return self._console.read_text(errors="replace")[-4000:] if self._console.exists() else ""

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            (PROPAGATE / self._unique).rmdir()


def lay_cable(a: BootedHost, b: BootedHost, addresses: dict[str, str]) -> None:
    """Join both by a veth pair, which goes when one of them does."""
    link = ["ip", "link", "add", "host0", "netns", str(a.leader), "type", "veth", "peer", "name", "host0"]
    subprocess.run([*link, "netns", str(b.leader)], check=True, timeout=DEADLINE_S)
    for host in (a, b):
        host.network("addr", "add", f"{addresses[host.name]}/24", "dev", "host0")
        host.network("link", "set", "host0", "up")


def _end(nspawn: subprocess.Popen[bytes]) -> None:
    """Kill the container's first process, and all others with it; then nspawn ends by itself, and so do the mounts."""
    for patience_s in (DEADLINE_S / 2, 0):
        for pid in _children(nspawn.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            nspawn.wait(patience_s)
            return
    nspawn.kill()


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
