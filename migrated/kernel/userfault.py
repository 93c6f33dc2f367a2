"""userfaultfd: the handshake, registration and write protection of a process's memory, also from another process.

The rule of the file: every number is proven where it stands. All calls are single ioctls that release the GIL. No
numpy here: the client library imports this module.

Which features, and why two descriptors per process: WP_ASYNC (the kernel resolves write-protect faults by itself, which
is the dirty log) is fixed at the handshake; live snapshots need the synchronous kind, so a workload hands over one of
each. EVENT_* features are never asked for: they would block the workload's fork or madvise while no daemon reads.

Source: userfaultfd(2), ioctl_userfaultfd(2), linux/userfaultfd.h (6.18).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct

from migrated.errors import KernelError


def _iowr(kind: int, number: int, size: int) -> int:
    return (3 << 30) | (size << 16) | (kind << 8) | number


def _ior(kind: int, number: int, size: int) -> int:
    return (2 << 30) | (size << 16) | (kind << 8) | number


_API = struct.Struct("=QQQ")  # api, features, ioctls
_REGISTER = struct.Struct("=QQQQ")  # start, len, mode, ioctls
_RANGE = struct.Struct("=QQ")  # start, len

UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04
UFFDIO_CONTINUE = 0xC020AA07
UFFDIO_POISON = 0xC020AA08
USERFAULTFD_IOC_NEW = 0x0000AA00

assert UFFDIO_API == _iowr(UFFD_API, 0x3F, _API.size)
assert UFFDIO_REGISTER == _iowr(UFFD_API, 0x00, _REGISTER.size)
assert UFFDIO_UNREGISTER == _ior(UFFD_API, 0x01, _RANGE.size)
assert UFFDIO_WAKE == _ior(UFFD_API, 0x02, _RANGE.size)
assert UFFDIO_COPY == _iowr(UFFD_API, 0x03, struct.calcsize("=QQQQq"))
assert UFFDIO_ZEROPAGE == _iowr(UFFD_API, 0x04, struct.calcsize("=QQQq"))
assert UFFDIO_CONTINUE == _iowr(UFFD_API, 0x07, struct.calcsize("=QQQq"))
assert UFFDIO_POISON == _iowr(UFFD_API, 0x08, struct.calcsize("=QQQq"))
assert USERFAULTFD_IOC_NEW == (UFFD_API << 8) | 0x00

MODE_MISSING = 1 << 0
MODE_WP = 1 << 1
MODE_MINOR = 1 << 2

FEATURE_MISSING_SHMEM = 1 << 5
FEATURE_THREAD_ID = 1 << 8
FEATURE_MINOR_SHMEM = 1 << 10
FEATURE_EXACT_ADDRESS = 1 << 11
FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_POISON = 1 << 14
FEATURE_WP_ASYNC = 1 << 15

#: Live snapshots: write-protect faults are delivered and wait for an answer.
FEATURES_SYNC = (
    FEATURE_MISSING_SHMEM | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_THREAD_ID | FEATURE_POISON
)
#: Dirty log and postcopy: write-protect faults resolve themselves, missing pages are delivered.
FEATURES_TRACKING = FEATURES_SYNC | FEATURE_WP_ASYNC

UFFD_USER_MODE_ONLY = 1
# The generic syscall table has another number than x86-64's own.
_SYSCALL_NUMBERS = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_ANON_INODE = "anon_inode:[userfaultfd]"

_libc = ctypes.CDLL(None, use_errno=True)


def open_userfaultfd(features: int) -> int:
    """Return a userfaultfd of this process after the handshake for ``features``.

    Tries, in this order: the plain system call (root, CAP_SYS_PTRACE or vm.unprivileged_userfaultfd), the device
    /dev/userfaultfd (file permissions decide), and faults from user mode only: write tracking works with it, also for
    writes by system calls; missing-page faults of system calls fail with EFAULT. Raises KernelError.
    """
    fd = _open_descriptor()
    try:
        _ioctl("UFFDIO_API", fd, UFFDIO_API, _API.pack(UFFD_API, features, 0))
    except KernelError:
        os.close(fd)
        raise
    return fd


def _open_descriptor() -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return _syscall(flags)
    except KernelError as error:
        if error.errno != errno.EPERM:
            raise
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return _syscall(flags | UFFD_USER_MODE_ONLY)
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags)
    except OSError as error:
        raise KernelError("USERFAULTFD_IOC_NEW", error.errno or 0) from error
    finally:
        os.close(device)


def _syscall(flags: int) -> int:
    fd = int(_libc.syscall(_syscall_number(platform.machine()), flags))
    if fd < 0:
        raise KernelError("userfaultfd", ctypes.get_errno())
    return fd


def _syscall_number(architecture: str) -> int:
    try:
        return _SYSCALL_NUMBERS[architecture]
    except KeyError:
        hint = f"number of the call is not known for {architecture}"
        raise KernelError("userfaultfd", errno.ENOSYS, hint) from None


def is_userfaultfd(fd: int) -> bool:
    """Say whether a descriptor from somebody else is a userfaultfd."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == _ANON_INODE
    except OSError:
        return False


def negotiated_features(fd: int) -> int | None:
    """Return the features a userfaultfd was opened with, as the kernel shows them; None where it does not."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
            for line in info:
                if line.startswith("API:"):  # API:\t<api>:<features>:<all features>, in hex
                    return int(line.split("\t", 1)[1].split(":")[1], 16)
    except (OSError, ValueError, IndexError):
        return None
    return None


def register(fd: int, address: int, length: int, mode: int) -> None:
    """Register a range for ``mode`` (MODE_*). Registering it again through the same descriptor replaces the mode.

    KernelError EBUSY: the range is registered through another userfaultfd. ENOMEM: the process is gone.
    """
    _ioctl("UFFDIO_REGISTER", fd, UFFDIO_REGISTER, _REGISTER.pack(address, length, mode, 0))


def unregister(fd: int, address: int, length: int) -> None:
    """End a registration; its write protection ends with it."""
    _ioctl("UFFDIO_UNREGISTER", fd, UFFDIO_UNREGISTER, _RANGE.pack(address, length))


def wake(fd: int, address: int, length: int) -> None:
    """Let every thread that waits for a page of the range look again."""
    _ioctl("UFFDIO_WAKE", fd, UFFDIO_WAKE, _RANGE.pack(address, length))


def _ioctl(name: str, fd: int, number: int, argument: bytes) -> bytearray:
    # A bytearray of at most 1024 bytes: fcntl.ioctl releases the GIL and copies the answer back.
    buffer = bytearray(argument)
    while True:
        try:
            fcntl.ioctl(fd, number, buffer)
        except OSError as error:
            # EAGAIN: the process's memory map is changing right now (fork, mremap); the kernel asks to try again.
            if error.errno == errno.EAGAIN:
                continue
            raise KernelError(name, error.errno or 0) from error
        return buffer
