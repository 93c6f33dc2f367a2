"""Keys of hosts for tests: one CA, made once per directory, and whoever it vouches for.

The rule of the file: made by the code of `migratectl pki`; only dates and names are bad on purpose.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from migrated.cli.authority import Validity, create_authority, issue
from migrated.transport.credentials import load_credentials
from migrated.transport.trust import Trust

LOCAL = ("127.0.0.1", "localhost")


class Keys:
    """A CA in a directory, and the hosts that it has issued certificates for."""

    def __init__(self, directory: Path, name: str = "test CA") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.authority = create_authority(directory / "ca", name)

    def host(
        self, name: str, *names: str, begins_in_days: float = -1.0, days: float = 30.0, replace: bool = False
    ) -> Path:
        """Return the directory of a host's keys; it is also called by what this host is called, and ``names``."""
        directory = self.directory / name
        validity = Validity(datetime.now(UTC) + timedelta(days=begins_in_days), days)
        issue(self.authority, directory, name, names or LOCAL, replace=replace, validity=validity)
        return directory

    def trust(self, name: str) -> Trust:
        """Return what a host with good keys, made now, trusts."""
        return Trust(load_credentials(self.host(name)))


def tls(directory: Path, more: str = "") -> str:
    """Return the configuration of a daemon with these keys."""
    return f'[tls]\nmode = "required"\ndirectory = "{directory}"\n{more}\n'
