"""Keys are used whole or not at all, and what is wrong with them is said by file."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrated.errors import TlsError
from migrated.transport.certificate import (
    expiry_warning,
    format_span,
    name_is_listed,
    parse_der,
    parse_pem,
)
from migrated.transport.credentials import Connection, load_credentials
from tests.support.keys import Keys

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


def refused(directory: Path) -> str:
    with pytest.raises(TlsError) as error:
        load_credentials(directory)
    return str(error.value)


def test_good_keys(keys: Keys) -> None:
    credentials = load_credentials(keys.host("good"))
    assert set(credentials.certificates) == {"ca-cert.pem", "server-cert.pem"}
    assert credentials.server.certificate.names == ("good", "127.0.0.1", "localhost")
    assert credentials.server.certificate.name == "good"
    assert credentials.authority.name == "test CA"


def test_a_client_may_have_its_own_certificate(keys: Keys) -> None:
    directory, other = keys.host("both"), keys.host("apart")
    for part in ("cert", "key"):
        (directory / f"client-{part}.pem").write_bytes((other / f"client-{part}.pem").read_bytes())
    credentials = load_credentials(directory)
    assert credentials.client.certificate.name == "apart"
    assert set(credentials.certificates) == {"ca-cert.pem", "server-cert.pem", "client-cert.pem"}
    for part in ("cert", "key"):
        (directory / f"client-{part}.pem").unlink()
    assert load_credentials(directory).client.certificate.name == "both"


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_a_file_that_is_missing_or_something_else(name: str, keys: Keys) -> None:
    path = keys.host("missing", replace=True) / name
    path.unlink()
    assert refused(path.parent).startswith(f"TLS-KEYS: {path} cannot be read: No such file or directory")
    path.write_text("no certificate")
    path.chmod(0o600)
    assert str(path) in refused(path.parent)
    assert "TLS-KEYS" in refused(path.parent)


def test_a_key_that_everybody_can_read(keys: Keys) -> None:
    path = keys.host("open") / "server-key.pem"
    path.chmod(0o644)
    assert "can be read by everybody. Next: chmod 0600" in refused(path.parent)


def test_a_key_of_another_certificate_and_one_with_a_password(keys: Keys) -> None:
    directory = keys.host("mixed")
    path = directory / "server-key.pem"
    path.write_bytes((keys.host("stray") / "server-key.pem").read_bytes())
    assert f"{path} is not the key of {directory}/server-cert.pem" in refused(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    path.write_bytes(locked)
    assert "or not an unencrypted key" in refused(directory)


def test_a_certificate_of_another_authority(keys: Keys, tmp_path: Path) -> None:
    directory = keys.host("foreign")
    (directory / "ca-cert.pem").write_bytes((Keys(tmp_path, "other CA").host("x") / "ca-cert.pem").read_bytes())
    assert f"TLS-CA: {directory}/server-cert.pem: its certificate 'foreign'" in refused(directory)


def test_certificates_out_of_their_time(keys: Keys) -> None:
    directory = keys.host("late", begins_in_days=-40)
    assert f"TLS-EXPIRED: {directory}/server-cert.pem: its certificate 'late'" in refused(directory)
    directory = keys.host("soon", begins_in_days=2)
    assert f"TLS-NOT-YET-VALID: {directory}/server-cert.pem: its certificate 'soon'" in refused(directory)


def test_a_certificate_for_one_purpose_only(keys: Keys) -> None:
    directory = keys.host("server-only")
    key = ec.generate_private_key(ec.SECP256R1())
    signer = keys.authority
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server-only")]))
        .issuer_name(signer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer.key, hashes.SHA256())
    )
    for role in ("server", "client"):
        (directory / f"{role}-cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (directory / f"{role}-key.pem").write_bytes(pem)
    assert f"TLS-PURPOSE: {directory}/client-cert.pem: its certificate 'server-only'" in refused(directory)


def test_openssl_takes_what_pki_makes(keys: Keys) -> None:
    """A second opinion, by the program most people ask."""
    directory = keys.host("asked")
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(directory / "ca-cert.pem")]
    done = subprocess.run([*command, str(directory / "server-cert.pem")], capture_output=True, text=True, check=False)
    assert done.stdout.endswith(": OK\n"), done


@pytest.mark.parametrize("message", [b"", b"\x0b\0\0\1\0", b"\x0b\0\0\5\xff\0\0\1\x30", bytes(100)])
def test_what_a_peer_presents_may_be_anything(message: bytes) -> None:
    connection = Connection.__new__(Connection)
    connection.message = message
    assert connection.presented() is None


def test_names_of_a_peers_choice_steer_no_terminal() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "\x1b[2J evil")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    names = [x509.DNSName(f"host-{number}.example") for number in range(20)]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    described = parse_der(certificate.public_bytes(Encoding.DER))
    assert described == parse_pem(certificate.public_bytes(Encoding.PEM))
    assert "\x1b" not in str(described)
    assert "'?[2J evil' (for host-0.example, " in str(described)
    assert "host-7.example, ...;" in str(described)


@pytest.mark.parametrize(
    ("names", "listed", "expected"),
    [
        (["a", "10.0.0.7"], ["10.0.0.7"], True),
        (["Host.Example"], ["host.example"], True),
        (["a.lab.example"], ["*.lab.example"], True),
        (["a.b.lab.example"], ["*.lab.example"], False),
        (["lab.example"], ["*.lab.example"], False),
        (["*.lab.example"], ["a.lab.example"], False),
        ([], ["a"], False),
    ],
)
def test_names_on_a_list(names: list[str], listed: list[str], expected: bool) -> None:
    assert name_is_listed(names, listed) is expected


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (timedelta(days=31), None),
        (timedelta(days=30), 30),
        (timedelta(days=7, seconds=1), 30),
        (timedelta(days=7), 7),
        (timedelta(hours=24), 1),
        (timedelta(seconds=1), 1),
        (timedelta(0), 0),
        (timedelta(days=-3), 0),
    ],
)
def test_the_end_of_a_certificate_is_announced(left: timedelta, expected: int | None) -> None:
    assert expiry_warning(NOW + left, NOW) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(3 * 86_400 + 5, "3 days"), (86_400, "1 day"), (7300, "2 hours"), (61, "1 minute"), (3, "less than a minute")],
)
def test_spans(seconds: float, expected: str) -> None:
    assert format_span(seconds) == expected
