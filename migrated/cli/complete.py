"""What a shell offers where the command line wants a name: machines of this host, capabilities, parameters.

The rule of the file: nobody is asked. A person waits for the answer with a finger on the tab key, so that it comes from
two directories and from tables that are imported when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

CONFIGURATIONS = Path("/etc/migrated")
SOCKETS = Path("/run/migrated")


def machine_names(configurations: Path = CONFIGURATIONS, sockets: Path = SOCKETS) -> list[str]:
    """Return the machines that are configured or have a daemon, sorted."""
    configured = {path.stem for path in configurations.glob("*.toml")}
    return sorted(configured | {path.parent.name for path in sockets.glob("*/qmp.sock")})


def complete_machine(incomplete: str) -> list[str]:
    """Offer names of machines."""
    return _beginning(incomplete, machine_names())


def complete_capability(incomplete: str) -> list[str]:
    """Offer both values of each capability that does something."""
    from migrated.model.parameters import CAPABILITIES

    names = [row.name for row in CAPABILITIES.values() if row.implemented]
    return _beginning(incomplete, [f"{name}={value}" for name in names for value in ("on", "off")])


def complete_parameter(incomplete: str) -> list[str]:
    """Offer the parameters that do something; a value has to follow."""
    from migrated.model.parameters import PARAMETERS

    return _beginning(incomplete, [f"{row.name}=" for row in PARAMETERS.values() if row.implemented])


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
