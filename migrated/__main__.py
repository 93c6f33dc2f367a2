"""``python -m migrated``: the same as the program ``migrated``."""

from __future__ import annotations

import sys

from migrated.daemon.app import main

if __name__ == "__main__":
    sys.exit(main())
