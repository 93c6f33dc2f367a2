"""The yardstick "QEMU": two real QEMU processes on loopback, driven over QMP.

The rule of the file: the same bytes, cold destination memory, bandwidth unlimited unless a case limits it, return path
on at both ends, so that ``total-time`` means the same as ours: from ``migrate`` to the destination's word.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from migrated.control.client import QmpClient
from migrated.errors import ChannelClosed
from tests.bench.host import GIB, MIB
from tests.bench.processes import DEADLINE_S, BenchError, running, tail

BINARY = "qemu-system-x86_64"
UNLIMITED_BPS = 100 * GIB
#: Connecting and following; total-time is what the source says, so a rare look costs no accuracy.
POLL_S = 0.05
#: The names of two `guests`.
SOURCE, TARGET = "qemu-source", "qemu-target"
#: The smallest machine there is: no processor, no devices, one RAM block.
EMPTY = ("-M", "none,memory-backend=mem0")


def version() -> str | None:
    """Return the version line of the installed QEMU; None without one."""
    if shutil.which(BINARY) is None:
        return None
    return subprocess.run([BINARY, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def backend_file(path: Path, size_bytes: int) -> list[str]:
    """Return a RAM block that is a prefilled file in memory."""
    return ["-object", f"memory-backend-file,id=mem0,size={size_bytes},mem-path={path},share=on"]


def backend_cold(size_bytes: int) -> list[str]:
    """Return a RAM block of fresh shared memory that nobody has touched."""
    return ["-object", f"memory-backend-memfd,id=mem0,size={size_bytes},share=on"]


def backend_populated(size_bytes: int) -> list[str]:
    """Return a RAM block of shared memory whose pages are all there, as zeros."""
    return ["-object", f"memory-backend-memfd,id=mem0,size={size_bytes},share=on,prealloc=on"]


def pid(directory: Path, name: str) -> int:
    """Return the process id of a QEMU that runs."""
    return int(_pidfile(directory, name).read_text())


def _pidfile(directory: Path, name: str) -> Path:
    return directory / f"{name}.pid"


@contextmanager
def qemu(directory: Path, name: str, arguments: Sequence[str], launcher: Sequence[str] = ()) -> Iterator[QmpClient]:
    """Run one QEMU with a QMP connection inside the block; ``launcher`` starts it in another place."""
    socket, log = directory / f"{name}.sock", directory / f"{name}.log"
    socket.unlink(missing_ok=True)
    command = [*launcher, BINARY, "-accel", "tcg", "-nodefaults", "-display", "none"]
    command += ["-pidfile", str(_pidfile(directory, name))]
    command += ["-qmp", f"unix:{socket},server=on,wait=off", *arguments]
    with running(command, log=log) as process, ExitStack() as stack:
        yield stack.enter_context(_connect(process, socket, log))


@contextmanager
def guests(
    directory: Path, content: Path, size_bytes: int, floppy: Path, *, serial: bool = False
) -> Iterator[tuple[QmpClient, QmpClient]]:
    """Run a guest that boots from a floppy, its memory a fresh copy of ``content``, and a QEMU that waits for it.

    With ``serial`` each has a socket at its first serial port, `serial_socket`, and the guest does not run yet.
    """
    common = ["-M", "pc,memory-backend=mem0", "-m", str(size_bytes // MIB)]
    common += ["-drive", f"if=floppy,file={floppy},format=raw,readonly=on", "-boot", "a"]

    def arguments(name: str) -> list[str]:
        chardev = f"socket,id=serial,path={serial_socket(directory, name)},server=on,wait=off"
        return [*common, "-chardev", chardev, "-serial", "chardev:serial"] if serial else common

    guest = content.with_name("guest")
    cold = [*backend_cold(size_bytes), "-incoming", "defer"]
    try:
        # The guest writes to its memory, so it gets a copy.
        shutil.copyfile(content, guest)
        warm = [*backend_file(guest, size_bytes), *(["-S"] if serial else [])]
        with (
            qemu(directory, SOURCE, [*arguments(SOURCE), *warm]) as source,
            qemu(directory, TARGET, [*arguments(TARGET), *cold]) as target,
        ):
            yield source, target
    finally:
        guest.unlink(missing_ok=True)


def serial_socket(directory: Path, name: str) -> Path:
    """Say where the serial port of one of the `guests` is."""
    return directory / f"{name}.serial"


def _connect(process: subprocess.Popen[str], socket: Path, log: Path) -> QmpClient:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return QmpClient(str(socket), deadline_s=DEADLINE_S)
        except ChannelClosed:
            time.sleep(POLL_S)
    raise BenchError(f"{process.args!r} does not answer\n{tail(log)}")


def migrate(source: QmpClient, target: QmpClient, parameters: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Migrate and return the source's last query-migrate."""
    start(source, target, parameters)
    return follow(source)


def start(
    source: QmpClient, target: QmpClient, parameters: Mapping[str, object] | None = None, host: str = "127.0.0.1"
) -> None:
    """Begin to migrate."""
    source.execute("migrate", {"uri": prepare(source, target, parameters, host)})


def prepare(
    source: QmpClient, target: QmpClient, parameters: Mapping[str, object] | None = None, host: str = "127.0.0.1"
) -> str:
    """Do everything up to `migrate`; return its URI."""
    for side in (source, target):
        capability = {"capability": "return-path", "state": True}
        side.execute("migrate-set-capabilities", {"capabilities": [capability]})
    source.execute("migrate-set-parameters", {"max-bandwidth": UNLIMITED_BPS, **(parameters or {})})
    return _listen(target, host)


def use_multifd(sides: Sequence[QmpClient], channels: int, **parameters: object) -> None:
    """Have both ends use so many channels."""
    for side in sides:
        on = [{"capability": "multifd", "state": True}]
        side.execute("migrate-set-capabilities", {"capabilities": on})
        side.execute("migrate-set-parameters", {"multifd-channels": channels, **parameters})


def _listen(target: QmpClient, host: str = "127.0.0.1") -> str:
    target.execute("migrate-incoming", {"uri": f"tcp:{host}:0"})
    address = target.execute("query-migrate")["socket-address"][0]
    return f"tcp:{host}:{address['port']}"


def start_postcopy(
    source: QmpClient, target: QmpClient, capabilities: Sequence[Mapping[str, object]], passes: int = 0
) -> None:
    """Migrate by postcopy, at once or after that many passes over memory."""
    for side in (source, target):
        side.execute("migrate-set-capabilities", {"capabilities": capabilities})
    source.execute("migrate-set-parameters", {"max-bandwidth": UNLIMITED_BPS})
    source.execute("migrate", {"uri": _listen(target)})
    switch_after(source, passes)


def switch_after(source: QmpClient, passes: int) -> None:
    """Switch to postcopy, at once or when that many passes are over (and the next has just begun)."""
    while passes and wait_event(source, "MIGRATION_PASS")["data"]["pass"] <= passes:
        pass
    source.execute("migrate-start-postcopy")


def wait_event(side: QmpClient, name: str) -> dict[str, Any]:
    """Return the next event of that name; those before it are forgotten."""
    while (event := side.next_event(DEADLINE_S)) is not None:
        if event["event"] == name:
            return event
    raise BenchError(f"no event {name}")


def follow(source: QmpClient, poll_s: float = POLL_S) -> dict[str, Any]:
    """Wait for the end of a migration; raise unless it completed."""
    while True:
        figures: dict[str, Any] = source.execute("query-migrate")
        # A 7.2 may say completed a moment before its times are settled.
        if figures["status"] == "completed" and figures.get("total-time"):
            return figures
        if figures["status"] in ("failed", "cancelled"):
            raise BenchError(f"migration {figures['status']}: {figures.get('error-desc', '')}")
        time.sleep(poll_s)
