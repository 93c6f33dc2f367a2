"""Runs a program in a world without userfaultfd, as some containers are: ``without_userfaultfd.py PROGRAM [WORD ...]``.

The rule of the file: standard library only, and it is run as a file: it serves interpreters that know nothing of us.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SYS_USERFAULTFD, SYS_IOCTL = 323, 16  # x86-64
USERFAULTFD_IOC_NEW = 0xAA00
# Classic BPF: load the number of the call; userfaultfd -> EPERM, its ioctl on the device (load the second argument)
# as well, all others -> allowed.
FILTER = (
    (0x20, 0, 0, 0),
    (0x15, 3, 0, SYS_USERFAULTFD),
    (0x15, 0, 3, SYS_IOCTL),
    (0x20, 0, 0, 24),
    (0x15, 0, 1, USERFAULTFD_IOC_NEW),
    (0x06, 0, 0, 0x0005_0001),
    (0x06, 0, 0, 0x7FFF_0000),
)


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def main() -> None:
    """Install the filter, become the program."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in FILTER))
    program = Program(len(FILTER), ctypes.addressof(code))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        sys.exit(f"no seccomp: {os.strerror(ctypes.get_errno())}")
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
