"""Whole-file locks between processes.

The rule of the file: the lock belongs to the open file description, so it ends with the last descriptor, however the
process ends. Source: flock(2).
"""

from __future__ import annotations

import fcntl

from migrated.errors import KernelError


def try_lock(fd: int) -> bool:
    """Lock the file of ``fd`` against everybody else; False if somebody holds it. Raises KernelError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise KernelError("flock", error.errno or 0) from error
    return True
