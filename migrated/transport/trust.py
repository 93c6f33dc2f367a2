"""Whom this daemon talks to, and how.

The rule of the file: one value, replaced as a whole on reload; a connection is judged by the value of the moment it was
made in.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from migrated.errors import CommandError, TlsError
from migrated.transport.address import Address, TcpAddress
from migrated.transport.certificate import Certificate, name_is_listed
from migrated.transport.credentials import Credentials
from migrated.transport.tls_problem import TlsProblem


@dataclass(frozen=True, slots=True)
class Trust:
    """``may_send`` and ``may_receive`` name peers as their certificates do; empty = all whom the CA vouches for."""

    credentials: Credentials | None = None
    """None: nobody can be known, and everything is cleartext."""
    may_send: tuple[str, ...] = ()
    may_receive: tuple[str, ...] = ()
    cleartext: bool = False
    """Cleartext with other hosts was asked for in so many words."""

    def refusal(self, certificate: Certificate, *, sends: bool) -> str | None:
        """Say why this peer may not send a machine here (or, not ``sends``, receive one); None if it may."""
        listed, key = (self.may_send, "may-send") if sends else (self.may_receive, "may-receive")
        if not listed or name_is_listed(certificate.names, listed):
            return None
        what = f"the certificate {certificate} is good, but none of its names is in [peers] {key}"
        return f"{TlsProblem.NOT_ALLOWED}: {what}"

    def require_listener(self, address: Address, allow: Sequence[str]) -> None:
        """Raise CommandError unless machines may be awaited here: who comes must be known, or named in ``allow``."""
        if not isinstance(address, TcpAddress) or address.is_loopback or self.credentials is not None:
            return
        if not self.cleartext:
            raise CommandError(
                f"{address} can be reached from other hosts, and there are no keys to know peers by. Next: pair the"
                " hosts (migratectl pki init), or listen on a loopback address",
                error_id="listener-unprotected",
            )
        if not allow:
            raise CommandError(
                f"{address} can be reached from other hosts, in cleartext. Next: name those that may connect in the"
                ' configuration ([migration] allow = ["10.0.0.7", ...]), or listen on a loopback address',
                error_id="listener-unprotected",
            )

    def require_cleartext(self, sock: socket.socket, peer: str) -> None:
        """Raise TlsError unless cleartext may go over this connected socket."""
        if self.cleartext or sock.family not in (socket.AF_INET, socket.AF_INET6) or _is_loopback(sock):
            return
        raise TlsError(
            TlsProblem.CLEARTEXT,
            "there are no keys here, and cleartext to another host was not asked for. Next: pair the hosts"
            ' (migratectl pki), or say mode = "off" in [tls]',
            peer=peer,
        )


def _is_loopback(sock: socket.socket) -> bool:
    host = ipaddress.ip_address(sock.getpeername()[0].partition("%")[0])
    mapped = getattr(host, "ipv4_mapped", None)
    return (mapped or host).is_loopback
