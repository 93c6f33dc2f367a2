"""What a workload claims about its memory, held against what the kernel says.

The rule of the file: a claim is checked before it is used, and a lie is refused with what was expected and found. A
wrong address would mean a dirty log that watches other memory: lost pages. What this process may not look at (another
user's /proc) is proven through the workload's own descriptors instead; what cannot be proven either way is only
accepted where nothing rests on it.
"""

from __future__ import annotations

import errno
import os

from migrated.errors import KernelError
from migrated.kernel import pagemap as pagemap_scan
from migrated.kernel import process, userfault
from migrated.kernel.memory import PAGE_SIZE, memfd_identity
from migrated.wire.attach import MAX_ADDRESS

_TRACKING_NEEDS = userfault.FEATURE_WP_ASYNC | userfault.FEATURE_WP_UNPOPULATED | userfault.FEATURE_WP_HUGETLBFS_SHMEM


class ClaimRefused(Exception):
    """A workload's claim is wrong. ``again``: not its fault, the same may be accepted later."""

    def __init__(self, what: str, *, expected: str = "", found: str = "", again: bool = False) -> None:
        parts = [what, expected and f"expected {expected}", found and f"found {found}"]
        super().__init__(", ".join(part for part in parts if part))
        self.again = again


def check_descriptors(pid: int, pagemap: int, tracking: int, sync: int) -> None:
    """Refuse descriptors of a `hello` that are not what their names say. -1 = not given."""
    if tracking >= 0 and pagemap < 0:
        raise ClaimRefused("a tracking userfaultfd is of no use without a pagemap")
    if pagemap >= 0:
        _check_pagemap(pid, pagemap)
    for name, fd in (("tracking", tracking), ("sync", sync)):
        if fd >= 0 and not userfault.is_userfaultfd(fd):
            raise ClaimRefused(f"descriptor '{name}'", expected="a userfaultfd", found="something else")
    features = userfault.negotiated_features(tracking) if tracking >= 0 else None
    if features is not None and features & _TRACKING_NEEDS != _TRACKING_NEEDS:
        raise ClaimRefused(
            "descriptor 'tracking'", expected=f"features {_TRACKING_NEEDS:#x} at least", found=f"{features:#x}"
        )
    features = userfault.negotiated_features(sync) if sync >= 0 else None
    if features is not None and features & userfault.FEATURE_WP_ASYNC:
        raise ClaimRefused("descriptor 'sync'", expected="a userfaultfd without WP_ASYNC", found=f"{features:#x}")


def _check_pagemap(pid: int, pagemap: int) -> None:
    try:
        owner = process.pagemap_owner(pagemap)
    except KernelError as error:
        raise ClaimRefused("descriptor 'pagemap'", expected="/proc/self/pagemap", found=str(error)) from error
    if owner not in (None, pid):
        raise ClaimRefused("descriptor 'pagemap'", expected=f"that of process {pid}", found=f"that of process {owner}")


def check_range(address: int, size: int, page_size: int = PAGE_SIZE) -> None:
    """Refuse a range that cannot be a mapping of whole pages."""
    if address % page_size or size % page_size or size == 0:
        raise ClaimRefused(
            "the mapping is not made of whole pages",
            expected=f"address and size in multiples of {page_size}",
            found=f"{size} bytes at {address:#x}",
        )
    if address == 0 or address + size > MAX_ADDRESS:
        raise ClaimRefused("the mapping is outside any address space", found=f"{size} bytes at {address:#x}")


def check_mapping(pid: int, memfd: int, address: int, size: int, *, pagemap: int, tracking: int) -> None:
    """Refuse unless [address, address + size) of the process really maps all of ``memfd``, shared. Blocking."""
    check_range(address, size)
    _check_maps(pid, memfd, address, size)
    if tracking >= 0:
        _check_trackable(address, size, pagemap=pagemap, tracking=tracking)


def _check_maps(pid: int, memfd: int, address: int, size: int) -> None:
    try:
        entries = process.read_maps(pid, address, address + size)
    except KernelError as error:
        # ESRCH: a /proc that hides other users' processes (ProtectProc=invisible). One that is really gone has let go
        # of its connection, and its descriptors say so, too.
        if error.errno in (errno.EACCES, errno.EPERM, errno.ESRCH):
            return
        raise ClaimRefused(f"the memory map of process {pid} cannot be read", found=str(error)) from error
    device, inode = memfd_identity(memfd)
    position = address
    for entry in entries:
        if entry.start > position:
            break
        found = (entry.device, entry.inode, entry.offset + position - entry.start, entry.permissions[-1:])
        if found != ((os.major(device), os.minor(device)), inode, position - address, "s"):
            raise ClaimRefused(
                "the claimed mapping is another one",
                expected=f"a shared mapping of the memfd from its byte {position - address} on at {position:#x}",
                found=f"inode {entry.inode} from byte {found[2]} on, {entry.permissions}",
            )
        position = entry.end
    if position < address + size:
        raise ClaimRefused(
            "the claimed mapping is not mapped",
            expected=f"memory up to {address + size:#x}",
            found=f"none at {position:#x}",
        )


def _check_trackable(address: int, size: int, *, pagemap: int, tracking: int) -> None:
    # Registration through the userfaultfd, then a look through the pagemap: succeeds only if both belong to the same
    # process and the whole range can be tracked. It also clears what a daemon that died may have left registered.
    try:
        userfault.register(tracking, address, size, userfault.MODE_WP)
        try:
            pagemap_scan.check_tracked(pagemap, address, size)
        finally:
            userfault.unregister(tracking, address, size)
    except KernelError as error:
        reasons = {
            errno.EBUSY: "it is registered through another userfaultfd",
            errno.EPERM: "userfaultfd and pagemap are not of the process that maps it, or not all of it is mapped",
            errno.EINVAL: "not all of it is mapped memory",
            errno.ENOMEM: "its process is gone",
            errno.ESRCH: "its process is gone",
        }
        why = reasons.get(error.errno, "the kernel refuses")
        raise ClaimRefused(f"writes to the mapping cannot be tracked: {why}", found=str(error)) from error
