"""A QEMU's fault latency as its guest sees it: touch to go on, in ticks of the guest's own clock.

The rule of the file: the guest (touch_guest.S, 254 bytes) touches random pages one after the other as soon as it is
told to, which is when it runs at its destination, and tells its log over the serial port. Its clock is calibrated with
the timer of the same machine: under TCG both come from the host's clocks.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from tests.bench.boot_sector import write_boot_floppy
from tests.bench.host import MIB
from tests.bench.processes import DEADLINE_S, BenchError
from tests.support.compiler import compile_c

SOURCE = Path(__file__).with_name("touch_guest.S")
#: Below is the guest itself, and the firmware.
BEGIN = 16 * MIB
_PAGE = 4096
#: What the guest lets the timer count, and how often: something may come between, so the shortest is the truest.
_COUNT, _CALIBRATIONS = 0xFFFF, 4
_TIMER_HZ = 1193182
_BARE = ["-m32", "-nostdlib", "-static", "-Wl,-Ttext=0x7c00,-e0x7c00,--build-id=none,--oformat=binary"]


def write_touch_floppy(directory: Path, ram_bytes: int, touches: int) -> Path:
    """Return a floppy image that boots into a guest which touches the pages of that much memory."""
    counts = [f"-DTOUCHES={touches}", f"-DPAGES={(ram_bytes - BEGIN) // _PAGE}", f"-DBEGIN={BEGIN}"]
    code = compile_c(directory / "touch_guest", [SOURCE], [*_BARE, *counts])
    floppy = directory / "touch.img"
    write_boot_floppy(floppy, code.read_bytes())
    return floppy


class SerialPort:
    """The guest at the other end of a serial port."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE_S)
        self._socket.connect(str(path))

    def calibration(self) -> float:
        """Wait until the guest has looked at its clocks; return how many ticks a microsecond has."""
        return min(self._ticks(_CALIBRATIONS)) / (_COUNT * 1e6 / _TIMER_HZ)

    def touch(self, touches: int) -> list[int]:
        """Let the guest touch pages (as many as it was built for); return the ticks that each took."""
        self._socket.sendall(b"!")
        return self._ticks(touches)

    def close(self) -> None:
        self._socket.close()

    def _ticks(self, count: int) -> list[int]:
        found = b""
        while len(found) < 4 * count:
            if not (some := self._socket.recv(4 * count - len(found))):
                raise BenchError(f"the guest is gone after {len(found)} of {4 * count} bytes")
            found += some
        return list(struct.unpack(f"<{count}I", found))
