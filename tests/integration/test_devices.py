"""Described devices, in workloads and in the daemon, move between two real daemons; what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.site import Site
from tests.integration.conftest import MIB, MakeSite
from tests.support.described import shown, state
from tests.support.dissect import dissect
from tests.support.following import run_state, wait_status, wait_until
from tests.support.proxy import Proxy

HANDLERS = '[handlers]\nload = ["tests.support.described:register"]\n'
SHORT = "[workload]\nattach-timeout = 1\n"


class DescribedSite(Site):
    """A site whose workload has the devices named in ``devices``."""

    def state(self) -> dict[str, Any]:
        assert self.walker.stdin is not None
        self.walker.stdin.write("state\n")
        self.walker.stdin.flush()
        devices: dict[str, Any] = self.wait_event("state")["devices"]
        return devices


@pytest.fixture
def make(make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DescribedSite]:
    """Return a function that starts a daemon with handlers, and a workload with devices."""
    monkeypatch.setenv("DESCRIBED_DIR", str(tmp_path))

    def start(name: str, *devices: str, handlers: str = "", config: str = "", seed: int = 1) -> DescribedSite:
        monkeypatch.setenv("DESCRIBED_HANDLERS", handlers)
        options = [word for device in devices for word in ("--device", device)]
        site = make_site(
            name, kind=DescribedSite, module="tests.support.described", ram_bytes=MIB, walker_arguments=options,
            config=(HANDLERS if handlers else "") + config, seed=seed,
        )  # fmt: skip
        assert isinstance(site, DescribedSite)
        return site

    return start


def running(site: Site) -> None:
    site.qmp.execute("cont")
    site.wait_event("running")


def move(source: Site, target: Site) -> None:
    """Migrate, and return when the machine runs at the target."""
    source.qmp.execute("migrate", {"uri": target.address})
    wait_status(source, {"completed"})
    target.wait_event("running")


def of(seed: int) -> dict[str, Any]:
    """Return what a device of this seed holds, as the program shows it."""
    return shown(state(seed))


def fail(source: Site, target: Site) -> str:
    """Migrate, expect a refusal before any page was sent, and return the reason."""
    source.qmp.execute("migrate", {"uri": target.address})
    figures = wait_status(source, {"failed"})
    assert figures["x-migrated-outcome"] == "source-owns"
    assert run_state(source) == "running"
    return str(figures["error-desc"])


def handlers_hold(site: Site, directory: Path) -> dict[str, Any]:
    """Return what the handlers of a daemon wrote down."""
    content: dict[str, Any] = json.loads((directory / f"{site.daemon.pid}.json").read_text())
    return content


def test_described_devices_move_there_and_back(make: Callable[..., DescribedSite], tmp_path: Path) -> None:
    a = make("A", "chip/0", "chip/1", "bank", handlers="clock gauge/3", seed=1)
    b = make("B", "chip/0", "chip/1", "bank", handlers="clock gauge/3", seed=50)
    running(a)
    here, handlers = a.state(), handlers_hold(a, tmp_path)
    assert here == {"chip/0": of(1), "chip/1": of(2), "bank/0": of(3)}
    move(a, b)
    assert b.state() == here
    assert handlers_hold(b, tmp_path) == handlers
    move(b, a)
    assert a.state() == here


@pytest.mark.row(27)
def test_an_older_device_arrives_in_a_newer_one(make: Callable[..., DescribedSite]) -> None:
    a, b = make("A", "chip@1", seed=1), make("B", "chip@2", seed=50)
    running(a)
    move(a, b)
    assert b.state()["chip/0"] == {**of(1), "items": [], "items_len": 0}


@pytest.mark.row(28)
def test_all_that_does_not_fit_is_named_at_once(make: Callable[..., DescribedSite]) -> None:
    a = make("A", "chip/0", "chip/1", "bank", "disk@2", handlers="clock gauge", seed=1)
    b = make("B", "chip/1", "disk@1", "printer", handlers="clock rack", config=SHORT, seed=50)
    running(a)
    reason = fail(a, b)
    missing = [
        f"nothing here takes {name}" for name in ("gauge/0", "chip/0", "disk/0 in version 2 (here up to 1)", "bank/0")
    ]
    for text in [*missing, "nothing comes for rack/0", "nothing comes for printer/0"]:
        assert f"destination: {text} [section-" in reason
    assert run_state(b) == "inmigrate"
    assert a.qmp.execute("query-migrate").get("ram", {}).get("normal", 0) == 0


def test_what_the_source_lacks_is_named(make: Callable[..., DescribedSite]) -> None:
    a, b = make("A", "chip"), make("B", "chip", "disk", handlers="rack")
    running(a)
    assert "nothing comes for rack/0 [section-not-sent]; destination: nothing comes for disk/0" in fail(a, b)


def test_a_device_may_be_declared_late(make: Callable[..., DescribedSite]) -> None:
    a, b = make("A", "chip", seed=1), make("B", "chip", seed=50)
    running(a)
    b.stop_walker()
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: b.qmp.execute("query-migrate").get("status") == "active", "B waits for its workload")
    b.start_walker()
    wait_status(a, {"completed"})
    b.wait_event("running")
    assert b.state()["chip/0"] == of(1)


def test_unknown_sections_are_kept_and_sent_on(make: Callable[..., DescribedSite], tmp_path: Path) -> None:
    """A to B, which knows nothing of two of the devices, and on to C, which does."""
    a = make("A", "chip", "disk/7", handlers="clock", seed=1)
    b = make("B", "chip", config=SHORT, seed=50)
    c = make("C", "chip", "disk/7", handlers="clock", seed=90)
    b.qmp.execute("migrate-set-parameters", {"x-migrated-keep-unknown-sections": True})
    running(a)
    here, handlers = a.state(), handlers_hold(a, tmp_path)
    move(a, b)
    assert b.state() == {"chip/0": of(1)}
    assert "section_kept" in b.log_path.read_text()
    kept = {one["id"]: one for one in b.qmp.execute("query-migrate")["x-migrated-kept-sections"]}
    assert set(kept) == {"disk", "clock"}
    assert kept["disk"]["instance-id"] == 7
    assert kept["disk"]["size"] > 0
    move(b, c)
    assert c.state() == here
    assert handlers_hold(c, tmp_path) == handlers
    # What went on with the machine is not here any more when another one comes.
    move(c, b)
    move(b, a)
    assert a.state() == here


def test_a_captured_machine_is_what_its_description_says(make: Callable[..., DescribedSite], tmp_path: Path) -> None:
    """Five described devices, read by a dissector that knows nothing of them but the text behind the stream."""
    a = make("A", "chip/0", "chip/1+2", "bank@1", handlers="clock gauge/3+1", seed=1)
    running(a)
    path = tmp_path / "machine.state"
    a.qmp.execute("migrate", {"uri": f"file:{path}"})
    wait_status(a, {"completed"})
    found = dissect(path.read_bytes())
    names = [(section.idstr, section.instance) for section in found.devices()]
    assert names == [("chip", 1), ("gauge", 3), ("globalstate", 0), ("clock", 0), ("chip", 0), ("bank", 0)]
    chip = found.states["chip", 0]["state"]
    assert (chip["steps"], chip["armed"], chip["regs"], chip["chip/alarm"]["alarm"]) == (1, True, [1, 2, 3, 4], 77)
    assert chip["items"] == [{"kind": 0, "value": 1}, {"kind": 1, "value": 1}]
    assert "items" not in found.states["bank", 0]["state"]
    handlers = handlers_hold(a, tmp_path)
    assert found.states["clock", 0]["steps"] == handlers["clock/0"]["steps"]
    assert found.states["globalstate", 0]["runstate"].startswith(b"running\0")


# -- several workloads ---------------------------------------------------------------------------------------------


class Second:
    """A second workload of a site, with a block and devices of its own."""

    def __init__(self, site: Site, name: str, *options: str) -> None:
        command = [sys.executable, "-m", "tests.support.described", "--name", name, "--ram", str(MIB)]
        command += ["--attach", str(site.directory / "run" / "attach.sock"), *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.wait("ready")

    def wait(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said: dict[str, Any] = json.loads(line)
            if said["event"] == event:
                return said
        raise AssertionError(f"the second workload ended before {event!r}")

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.wait(what)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def second() -> Iterator[Callable[..., Second]]:
    started: list[Second] = []

    def start(*arguments: str) -> Second:
        started.append(Second(*arguments))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.end()


def test_several_workloads_each_with_a_block_and_devices(
    make: Callable[..., DescribedSite], second: Callable[..., Second]
) -> None:
    a, b = make("A", "chip/0", seed=1), make("B", "chip/0", seed=50)
    options = ("--block", "table", "--device", "chip/1", "--device", "bank+3")
    a2 = second(a, "second-A", *options, "--seed", "7")
    b2 = second(b, "second-B", *options, "--seed", "70")
    running(a)
    move(a, b)
    assert b.state() == {"chip/0": of(1)}
    assert b2.ask("state")["devices"] == a2.ask("state")["devices"] == {"chip/1": of(7), "bank/0": of(8)}
    assert b2.ask("memory")["seed"] == 7


# -- postcopy ------------------------------------------------------------------------------------------------------

#: 1 MiB takes a while: time to look at a postcopy that is under way.
SLOW_BPS = 256 << 10


@pytest.fixture
def pair(make: Callable[..., DescribedSite]) -> tuple[DescribedSite, DescribedSite]:
    """Two sites with devices and handlers, both with postcopy on; the machine runs at the first, and leaves slowly."""
    a = make("A", "chip", handlers="clock gauge", seed=1)
    b = make("B", "chip", handlers="clock gauge", seed=50)
    for site in (a, b):
        on = [{"capability": "postcopy-ram", "state": True}]
        site.qmp.execute("migrate-set-capabilities", {"capabilities": on})
    running(a)
    a.qmp.execute("migrate-set-parameters", {"max-postcopy-bandwidth": SLOW_BPS})
    return a, b


def leave(a: Site, uri: str) -> None:
    a.qmp.execute("migrate", {"uri": uri})
    a.qmp.execute("migrate-start-postcopy")


def record(site: Site) -> str:
    return str(site.qmp.execute("x-migrated-query-ownership")["record"])


def test_states_are_there_before_the_memory_and_outlive_the_connection(
    pair: tuple[DescribedSite, DescribedSite], tmp_path: Path
) -> None:
    a, b = pair
    here, handlers = a.state(), handlers_hold(a, tmp_path)
    with Proxy(("127.0.0.1", int(b.address.rpartition(":")[2]))) as link:
        leave(a, link.uri)
        wait_until(lambda: record(a) == "moved", "B runs it")
        b.wait_event("running")
        assert record(b) == "incomplete"
        assert (b.state(), handlers_hold(b, tmp_path)) == (here, handlers)
        link.cut()
        a.qmp.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        wait_status(a, {"completed"})
    assert record(b) == "owner"
    assert (b.state(), handlers_hold(b, tmp_path)) == (here, handlers)


def test_a_state_that_is_refused_in_the_package_leaves_the_source_as_it_was(
    pair: tuple[DescribedSite, DescribedSite], tmp_path: Path
) -> None:
    a, b = pair
    here, handlers = a.state(), handlers_hold(a, tmp_path)
    (tmp_path / f"{b.daemon.pid}.refuse").touch()
    leave(a, b.address)
    assert "post-load failed: clock: " in wait_status(a, {"failed"})["error-desc"]
    assert (run_state(a), run_state(b)) == ("running", "inmigrate")
    (tmp_path / f"{b.daemon.pid}.refuse").unlink()
    a.qmp.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
    leave(a, b.address)
    wait_status(a, {"completed"})
    b.wait_event("running")
    assert (b.state(), handlers_hold(b, tmp_path)) == (here, handlers)


def test_a_daemon_that_dies_takes_its_handlers_with_it_and_a_workload_keeps_its_devices(
    pair: tuple[DescribedSite, DescribedSite], tmp_path: Path
) -> None:
    a, b = pair
    here, handlers = a.state(), handlers_hold(a, tmp_path)
    leave(a, b.address)
    wait_until(lambda: record(a) == "moved", "B runs it")
    b.wait_event("running")
    b.restart_daemon()
    assert record(b) == "incomplete"
    assert handlers_hold(b, tmp_path) != handlers
    assert b.state() == here
