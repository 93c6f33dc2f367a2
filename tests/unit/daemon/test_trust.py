"""Keys are found where the configuration or systemd says, and what ends soon is said once per threshold."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from migrated.daemon.config import Config, load_config
from migrated.daemon.trust import TrustKeeper, build_trust, check_trust
from migrated.errors import ConfigError, TlsError
from tests.support.keys import Keys, tls


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


def config(directory: Path, text: str) -> Config:
    path = directory / "kv.toml"
    path.write_text(text)
    return load_config(path)


def test_the_keys_systemd_hands_over_come_first(keys: Keys, tmp_path: Path) -> None:
    environment = {"CREDENTIALS_DIRECTORY": str(keys.host("unit"))}
    credentials = build_trust(config(tmp_path, ""), environment).credentials
    assert credentials is not None
    assert credentials.directory == keys.directory / "unit"
    named = build_trust(config(tmp_path, tls(keys.host("named"))), environment).credentials
    assert named is not None
    assert named.directory == keys.directory / "named"


def test_off_means_off(keys: Keys, tmp_path: Path) -> None:
    trust = build_trust(config(tmp_path, "[tls]\nmode = 'off'"), {"CREDENTIALS_DIRECTORY": str(keys.host("unused"))})
    assert (trust.credentials, trust.cleartext) == (None, True)


@pytest.mark.parametrize(
    "text", ["[tls]\nmode = 'required'", "[tls]\ndirectory = '/nowhere'", "[peers]\nmay-send = ['a']"]
)
def test_what_needs_keys_does_not_start_without(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no ca-cert\.pem in .*Next: migratectl pki init"):
        build_trust(config(tmp_path, text), {})


def test_check_config_knows_that_an_open_listener_needs_keys(keys: Keys, tmp_path: Path) -> None:
    listener = '[migration]\nincoming = "tcp:0.0.0.0:7400"\n'
    with pytest.raises(ConfigError, match="there are no keys to know peers by"):
        check_trust(config(tmp_path, listener))
    check_trust(config(tmp_path, listener + tls(keys.host("listener"))))
    check_trust(config(tmp_path, listener + 'allow = ["10.0.0.7"]\n[tls]\nmode = "off"'))
    check_trust(config(tmp_path, '[migration]\nincoming = "defer"'))
    with pytest.raises(TlsError, match="TLS-EXPIRED"):
        check_trust(config(tmp_path, tls(keys.host("ended", begins_in_days=-40))))


def said(keeper: TrustKeeper, now: datetime) -> list[tuple[str, Any]]:
    with capture_logs() as logs:
        keeper.look(now)
    return [(line["event"], line["within_days"]) for line in logs]


def test_each_threshold_is_announced_once(keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "kv.toml"
    keeper = TrustKeeper(config(tmp_path, tls(keys.host("ending", days=100))), path, structlog.get_logger())
    assert keeper.trust.credentials is not None
    end = keeper.trust.credentials.server.certificate.not_after
    expected = {40: [], 29: [30], 20: [], 6: [7], 2: [], 0.5: [1], 0.1: [], -1: [0], -2: []}
    for left, days in expected.items():
        event = "certificate_expired" if left < 0 else "certificate_expires"
        assert said(keeper, end - timedelta(days=left)) == [(event, count) for count in days]
    keeper.reload()
    assert said(keeper, end - timedelta(days=20)) == [("certificate_expires", 30)]


def test_a_reload_takes_peers_as_well_and_a_bad_file_changes_nothing(keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "kv.toml"
    good = tls(keys.host("reloading"))
    keeper = TrustKeeper(config(tmp_path, good), path, structlog.get_logger())
    path.write_text(good + '[peers]\nmay-send = ["b"]\n')
    keeper.reload()
    before = keeper.current()
    assert before.may_send == ("b",)
    for bad in ("[tls", "[tls]\nmode = 'required'\ndirectory = '/nowhere'", tls(keys.host("old", begins_in_days=-40))):
        path.write_text(bad)
        with capture_logs() as logs:
            keeper.reload()
        assert [line["event"] for line in logs] == ["reload_failed"]
        assert keeper.current() is before
