"""The library a workload imports: ``from migrated.client import attach``.

The one package __init__ that is not empty, because this line is what every user writes.
"""

from migrated.client.errors import AttachError, AttachRefused, MachineMoved
from migrated.client.machine import Machine, attach

__all__ = ["AttachError", "AttachRefused", "Machine", "MachineMoved", "attach"]
