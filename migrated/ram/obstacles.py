"""What stands against postcopy at a destination: this host's settings, and workloads that cannot wait for a page.

The rule of the file: nothing is changed here; what is said is an error with its id.
"""

from __future__ import annotations

import errno

from migrated.errors import KernelError, WorkloadError
from migrated.kernel import userfault_place
from migrated.kernel.memory import SHMEM_HUGE_UNASKED, shmem_huge_pages
from migrated.savevm.ports import TrackedMapping


def huge_pages_unasked() -> KernelError | None:
    """Return what stands against memory that has pages missing: transparent huge pages."""
    if (pages := shmem_huge_pages()) not in SHMEM_HUGE_UNASKED:
        return None
    return KernelError(
        "postcopy", errno.EINVAL,
        f"transparent huge pages would fill memory that has not arrived: shmem_enabled is '{pages}', expected"
        " 'never' or 'advise' in /sys/kernel/mm/transparent_hugepage",
        error_id="huge-pages",
    )  # fmt: skip


def can_wait(mapping: TrackedMapping) -> bool:
    """Say whether touches of missing pages can wait for them."""
    return mapping.userfault >= 0 and userfault_place.can_serve_missing(mapping.userfault)


def cannot_wait(mapping: TrackedMapping) -> WorkloadError:
    """Return the error of a mapping that cannot."""
    return WorkloadError(
        mapping.workload,
        "it cannot wait for pages (it has no userfaultfd that could tell): postcopy needs one for each"
        " process. Next: migrate with postcopy-ram off, or run it with the right to use userfaultfd",
        error_id="userfaultfd-missing",
    )
