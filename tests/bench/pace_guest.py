"""A QEMU's guest that writes at a given rate, as a floppy image: what `tests.bench.workload --pace` does.

The rule of the file: it adds one to the first byte of the next pages of its working set each millisecond, and counts
the milliseconds that it has served where `tests.bench.downtime` looks.
"""

from __future__ import annotations

from pathlib import Path

from tests.bench.boot_sector import write_boot_floppy
from tests.bench.host import MIB
from tests.support.compiler import compile_c

SOURCE = Path(__file__).with_name("pace_guest.S")
#: Below is the guest itself, and the firmware.
BEGIN = 16 * MIB
_BARE = ["-m32", "-nostdlib", "-static", "-Wl,-Ttext=0x7c00,-e0x7c00,--build-id=none,--oformat=binary"]


def write_pace_floppy(directory: Path, working_set_bytes: int, pages_per_ms: int) -> Path:
    """Return a floppy image that boots into a guest which writes to so many pages of so much memory."""
    end = BEGIN + working_set_bytes
    numbers = [f"-DPAGES={pages_per_ms}", f"-DBEGIN={BEGIN}", f"-DEND={end}"]
    code = compile_c(directory / "pace_guest", [SOURCE], [*_BARE, *numbers])
    floppy = directory / "pace.img"
    write_boot_floppy(floppy, code.read_bytes())
    return floppy
