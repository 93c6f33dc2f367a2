"""What can be wrong between two hosts that prove to each other who they are, in words.

The rule of the file: pure; one sentence names the side, the certificate, the dates, and what to do next. The ids are
promises: docs/security.md explains each.

OpenSSL tells one side what it found (a verify code) and the other side an alert, which says little: what that side
knows of its own certificate is added to it.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from migrated.errors import TlsError
from migrated.transport.certificate import Certificate, format_span, format_time


class TlsProblem(StrEnum):
    """The ids."""

    KEYS = "TLS-KEYS"
    EXPIRED = "TLS-EXPIRED"
    NOT_YET_VALID = "TLS-NOT-YET-VALID"
    NAME = "TLS-NAME"
    AUTHORITY = "TLS-CA"
    PURPOSE = "TLS-PURPOSE"
    NO_CERTIFICATE = "TLS-NO-CERTIFICATE"
    NOT_ALLOWED = "TLS-NOT-ALLOWED"
    REFUSED = "TLS-REFUSED"
    VERSION = "TLS-VERSION"
    CLEARTEXT = "TLS-CLEARTEXT"
    NOT_SPOKEN = "TLS-NOT-SPOKEN"
    FAILED = "TLS-FAILED"


# X509_V_ERR_* of OpenSSL's x509_vfy.h.
_NOT_YET_VALID, _EXPIRED, _PURPOSE, _NAMES = 9, 10, 26, (62, 63, 64)
_AUTHORITY = (2, 7, 18, 19, 20, 21, 24, 79)  # no issuer, bad signature, self-signed, not a CA

#: Alerts of the other side (as OpenSSL spells them) that are about our certificate.
_ALERTS = {
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": TlsProblem.EXPIRED,
    "TLSV1_ALERT_UNKNOWN_CA": TlsProblem.AUTHORITY,
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": TlsProblem.NO_CERTIFICATE,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": TlsProblem.PURPOSE,
    "SSLV3_ALERT_BAD_CERTIFICATE": TlsProblem.REFUSED,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": TlsProblem.REFUSED,
    "TLSV1_ALERT_ACCESS_DENIED": TlsProblem.REFUSED,
}
_VERSIONS = {"TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE"}
_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "BAD_RECORD_TYPE", "UNEXPECTED_MESSAGE"}


@dataclass(frozen=True, slots=True)
class Encounter:
    """Two hosts, as one of them sees it. ``wanted`` is the name that was looked for; "" where a machine arrives."""

    peer: str
    own: Certificate
    authority: Certificate
    wanted: str = ""
    shown: Certificate | None = None
    """What the peer presented; proven by nothing."""

    def error(self, problem: TlsProblem, what: str) -> TlsError:
        """Return the error that says so."""
        return TlsError(problem, what, peer=self.peer)

    @property
    def them(self) -> str:
        """The peer's certificate in a sentence."""
        return f"its certificate {self.shown}" if self.shown else "its certificate"


def is_other_protocol(error: ssl.SSLError) -> bool:
    """Say whether what came is not TLS at all."""
    return error.reason in _NO_TLS


def explain(error: ssl.SSLError, encounter: Encounter, now: datetime) -> TlsError:
    """Say what an error of OpenSSL means to people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _refused_here(error, encounter, now)
    reason = error.reason or str(error)
    if reason in _ALERTS:
        return _refused_there(_ALERTS[reason], encounter, now)
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return encounter.error(
            TlsProblem.NO_CERTIFICATE,
            "it presented no certificate. Next: give that host one (migratectl pki issue), or, if it is a QEMU, set"
            " tls-creds to an object with endpoint=client and a directory that has client-cert.pem",
        )
    if reason in _VERSIONS:
        return encounter.error(
            TlsProblem.VERSION, "the other side does not speak TLS 1.3, and nothing older is accepted"
        )
    if is_other_protocol(error):
        return encounter.error(
            TlsProblem.CLEARTEXT,
            "what comes is not TLS: the other side speaks cleartext, or another protocol. Next: give it keys ([tls])",
        )
    return encounter.error(TlsProblem.FAILED, f"OpenSSL says: {reason.lower().replace('_', ' ')}")


def _refused_here(error: ssl.SSLCertVerificationError, encounter: Encounter, now: datetime) -> TlsError:
    shown, them = encounter.shown, encounter.them
    if error.verify_code == _EXPIRED:
        when = ""
        if shown is not None:
            ago = format_span((now - shown.not_after).total_seconds())
            when = f" {format_time(shown.not_after)}, {ago} ago by the clock here ({format_time(now)})"
        return encounter.error(
            TlsProblem.EXPIRED, f"{them} expired{when}. Next: issue a new one for that host, and reload its daemon"
        )
    if error.verify_code == _NOT_YET_VALID:
        when = ""
        if shown is not None:
            ahead = format_span((shown.not_before - now).total_seconds())
            when = (
                f": it begins {format_time(shown.not_before)}, {ahead} ahead of the clock here ({format_time(now)})."
                " Next: compare the clocks of both hosts; this one is behind, or the one that issued it is ahead"
            )
        return encounter.error(TlsProblem.NOT_YET_VALID, f"{them} is not valid yet{when}")
    if error.verify_code in _NAMES:
        return encounter.error(
            TlsProblem.NAME,
            f"it should be {encounter.wanted}, and {them} is not for that name. Next: use a name or address it is for,"
            f" set tls-hostname, or issue one with {encounter.wanted} in it",
        )
    if error.verify_code in _AUTHORITY:
        return encounter.error(
            TlsProblem.AUTHORITY,
            f"{them} does not come from the CA that is trusted here, '{encounter.authority.subject}'. Next: compare"
            " ca-cert.pem of both hosts",
        )
    if error.verify_code == _PURPOSE:
        return encounter.error(
            TlsProblem.PURPOSE, f"{them} is for other purposes. Next: issue one for TLS servers and clients"
        )
    return encounter.error(TlsProblem.FAILED, f"{them} was not accepted: {error.verify_message}")


def _refused_there(problem: TlsProblem, encounter: Encounter, now: datetime) -> TlsError:
    own = encounter.own
    if problem is TlsProblem.NO_CERTIFICATE:
        return encounter.error(problem, "the other side wants a certificate of this host and got none")
    why = {
        TlsProblem.EXPIRED: "as expired",
        TlsProblem.AUTHORITY: "because it does not come from a CA that is trusted there",
        TlsProblem.PURPOSE: "because it is for other purposes",
    }.get(problem, "(a name it does not have, or a date that has not come by the clock there)")
    text = f"the other side refused our certificate {own} {why}"
    if now >= own.not_after:
        text += f"; it expired {format_time(own.not_after)}"
    return encounter.error(problem, f"{text}. Next: the log of the other side says what it found")
