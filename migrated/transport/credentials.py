"""Keys and certificates of this host: QEMU's file layout, read whole or not at all.

The rule of the file: nothing is used that could not prove itself: key and certificate belong together, the
certificate comes from the CA beside it. Contexts are made once and shared by all connections; those that are open keep
theirs when others take their place.

    ca-cert.pem     who issues the certificates of peers     (may hold several)
    server-cert.pem server-key.pem     shown where machines arrive
    client-cert.pem client-key.pem     shown where machines are sent to; without them, the server's

Source of the layout: QEMU's tls-creds-x509.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from migrated.errors import TlsError
from migrated.transport.certificate import Certificate, parse_der, parse_pem
from migrated.transport.tls_problem import Encounter, TlsProblem, explain

CA_CERT = "ca-cert.pem"
SERVER = "server"
CLIENT = "client"
#: Spoken between two daemons; a QEMU offers and takes none.
ALPN = "migrated/1"
#: Asked by `migratectl pki check`: authenticate each other, say what you think, and part.
ALPN_CHECK = "migrated-check/1"
#: A file beyond this is no certificate; a bundle of CAs stays far below.
FILE_MAX_BYTES = 1 << 20

#: HandshakeType certificate (RFC 8446, 4); what a peer sends under it is kept up to this length.
_CERTIFICATE = 11
PRESENTED_MAX_BYTES = 64 << 10


class Connection(ssl.SSLObject):
    """An SSLObject that remembers what the peer presented, also when OpenSSL throws it away as no good."""

    message = b""

    def presented(self) -> Certificate | None:
        """Describe the peer's certificate, which may be anybody's; None where there was none."""
        # Length of the context (0 from a server), it, length of the list, length of the first certificate, it.
        body = self.message[4:]
        at = 1 + (body[0] if body else 0) + 3
        length = int.from_bytes(body[at : at + 3], "big")
        try:
            return parse_der(body[at + 3 : at + 3 + length])
        except ValueError:
            return None


def _watch(
    connection: Connection, direction: str, version: object, content_type: object, kind: object, message: bytes
) -> None:
    if direction == "read" and kind == _CERTIFICATE and len(message) <= PRESENTED_MAX_BYTES:
        connection.message = message


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the two roles: what it shows, and the contexts that hold it."""

    stem: str
    """What its files begin with."""
    certificate: Certificate
    handshake: ssl.SSLContext
    """Whose connections remember what the peer presented."""
    quiet: ssl.SSLContext
    """The same without; a connection is given this one when the handshake is over."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """All that this host needs to know its peers and to be known by them."""

    directory: Path
    authority: Certificate
    server: Endpoint
    client: Endpoint

    @property
    def certificates(self) -> dict[str, Certificate]:
        """Every certificate by the name of its file, each once."""
        found = {CA_CERT: self.authority, f"{SERVER}-cert.pem": self.server.certificate}
        if self.client.certificate != self.server.certificate:
            found[f"{CLIENT}-cert.pem"] = self.client.certificate
        return found


def load_credentials(directory: Path, *, alpn: str = ALPN) -> Credentials:
    """Read and check what is in ``directory``; offer ``alpn`` to whom is called. Raises TlsError. Blocking."""
    authority = read_certificate(directory / CA_CERT)
    client = CLIENT if (directory / f"{CLIENT}-cert.pem").exists() else SERVER
    credentials = Credentials(
        directory, authority, _endpoint(directory, SERVER, SERVER), _endpoint(directory, CLIENT, client)
    )
    _prove(credentials)
    for context in (credentials.client.handshake, credentials.client.quiet):
        context.check_hostname = True
        context.set_alpn_protocols([alpn])
    return credentials


def _prove(credentials: Credentials) -> None:
    """Let both roles meet each other, in memory: peers who have the same CA will judge as OpenSSL does here."""
    near, far = ssl.MemoryBIO(), ssl.MemoryBIO()
    pairs = [
        (role, role.quiet.wrap_bio(*buffers, server_side=role is credentials.server))
        for role, buffers in ((credentials.client, (near, far)), (credentials.server, (far, near)))
    ]
    for (_, here), (there, _) in [*zip(pairs, pairs[::-1], strict=True)] * 2:
        try:
            here.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            stem = there.stem
            encounter = Encounter("", there.certificate, credentials.authority, shown=there.certificate)
            found = explain(error, encounter, datetime.now(UTC))
            raise TlsError(found.problem, f"{credentials.directory / stem}-cert.pem: {found.what}") from error


def read_certificate(path: Path) -> Certificate:
    """Read a certificate that this host has. Raises TlsError, which names the file."""
    try:
        return parse_pem(_read(path))
    except ValueError as error:
        raise TlsError(TlsProblem.KEYS, f"{path} is not a certificate in PEM form ({error})") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(FILE_MAX_BYTES)
    except OSError as error:
        raise TlsError(TlsProblem.KEYS, f"{path} cannot be read: {error.strerror or error}") from error


def _endpoint(directory: Path, role: str, stem: str) -> Endpoint:
    cert, key = directory / f"{stem}-cert.pem", directory / f"{stem}-key.pem"
    certificate = read_certificate(cert)
    _read(key)
    if key.stat().st_mode & 0o007:
        raise TlsError(TlsProblem.KEYS, f"{key} can be read by everybody. Next: chmod 0600 it, and issue a new one")
    handshake, quiet = (_context(role, directory / CA_CERT, cert, key) for _ in range(2))
    handshake.sslobject_class = Connection
    # Not in the documents, and there since Python 3.8; without it error texts do not name the peer's certificate.
    handshake._msg_callback = _watch  # type: ignore[attr-defined]  # noqa: SLF001
    return Endpoint(stem, certificate, handshake, quiet)


def _context(role: str, authority: Path, cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == SERVER else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # a server has no name to look for; a client gets it back once it is proven
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(authority)
    except ssl.SSLError as error:
        raise TlsError(TlsProblem.KEYS, f"{authority} is not a file of certificates ({error.reason})") from error
    try:
        # An empty password: a key that wants one must not make OpenSSL ask the terminal.
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        raise TlsError(
            TlsProblem.KEYS, f"{key} is not the key of {cert}, or not an unencrypted key in PEM form ({error.reason})"
        ) from error
    if role == SERVER:
        context.num_tickets = 0  # nothing is resumed: each connection proves itself
        context.set_alpn_protocols([ALPN, ALPN_CHECK])
    return context
