"""The keys of the configuration: found, watched, and read anew on SIGHUP.

The rule of the file: what is in use stays in use until something better is complete; whatever is wrong is said at
once. Migrations that are under way are not touched.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from migrated.daemon.config import DEFER, Config, load_config
from migrated.errors import CommandError, ConfigError, MigratedError
from migrated.transport.address import parse_address
from migrated.transport.certificate import expiry_warning, format_time
from migrated.transport.credentials import CA_CERT, load_credentials
from migrated.transport.trust import Trust

#: Where keys are looked for if systemd hands none over and the configuration names no place.
DIRECTORY = "/etc/migrated/pki"
#: How often the end of certificates is thought of.
LOOK_EVERY_S = 86_400.0


def build_trust(config: Config, environment: Mapping[str, str] = os.environ) -> Trust:
    """Return what the configuration says about peers. Raises TlsError, or ConfigError where keys are required."""
    tls, peers = config.tls, config.peers
    if tls.mode == "off":
        return Trust(cleartext=True)
    places = [tls.directory] if tls.directory else [environment.get("CREDENTIALS_DIRECTORY", ""), DIRECTORY]
    found = [Path(place) for place in places if place and (Path(place) / CA_CERT).exists()]
    if not found and (tls.mode == "required" or tls.directory or peers.may_send or peers.may_receive):
        where = " or ".join(place for place in places if place)
        raise ConfigError("[tls]", "", f"there is no {CA_CERT} in {where}. Next: migratectl pki init, on one host")
    credentials = load_credentials(found[0]) if found else None
    return Trust(credentials, tuple(peers.may_send), tuple(peers.may_receive))


def check_trust(config: Config) -> None:
    """Raise MigratedError unless this host can start as the configuration says."""
    trust, migration = build_trust(config), config.migration
    if migration.incoming is None or migration.incoming == DEFER:
        return
    try:
        trust.require_listener(parse_address(migration.incoming), migration.allow)
    except CommandError as error:
        raise ConfigError("[migration] incoming", "", str(error)) from error


class TrustKeeper:
    """The present trust, and its watch."""

    def __init__(self, config: Config, path: Path, log: FilteringBoundLogger) -> None:
        self._path = path
        self._log = log
        self._announced: dict[str, int | None] = {}
        self.trust = build_trust(config)
        self._say("tls_ready" if self.trust.credentials else "tls_off")

    def current(self) -> Trust:
        """Return what holds for a connection that is made now."""
        return self.trust

    def reload(self) -> None:
        """Read configuration and keys again; keep what there is if anything is wrong with them."""
        try:
            trust = build_trust(load_config(self._path))
        except (MigratedError, OSError) as error:
            self._log.error("reload_failed", error=str(error), keeps="the keys and peers from before")
            return
        self.trust = trust
        self._announced.clear()
        self._say("reloaded")

    def _say(self, event: str) -> None:
        credentials = self.trust.credentials
        if credentials is None:
            self._log.info(event, cleartext="everywhere" if self.trust.cleartext else "on this host only")
            return
        shown = {name: str(certificate) for name, certificate in credentials.certificates.items()}
        self._log.info(event, directory=str(credentials.directory), certificates=shown)
        self.look(datetime.now(UTC))

    def look(self, now: datetime) -> None:
        """Say once per threshold what ends soon."""
        if self.trust.credentials is None:
            return
        for name, certificate in self.trust.credentials.certificates.items():
            days = expiry_warning(certificate.not_after, now)
            if days is None or self._announced.get(name) == days:
                continue
            self._announced[name] = days
            log = self._log.error if days == 0 else self._log.warning
            log(
                "certificate_expired" if days == 0 else "certificate_expires",
                file=name,
                certificate=str(certificate),
                not_after=format_time(certificate.not_after),
                within_days=days,
                next_step="migratectl pki issue, then systemctl reload",
            )

    async def watch(self) -> None:
        """Look once a day, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look(datetime.now(UTC))
