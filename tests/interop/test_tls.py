"""A real QEMU 7.2 with tls-creds-x509 on the other side, with keys from `migratectl pki`, in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.conftest import content, with_content
from tests.support.following import wait_until
from tests.support.holding_site import HoldingSite, MakeSite
from tests.support.keys import Keys, tls
from tests.support.qemu import BLOCK, MakeQemu, Qemu

#: Precopy would take minutes with the first, so that it never ends by itself.
SLOW_BPS = 64 << 10
TRICKLE_BPS = 16 << 10


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


def credentials(qemu: Qemu, directory: Path, endpoint: str) -> None:
    """Give a QEMU keys, and have its migrations use them."""
    properties = {"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(directory), "endpoint": endpoint}
    qemu.qmp.execute("object-add", {**properties, "verify-peer": True})
    qemu.parameter("tls-creds", "tls0")


def test_to_a_qemu(make_site: MakeSite, make_qemu: MakeQemu, keys: Keys) -> None:
    target = make_qemu("target", incoming="defer", ram=content(9))
    credentials(target, keys.host("q"), "server")
    source = with_content(make_site("source", incoming=None, config=tls(keys.host("a"))))
    ours = source.migrate(target.listen())
    target.wait_status({"completed"})
    assert target.ram() == content(1)
    assert (source.run_state(), target.run_state()) == ("postmigrate", "running")
    assert ours["x-migrated-peer"]["kind"] == "qemu"


def test_from_a_qemu(make_site: MakeSite, make_qemu: MakeQemu, keys: Keys) -> None:
    source = make_qemu("source", ram=content(1))
    source.capability("return-path")
    credentials(source, keys.host("r"), "client")
    site = make_site("site", config=tls(keys.host("b"), '[peers]\nmay-send = ["r"]'))
    source.migrate(site.address)
    site.wait_status("completed")
    wait_until(lambda: site.run_state() == "running", "it runs here")
    assert site.peek(BLOCK) == content(1)
    assert source.run_state() == "postmigrate"


def speak_postcopy(*sides: HoldingSite | Qemu) -> None:
    """Have the source, the first, begin slowly; requested pages get a connection, and a handshake, of their own."""
    for side in sides:
        for name in ("postcopy-ram", "postcopy-preempt"):
            side.capability(name)
    sides[0].parameter("downtime-limit", 1)
    sides[0].parameter("max-bandwidth", SLOW_BPS)
    sides[0].parameter("max-postcopy-bandwidth", TRICKLE_BPS)


def test_postcopy_to_a_qemu(make_site: MakeSite, make_qemu: MakeQemu, keys: Keys) -> None:
    target = make_qemu("target", incoming="defer", memory="memfd")
    credentials(target, keys.host("o"), "server")
    source = with_content(make_site("source", incoming=None, config=tls(keys.host("d"))))
    speak_postcopy(source, target)
    source.qmp.execute("migrate", {"uri": target.listen()})
    source.qmp.execute("migrate-start-postcopy")
    source.wait_status("postcopy-active")
    source.parameter("max-postcopy-bandwidth", 0)
    source.wait_status("completed")
    target.wait_status({"completed"})
    assert target.dump() == content(1)


def test_postcopy_from_a_qemu(make_site: MakeSite, make_qemu: MakeQemu, keys: Keys) -> None:
    source = make_qemu("source", ram=content(1))
    source.capability("return-path")
    credentials(source, keys.host("p"), "client")
    site = make_site("site", config=tls(keys.host("e")))
    speak_postcopy(source, site)
    source.qmp.execute("migrate", {"uri": site.address})
    source.wait_status({"active"})
    source.qmp.execute("migrate-start-postcopy")
    source.wait_status({"postcopy-active"})
    site.wait_event("running")
    source.parameter("max-postcopy-bandwidth", 0)
    site.wait_status("completed")
    source.wait_status({"completed"})
    assert site.peek(BLOCK) == content(1)
    assert "second_channel" in site.log_path.read_text()


def test_a_qemu_without_a_certificate_is_refused(make_site: MakeSite, make_qemu: MakeQemu, keys: Keys) -> None:
    directory = keys.host("t")
    for role in ("client-cert.pem", "client-key.pem"):
        (directory / role).unlink()
    source = make_qemu("source", ram=content(1))
    source.capability("return-path")
    credentials(source, directory, "client")
    site = make_site("site", config=tls(keys.host("c")))
    source.migrate(site.address, {"failed"})
    assert source.run_state() == "running"
    wait_until(lambda: "TLS-NO-CERTIFICATE" in site.log_path.read_text(), "it is said why")
    assert "status" not in site.query()


def test_a_qemu_that_does_not_trust_us(make_site: MakeSite, make_qemu: MakeQemu, keys: Keys, tmp_path: Path) -> None:
    target = make_qemu("target", incoming="defer", ram=content(9))
    other = Keys(tmp_path / "other", "other CA")
    both = keys.host("u")
    (both / "ca-cert.pem").write_bytes((other.host("v") / "ca-cert.pem").read_bytes())
    credentials(target, other.host("w"), "server")
    # It shows a certificate that we trust the CA of, and does not trust the CA of ours.
    mixed = keys.host("x")
    ours = mixed / "ca-cert.pem"
    ours.write_bytes(ours.read_bytes() + (other.host("y") / "ca-cert.pem").read_bytes())
    source = with_content(make_site("source", incoming=None, config=tls(mixed)))
    failed = source.migrate(target.listen(), "failed")
    assert "TLS-REFUSED: it ended the connection right after the handshake" in failed["error-desc"]
    assert "ours is 'x' (for x, 127.0.0.1" in failed["error-desc"]
    assert source.run_state() == "running"


@pytest.mark.parametrize("tls_at", ["qemu", "us"])
def test_only_one_side_speaks_tls(tls_at: str, make_site: MakeSite, make_qemu: MakeQemu, keys: Keys) -> None:
    source = make_qemu("source", ram=content(1))
    source.capability("return-path")
    if tls_at == "qemu":
        credentials(source, keys.host("z1"), "client")
    site = make_site("site", config="" if tls_at == "qemu" else tls(keys.host("z2")))
    source.migrate(site.address, {"failed"})
    assert source.run_state() == "running"
    expected = "TLS-NOT-SPOKEN: the source speaks TLS" if tls_at == "qemu" else "TLS-CLEARTEXT: what comes is not TLS"
    wait_until(lambda: expected in site.log_path.read_text(), "it is said why")
    assert site.run_state() == "inmigrate"
