"""A certificate authority in a directory, for people who have none.

The rule of the file: a key is written with mode 0600 under a name of its own and renamed when it is complete; nothing
that exists is overwritten unless somebody said so. The CA's key never leaves the directory it was made in.

    DIRECTORY/ca/      ca-key.pem  ca-cert.pem             where the CA is, and nowhere else
    DIRECTORY/pki/     ca-cert.pem server-cert.pem ...     what one host needs, in QEMU's layout

EC P-256, because everybody's TLS has it; a path length of 0, because this CA makes no others; certificates are good for
both roles, because a machine comes back.
"""

from __future__ import annotations

import contextlib
import grp
import ipaddress
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrated.errors import MigratedError

AUTHORITY_DAYS = 3650
HOST_DAYS = 825
#: Clocks of hosts differ a little: a new certificate is good everywhere at once.
BACKDATED = timedelta(hours=1)
#: The service's group, which has to read the keys of its host. The units do the same with keys that were copied.
SERVICE_GROUP = "migrated"
#: X.520's limit of a common name.
NAME_MAX = 64


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA that can sign."""

    directory: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


@dataclass(frozen=True, slots=True)
class Validity:
    """From when until when, so that nobody has to wait for a certificate to be bad."""

    begin: datetime
    days: float

    @property
    def end(self) -> datetime:
        return self.begin + timedelta(days=self.days)


def from_now(days: float) -> Validity:
    """Return a validity that begins now."""
    return Validity(datetime.now(UTC) - BACKDATED, days)


def create_authority(directory: Path, name: str, validity: Validity | None = None) -> Authority:
    """Make a CA in a directory that has none. Raises MigratedError."""
    if (directory / "ca-key.pem").exists():
        raise MigratedError(
            f"there is a CA in {directory} already; every host that trusts it would have to be paired anew"
        )
    validity = validity or from_now(AUTHORITY_DAYS)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    certificate = (
        _builder(subject, subject, key.public_key(), validity)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    authority = Authority(directory, key, certificate)
    with _unwritable(directory):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(directory / "ca-key.pem", _key_pem(key), 0o600)
        _write(directory / "ca-cert.pem", certificate.public_bytes(Encoding.PEM), 0o644)
    return authority


def open_authority(directory: Path) -> Authority:
    """Read a CA. Raises MigratedError."""
    try:
        key = load_pem_private_key((directory / "ca-key.pem").read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate((directory / "ca-cert.pem").read_bytes())
    except OSError as error:
        raise MigratedError(
            f"there is no CA here that could be used: {error.filename}: {error.strerror}. Next: migratectl pki init,"
            " or do this on the host where that was done"
        ) from error
    except (ValueError, TypeError) as error:
        raise MigratedError(f"the CA in {directory} is damaged: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise MigratedError(f"the CA in {directory} is damaged: ca-key.pem is not the key of ca-cert.pem")
    return Authority(directory, key, certificate)


def issue(
    authority: Authority,
    directory: Path,
    host: str,
    others: Sequence[str] = (),
    *,
    replace: bool = False,
    validity: Validity | None = None,
) -> x509.Certificate:
    """Put key and certificate for a host of these names into a directory, in QEMU's layout. Raises MigratedError."""
    if (directory / "server-cert.pem").exists() and not replace:
        raise MigratedError(f"there is a certificate in {directory} already. Next: say --replace, or another directory")
    validity = validity or from_now(HOST_DAYS)
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_general_name(name) for name in dict.fromkeys((host, *others))]
    certificate = (
        _builder(_name(host), authority.certificate.subject, key.public_key(), validity)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    with _unwritable(directory):
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        _write(directory / "ca-cert.pem", authority.certificate.public_bytes(Encoding.PEM), 0o644)
        # A QEMU looks for one of each per role; the key comes first: a certificate without it would be taken for ready.
        for role in ("server", "client"):
            _write(directory / f"{role}-key.pem", _key_pem(key), 0o600)
            _write(directory / f"{role}-cert.pem", certificate.public_bytes(Encoding.PEM), 0o644)
    return certificate


def give_to_service(directory: Path) -> bool:
    """Let the service's group read the keys, where this is root and there is one; say whether it was done."""
    try:
        group = grp.getgrnam(SERVICE_GROUP)
    except KeyError:
        return False
    if os.geteuid() != 0:
        return False
    for path in directory.glob("*-key.pem"):
        os.chown(path, 0, group.gr_gid)
        path.chmod(0o640)
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, validity: Validity
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity.begin)
        .not_valid_after(validity.end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:NAME_MAX])])


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    try:
        return x509.DNSName(text)
    except ValueError as error:
        raise MigratedError(f"'{text}' is neither a DNS name nor an IP address") from error


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file whole or not at all; nobody else can read it meanwhile."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            os.fchmod(stream.fileno(), mode)
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _unwritable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MigratedError(f"{error.filename or directory} cannot be written: {error.strerror}") from error
