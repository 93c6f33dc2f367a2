"""The QEMU that tests steer leaves nothing behind, also when it fails half-way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.conftest import SIZE
from tests.support.qemu import PROGRAM, Qemu


class Reluctant(Qemu):
    """One that answers, and then does not take its first command."""

    def capability(self, name: str, *, state: bool = True) -> None:
        raise RuntimeError(name)


@pytest.mark.skipif(PROGRAM is None, reason="qemu-system-x86_64 is not installed")
def test_a_start_that_fails_half_way_is_undone(tmp_path: Path) -> None:
    qemu = Reluctant("reluctant", tmp_path, size=SIZE)
    with pytest.raises(RuntimeError, match="events"), qemu:
        raise AssertionError("it started")
    assert qemu.process.poll() is not None
    assert qemu.qmp._socket.fileno() == -1
