"""Two daemons cannot keep one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from migrated.daemon.lock import LOCK_NAME, StateLock
from migrated.errors import MigratedError

_HOLDER = """
import sys
from migrated.daemon.lock import StateLock
with StateLock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_one_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with StateLock(tmp_path), pytest.raises(MigratedError) as refused, StateLock(tmp_path):
        pass
    assert str(refused.value) == f"{tmp_path}: another migrated (pid {os.getpid()}) keeps this machine already"
    with StateLock(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text() == f"{os.getpid()}\n"


def test_the_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(MigratedError, match=rf"pid {holder.pid}\) keeps this machine already"):
            StateLock(tmp_path).__enter__()
        holder.kill()
        holder.wait()
        with StateLock(tmp_path):
            pass


def test_rubbish_in_the_file_locks_nothing_and_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("\x1b[31mhello")
    lock = StateLock(tmp_path)
    with lock:
        (tmp_path / LOCK_NAME).write_text("\x1b[31mhello")
        with pytest.raises(MigratedError, match="another migrated keeps this machine already"):
            StateLock(tmp_path).__enter__()
    lock.__exit__(None, None, None)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MigratedError, match=r"absent/lock: cannot be opened: No such file or directory"):
        StateLock(tmp_path / "absent").__enter__()


def test_nothing_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with StateLock(tmp_path), pytest.raises(MigratedError):
        StateLock(tmp_path).__enter__()
    assert len(os.listdir("/proc/self/fd")) == before
