"""What a certificate says: whose it is, for how long, from whom.

The rule of the file: it describes, it never decides; OpenSSL verifies. What a peer presented is described for error
texts only, and may be anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.x509.oid import NameOID

#: Before these many days the end of a certificate is announced: once a month's, a week's and a day's worth is left.
WARNING_DAYS = (30, 7, 1)
#: Names of a peer's certificate that a text repeats, and letters of each.
NAMES_SHOWN = 8
NAME_SHOWN = 64


@dataclass(frozen=True, slots=True)
class Certificate:
    """The parts of a certificate that people act on. ``names`` are the DNS names and IP addresses it is for."""

    subject: str
    issuer: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime

    def __str__(self) -> str:
        shown = ", ".join(self.names[:NAMES_SHOWN]) + (", ..." if len(self.names) > NAMES_SHOWN else "")
        return (
            f"'{self.subject}' (for {shown or 'no host'}; valid {format_time(self.not_before)} to"
            f" {format_time(self.not_after)}; issued by '{self.issuer}')"
        )

    @property
    def name(self) -> str:
        """The name it is called by in logs: its first, or its subject."""
        return self.names[0] if self.names else self.subject


def parse_pem(pem: bytes) -> Certificate:
    """Describe the first certificate of a PEM text. Raises ValueError."""
    return _describe(x509.load_pem_x509_certificate(pem))


def parse_der(der: bytes) -> Certificate:
    """Describe a certificate. Raises ValueError."""
    return _describe(x509.load_der_x509_certificate(der))


def _describe(certificate: x509.Certificate) -> Certificate:
    return Certificate(
        _common_name(certificate.subject),
        _common_name(certificate.issuer),
        tuple(_names(certificate)),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return _printable(str(found[0].value) if found else name.rfc4514_string())


def _names(certificate: x509.Certificate) -> Iterable[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    for name in names:
        if isinstance(name, x509.DNSName | x509.IPAddress):
            yield _printable(str(name.value))


def _printable(text: str) -> str:
    """Return a name of a peer's choice as it may be shown: short, and without anything that steers a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:NAME_SHOWN])


def format_time(moment: datetime) -> str:
    """Return a moment as people compare it across hosts."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def format_span(seconds: float) -> str:
    """Return a duration in its one unit that says enough."""
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"


def name_is_listed(names: Iterable[str], listed: Iterable[str]) -> bool:
    """Say whether one of a certificate's names is in a list; ``*.example.org`` there stands for one label."""
    return any(_matches(name.lower(), pattern.lower()) for name in names for pattern in listed)


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("*."):
        return name.partition(".")[2] == pattern[2:]
    return name == pattern


def expiry_warning(not_after: datetime, now: datetime) -> int | None:
    """Return the least of `WARNING_DAYS` that the rest of a certificate's life is within; 0 = over, None = far off."""
    left_days = (not_after - now).total_seconds() / 86_400
    if left_days <= 0:
        return 0
    return min((days for days in WARNING_DAYS if left_days <= days), default=None)
