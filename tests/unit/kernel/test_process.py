"""Handles of other processes, on the real kernel."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from migrated.errors import KernelError
from migrated.kernel import memory, process

THREADS = """
import sys, threading
threads = [threading.Thread(target=threading.Event().wait, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
sys.stdout.write("x")
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as found:
        assert found.stdout is not None
        found.stdout.read(1)
        yield found
        found.kill()


def test_a_handle_of_a_peer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pidfd = process.peer_pidfd(ours, os.getpid())
        assert not process.has_exited(pidfd)
        assert not os.get_inheritable(pidfd)
        os.close(pidfd)


def test_a_process_is_stopped_when_each_of_its_threads_is(child: subprocess.Popen[bytes]) -> None:
    pidfd = process.open_pidfd(child.pid)
    assert len(os.listdir(f"/proc/{child.pid}/task")) == 4
    assert not process.all_tasks_stopped(child.pid)
    process.send_signal(pidfd, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    while not process.all_tasks_stopped(child.pid):
        pass
    assert not process.has_exited(pidfd)
    process.send_signal(pidfd, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.has_exited(pidfd)
    assert process.all_tasks_stopped(child.pid)
    child.wait()
    with pytest.raises(KernelError) as caught:
        process.send_signal(pidfd, signal.SIGCONT)
    assert caught.value.errno == errno.ESRCH
    os.close(pidfd)
    with pytest.raises(KernelError, match="pidfd_open: ESRCH"):
        process.open_pidfd(child.pid)
    assert process.all_tasks_stopped(child.pid)
    assert process.process_name(child.pid) == "?"


def test_the_name_of_a_process() -> None:
    with open("/proc/self/comm") as comm:
        assert process.process_name(os.getpid()) == comm.read().strip()


def test_whose_pagemap_it_is(child: subprocess.Popen[bytes]) -> None:
    own = os.open("/proc/self/pagemap", os.O_RDONLY)
    other = os.open(f"/proc/{child.pid}/pagemap", os.O_RDONLY)
    lie = os.open("/proc/self/maps", os.O_RDONLY)
    try:
        assert process.pagemap_owner(own) == os.getpid()
        assert process.pagemap_owner(other) == child.pid
        with pytest.raises(KernelError, match=r"not a pagemap but /proc/.*/maps"):
            process.pagemap_owner(lie)
    finally:
        for fd in (own, other, lie):
            os.close(fd)


def test_a_file_that_is_called_pagemap_elsewhere_is_nobodys(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("proc") / "pagemap"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    assert process.pagemap_owner(fd) is None
    os.close(fd)


def test_the_map_of_a_range() -> None:
    size = 4 * memory.PAGE_SIZE
    fd = memory.create_memfd("maps", size)
    mapping = memory.Mapping(fd, size)
    (entry,) = process.read_maps(os.getpid(), mapping.address, mapping.address + size)
    device, inode = memory.memfd_identity(fd)
    assert (entry.start, entry.end, entry.offset) == (mapping.address, mapping.address + size, 0)
    assert (entry.device, entry.inode) == ((os.major(device), os.minor(device)), inode)
    assert entry.permissions == "rw-s"
    mapping.close()
    os.close(fd)
    assert process.read_maps(os.getpid(), 0, 4096) == []


def test_the_map_of_a_process_that_is_gone(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    with pytest.raises(KernelError) as caught:
        process.read_maps(child.pid, 0, 4096)
    assert caught.value.errno == errno.ESRCH


FOREIGN = """
import os, sys
from migrated.errors import KernelError
from migrated.kernel import process
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    process.read_maps(int(sys.argv[1]), 0, 4096)
except KernelError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming an ordinary user needs root")
def test_the_map_of_somebody_elses_process(child: subprocess.Popen[bytes]) -> None:
    done = subprocess.run([sys.executable, "-c", FOREIGN, str(child.pid)], capture_output=True, text=True, check=True)
    assert "EACCES" in done.stdout or "EPERM" in done.stdout
