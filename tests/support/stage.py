"""Two daemons for faults: sites that break at named points, a link between them that breaks, and the checker.

The rule of the file: whatever was done to it, `Stage.heal` takes it away, and `Stage.check` holds what has to be true
then: one host owns the machine and runs it, the other one knows, every step was taken once (S1, S2), the memory is that
of the moment at which it stopped (S3), the records agree (S4), and nobody was asked (L1).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from migrated.daemon.faults import DIRECTORY, HELD, KEY_FILE, KEY_VARIABLE
from migrated.demo.site import Site
from migrated.errors import CommandError
from tests.support.following import record_of, run_state, wait_until
from tests.support.proxy import Direction, Proxy
from tests.support.witness import assert_each_step_once, read_log

KEY = "for-tests"
RAM_BYTES = 8 << 20
#: A link that says nothing is dead after this long.
SILENCE_MS = 500
ANSWER_MS = 1000
CONFIG = f"""
[migration.parameters]
x-migrated-silence-timeout = {SILENCE_MS}
x-migrated-answer-timeout = {ANSWER_MS}
[migration.capabilities]
events = true
"""
POINT_DEADLINE_S = 20.0
#: What a log must never have: an exception nobody expected.
BUGS = ("Traceback", "_bug", "never retrieved", "internal error", "invalid migration status")
#: What the other host's record may say of a machine that is not there.
ELSEWHERE = frozenset({"none", "partial", "prepared", "moved"})


class FaultySite(Site):
    """A site whose daemon does what a file says at its fault points, and whose walker is a witness."""

    def __init__(self, name: str, directory: Path, **options: Any) -> None:
        steps = directory / f"{name}.steps"
        super().__init__(
            name,
            directory,
            module="tests.support.witness",
            walker_arguments=["--log", str(steps)],
            config=options.pop("config", CONFIG),
            **options,
        )
        self.steps = steps
        self.faults = self.directory / "state" / DIRECTORY
        self.faults.mkdir(parents=True)
        (self.faults / KEY_FILE).write_text(KEY)

    def arm(self, point: str, action: str) -> None:
        """Have the daemon do ``action`` when it comes to ``point``."""
        aside = self.faults / "aside"
        aside.write_text(action)
        aside.rename(self.faults / point)

    def wait_taken(self, point: str) -> None:
        """Wait until the daemon has come to ``point``."""
        self._wait(lambda: not (self.faults / point).exists(), f"comes to {point}")

    def wait_held(self, point: str) -> None:
        """Wait until the daemon stands at ``point``."""
        self._wait((self.faults / (point + HELD)).exists, f"holds at {point}")

    def let_go(self, point: str) -> None:
        """Let the daemon go on."""
        (self.faults / (point + HELD)).unlink(missing_ok=True)

    def disarm(self) -> None:
        """Ask for nothing any more, and let go of what is held."""
        for path in self.faults.iterdir():
            if path.name != KEY_FILE:
                path.unlink()

    def wait_killed(self) -> None:
        """Wait until the daemon has killed itself."""
        self.daemon.wait(POINT_DEADLINE_S)
        assert self.daemon.returncode == -signal.SIGKILL, self.log_tail()

    def wait_stopped(self) -> None:
        """Wait until the daemon stands still (SIGSTOP)."""
        self._wait(lambda: self._state() == "T", "stopped itself")

    def _wait(self, probe: Callable[[], Any], what: str) -> None:
        try:
            wait_until(probe, f"{self.name} {what}", POINT_DEADLINE_S)
        except AssertionError as error:
            error.add_note(self.log_tail())
            raise

    def go_on(self) -> None:
        """Send SIGCONT."""
        os.kill(self.daemon.pid, signal.SIGCONT)

    def _state(self) -> str:
        return Path(f"/proc/{self.daemon.pid}/stat").read_text().rpartition(")")[2].split()[0]

    @property
    def alive(self) -> bool:
        return self.daemon.poll() is None

    def hold(self) -> str:
        """Return what stands on the disk."""
        return str(record_of(self)["hold"])

    def status(self) -> dict[str, Any]:
        return dict(self.qmp.execute("query-migrate"))


class Stage:
    """A pair of sites with a link in each direction. The machine begins at the first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self.whole = True
        """False from the beginning of a migration until it was checked: then it is not used again."""

    def __enter__(self) -> Self:
        try:
            os.environ[KEY_VARIABLE] = KEY
            self._stack.callback(os.environ.pop, KEY_VARIABLE)
            self.a, self.b = (self._stack.enter_context(self._site(name)) for name in ("A", "B"))
            self._connect()
            self.source, self.target = self.a, self.b
            self.a.qmp.execute("cont")
            self.a.wait_event("running")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        self._stack.close()

    def _site(self, name: str) -> FaultySite:
        return FaultySite(name, self._directory, ram_bytes=RAM_BYTES)

    def _connect(self) -> None:
        """Make the links."""
        self._links = {site: self._stack.enter_context(Proxy(_address(site))) for site in (self.a, self.b)}

    @property
    def uri(self) -> str:
        """Where the present target is reached."""
        return self.link.uri

    @property
    def sites(self) -> tuple[FaultySite, FaultySite]:
        return self.a, self.b

    @property
    def link(self) -> Proxy:
        """The link to the present target."""
        return self._links[self.target]

    # -- doing -------------------------------------------------------------------------------------------------

    def begin(self, *, postcopy: bool = False) -> None:
        """Begin to migrate; in postcopy the machine goes first, whatever was sent."""
        self.whole = False
        on = [{"capability": "postcopy-ram", "state": postcopy}]
        self.source.qmp.execute("migrate-set-capabilities", {"capabilities": on})
        self.source.qmp.execute("migrate", {"uri": self.uri})
        if postcopy:
            self.source.qmp.execute("migrate-start-postcopy")

    def silence(self, *ways: str) -> None:
        """Let nothing through any more, in ``forward`` or ``backward`` direction; who speaks does not notice."""
        for name in ways:
            way: Direction = getattr(self.link, name)
            way.at_limit, way.limit = "swallow", way.passed

    def kill(self, site: FaultySite) -> None:
        """Kill a daemon."""
        site.daemon.kill()
        site.daemon.wait()

    def restart(self, site: FaultySite) -> None:
        """Start a daemon again that is not there any more, or kill it first; its walker comes back to it."""
        site.restart_daemon()
        self.moved_to(site)
        wait_until(lambda: site.qmp.execute("x-migrated-query-machine")["workloads"], f"walker {site.name} is back")

    def moved_to(self, site: FaultySite) -> None:
        """Have the link lead to where a daemon listens now."""
        self._links[site].target = _address(site)

    def mend_link(self) -> None:
        """Let everything through again; what was said meanwhile is lost, and a real link's ends find that out."""
        if self.link.forward.limit is not None or self.link.backward.limit is not None:
            self.link.resume()
            self.link.cut()

    def heal(self) -> None:
        """Take away all that was done: faults, silence, daemons that are stopped or dead."""
        for site in self.sites:
            site.disarm()
            if site.alive:
                site.go_on()
            else:
                self.restart(site)
        self.mend_link()

    # -- the checker -------------------------------------------------------------------------------------------

    def wait_end(self) -> FaultySite:
        """Wait until one host owns the machine and runs it, and the other one knows; return who does."""
        owner: FaultySite = self.wait(self._owner, "one host owns the machine and runs it, and the other one knows")
        return owner

    def _owner(self) -> FaultySite | None:
        for here, there in (self.sites, self.sites[::-1]):
            if here.hold() == "owner" and there.hold() in ELSEWHERE and run_state(here) == "running":
                # A destination that has not heard that the source keeps it waits, and hears it with the next offer.
                return None if _busy(here) or (there.hold() != "prepared" and _busy(there)) else here
        return None

    def check(self, owner: str = "") -> FaultySite:
        """Hold S1 to S4 and L1, and that the ``owner`` ("source" or "target") is right; the next one goes back."""
        here = self.wait_end()
        stays = here is self.source
        assert not owner or stays is (owner == "source"), f"the {owner} should own it\n{self.describe()}"
        self.wait(lambda: self._reported_here() is stays, "the source's last report says who has the machine")
        left = None if stays else self.source.wait_event("moved")
        found = here.check()
        again = here.check()
        assert found["invariant"]
        assert again["invariant"]
        assert again["steps"] > found["steps"]
        if left is not None:
            assert left["invariant"]
            assert (left["steps"], left["hash"]) == (found["at"], found["hash"])
            assert record_of(self.source)["epoch"] == record_of(self.target)["epoch"], self.describe()
            self.source, self.target = self.target, self.source
        assert_each_step_once(read_log(site.steps) for site in self.sites)
        for site in self.sites:
            bugs = [line for line in site.log_path.read_text().splitlines() if any(bug in line for bug in BUGS)]
            assert bugs == []
        self.whole = True
        return here

    def _reported_here(self) -> bool | None:
        """Return whether the source has the machine, by its report of its last migration in whichever direction."""
        history = self.source.qmp.execute("x-migrated-query-history")
        if not history:
            return True  # it was born here
        # The newest by its time, unless the clock was set.
        last = self.source.status().get("x-migrated-migration-id")
        report = next((one for one in history if one["id"] == last), history[0])
        ours = {"outgoing": "source-owns", "incoming": "destination-owns"}[report["direction"]]
        return None if report["outcome"] == "unknown" else report["outcome"] == ours

    def nobody_runs(self) -> None:
        """Hold that neither workload takes a step: not between two looks with a command of each daemon between."""
        before = [read_log(site.steps) for site in self.sites]
        for site in self.sites:
            if site.alive:
                assert run_state(site) != "running", self.describe()
        assert [read_log(site.steps) for site in self.sites] == before

    def wait(self, probe: Callable[[], Any], what: str) -> Any:
        """Wait until ``probe`` gives something true; say how it stands where it never does."""
        try:
            return wait_until(probe, what, POINT_DEADLINE_S)
        except AssertionError as error:
            error.add_note(self.describe())
            raise

    def wait_status(self, site: FaultySite, *statuses: str) -> None:
        """Wait until a migration has one of these at a site."""
        self.wait(lambda: site.status().get("status", "none") in statuses, f"{site.name} in {statuses}")

    def describe(self) -> str:
        """Say how it stands, for whoever looks at a failure."""
        lines = []
        for site in self.sites:
            lines.append(f"{site.name}: {record_of(site)}, {run_state(site) if site.alive else site.daemon.returncode}")
            lines.append(site.log_tail())
        return "\n".join(lines)


def _busy(site: FaultySite) -> bool:
    return site.status().get("status") in (
        "setup", "active", "device", "cancelling", "postcopy-active", "postcopy-paused", "postcopy-recover"
    )  # fmt: skip


def _address(site: Site) -> tuple[str, int]:
    host, port = site.address.removeprefix("tcp:").rsplit(":", 1)
    return host, int(port)


def refused(site: Site, command: str, **arguments: Any) -> str:
    """Execute a command that is to be refused; return why."""
    try:
        site.qmp.execute(command, arguments or None)
    except CommandError as error:
        return str(error)
    raise AssertionError(f"{command} was not refused at {site.name}")
