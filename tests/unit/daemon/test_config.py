"""The configuration file: defaults, refusals that name the key, and nothing guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrated.daemon.config import Config, known_keys, load_config
from migrated.errors import ConfigError


def load(directory: Path, text: str | bytes, name: str = "kv.toml") -> Config:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path)


def refusal(directory: Path, text: str | bytes, name: str = "kv.toml") -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        load(directory, text, name)
    assert refused.value.file == str(directory / name)
    return refused.value


def test_an_empty_file_is_a_machine_named_after_it(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert (config.machine.name, config.machine.uuid, config.machine.type) == ("kv", None, "none")
    assert (config.paths.runtime, config.paths.state) == ("/run/migrated/kv", "/var/lib/migrated/kv")
    assert (config.control_socket, config.attach_socket) == (
        "/run/migrated/kv/qmp.sock",
        "/run/migrated/kv/attach.sock",
    )
    assert (config.control.mode, config.control.group, config.attach.mode) == (0o660, None, 0o660)
    assert (config.migration.incoming, config.migration.allow) == (None, [])
    assert (config.workload.command, config.workload.attach_timeout, config.handlers.load) == ([], 30, [])
    assert (config.log.level, config.log.format) == ("info", "auto")
    assert config.capabilities().get("return-path") is True
    assert config.parameters().get("downtime-limit") == 300


def test_everything_can_be_said(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        [machine]
        name = "db-1"
        uuid = "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"
        type = "pc"
        [paths]
        runtime = "/r"
        state = "/s"
        [control]
        socket = "/c.sock"
        mode = "0666"
        read-only-group = "watch"
        group = "ops"
        [attach]
        mode = "666"
        [migration]
        incoming = "tcp:0.0.0.0:7400"
        allow = ["10.0.0.7", "fd00::/8"]
        [migration.parameters]
        downtime-limit = 50
        cpu-throttle-tailslow = true
        [migration.capabilities]
        auto-converge = true
        [tls]
        mode = "required"
        directory = "/keys"
        [peers]
        may-send = ["a.example", "10.0.0.7", "fd00::1", "*.lab.example"]
        may-receive = ["b"]
        [handlers]
        load = ["my.package:register"]
        [workload]
        command = ["python3", "-m", "app"]
        attach-timeout = 1.5
        [log]
        level = "debug"
        format = "json"
        """,
    )
    assert (config.machine.name, config.machine.type) == ("db-1", "pc")
    assert (config.control_socket, config.control.mode, config.control.group) == ("/c.sock", 0o666, "ops")
    assert config.control.read_only_group == "watch"
    assert (config.attach_socket, config.attach.mode) == ("/r/attach.sock", 0o666)
    assert config.migration.allow == ["10.0.0.7", "fd00::/8"]
    assert config.parameters().get("downtime-limit") == 50
    assert config.capabilities().get("auto-converge") is True
    assert config.handlers.load == ["my.package:register"]
    assert (config.workload.command, config.workload.attach_timeout) == (["python3", "-m", "app"], 1.5)


def test_metrics_are_off_and_then_for_this_host_unless_others_are_named(tmp_path: Path) -> None:
    assert load(tmp_path, "").metrics.address is None
    for listen in ("127.0.0.1:9600", "[::1]:9600", "localhost:0", "unix:/run/m.sock"):
        assert load(tmp_path, f"[metrics]\nlisten = '{listen}'").metrics.address is not None
    for listen in ("0.0.0.0:9600", ":9600", "host-a:9600", "[::]:9600"):
        error = refusal(tmp_path, f"[metrics]\nlisten = '{listen}'")
        assert (error.key, "nobody is asked who he is" in error.expected) == ("metrics.listen", True)
        assert load(tmp_path, f"[metrics]\nlisten = '{listen}'\nallow = ['10.0.0.9']").metrics.address is not None


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        # unknown keys, with the nearest one there is
        ("[machin]\nname = 'x'", "machin", "unknown key; did you mean machine?"),
        ("incoming = 'defer'", "incoming", "unknown key; did you mean migration.incoming?"),
        ("[workload]\nattach_timeout = 3", "workload.attach_timeout", "did you mean workload.attach-timeout?"),
        ("[log]\nsocket = '/x'", "log.socket", "did you mean attach.socket or control.socket?"),
        ("[migration]\nzzz = 1", "migration.zzz", "unknown key"),
        ("[migration.parameters]\ndowntime-limt = 3", "migration.parameters.downtime-limt", "mean downtime-limit?"),
        ("[migration.capabilities]\nautoconverge = true", "migration.capabilities.autoconverge", "mean auto-converge?"),
        # types
        ("machine = 3", "machine", "expected table, got int"),
        ("[machine]\nname = 3", "machine.name", "expected str, got int"),
        ("[control]\nmode = 432", "control.mode", 'expected permissions as an octal string such as "0660"'),
        ("[control]\nread-only-group = 'adm'", "control.mode", 'expected mode = "0666"'),
        ("[control]\nmode = '0999'", "control.mode", "expected permissions as an octal string"),
        ("[migration]\nallow = ['::1', 3]", "migration.allow[1]", "expected str, got int"),
        ("[migration]\nparameters = 3", "migration.parameters", "expected table, got int"),
        ("[migration.parameters]\nmax-bandwidth = 1.5", "migration.parameters.max-bandwidth", "expects uint64"),
        ("[migration.capabilities]\nevents = 1", "migration.capabilities.events", "expected true or false, found 1"),
        ("[log]\nlevel = 'loud'", "log.level", "expected one of debug, info, warning, error, found 'loud'"),
        # ranges and contents
        ("[machine]\nname = '../x'", "machine.name", "expected 1 to 64 letters"),
        ("[machine]\nuuid = 'f81d'", "machine.uuid", "expected a UUID, found 'f81d'"),
        ("[machine]\ntype = ''", "machine.type", "length >= 1"),
        ("[paths]\nstate = 'here'", "paths.state", "expected an absolute path, found 'here'"),
        ("[paths]\nruntime = '/" + "x" * 120 + "'", "control.socket", "expected at most 107 bytes"),
        (
            "[attach]\nsocket = '/run/migrated/kv/qmp.sock'",
            "attach.socket",
            "expected another path than control.socket",
        ),
        ("[workload]\nattach-timeout = -1", "workload.attach-timeout", ">= 0"),
        ("[workload]\nattach-timeout = inf", "workload.attach-timeout", "<= 3600"),
        ("[workload]\nattach-timeout = nan", "workload.attach-timeout", ">= 0"),
        ("[workload]\ncommand = ['']", "workload.command", "expected a program first"),
        ("[handlers]\nload = ['no-colon']", "handlers.load[0]", "expected package.module:function, found 'no-colon'"),
        ("[migration]\nincoming = 'rdma:h:1'", "migration.incoming", "unknown migration protocol: rdma:h:1"),
        ("[migration]\nallow = ['host']", "migration.allow", "'host' is not an IP address or network"),
        ("[history]\nkeep = -1", "history.keep", ">= 0"),
        ("[metrics]\nlisten = '9600'", "metrics.listen", "expected HOST:PORT or unix:PATH, found '9600'"),
        ("[metrics]\nlisten = 'exec:true'", "metrics.listen", "expected HOST:PORT or unix:PATH"),
        ("[metrics]\nlisten = 'unix:here'", "metrics.listen", "expected an absolute path, found 'unix:here'"),
        ("[metrics]\nallow = ['host']", "metrics.allow", "'host' is not an IP address or network"),
        (
            "[migration.parameters]\ndowntime-limit = 2000001",
            "migration.parameters.downtime-limit",
            "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms",
        ),
        (
            "[migration.parameters]\ncpu-throttle-initial = 80\nmax-cpu-throttle = 70",
            "migration.parameters",
            "expects an integer in the range of cpu_throttle_initial to 99",
        ),
        (
            "[migration.capabilities]\ncompress = true",
            "migration.capabilities.compress",
            "Capability 'compress' is not implemented by this version of migrated",
        ),
        # not even TOML
        ("a = [[[[", "", "is not TOML"),
        ("a = 1\na = 2", "", "is not TOML"),
        (b"name = '\xff'", "", "is not TOML"),
        ("a = " + "[" * 100_000, "", "is not TOML"),
        (b"#" * ((1 << 20) + 1), "", "is larger than"),
    ],
)
def test_a_refusal_names_key_and_expectation(tmp_path: Path, text: str | bytes, key: str, expected: str) -> None:
    error = refusal(tmp_path, text)
    assert error.key == key
    assert expected in error.expected


def test_a_file_name_that_is_no_machine_name_needs_a_name_inside(tmp_path: Path) -> None:
    assert refusal(tmp_path, "", "my machine.toml").key == "machine.name"
    assert load(tmp_path, "[machine]\nname = 'kv'", "my machine.toml").machine.name == "kv"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read: No such file or directory"):
        load_config(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    "incoming",
    ["tcp:127.0.0.1:7400", "tcp:[::1]:0", "tcp:localhost:1", "unix:/run/x", "fd:3", "exec:cat", "file:/x", "defer"],
)
def test_a_listener_that_only_this_host_reaches_needs_no_allow_list(tmp_path: Path, incoming: str) -> None:
    assert load(tmp_path, f"[migration]\nincoming = '{incoming}'").migration.incoming == incoming


def test_a_descriptor_has_no_name_before_the_daemon_runs(tmp_path: Path) -> None:
    error = refusal(tmp_path, "[migration]\nincoming = 'fd:mine'")
    assert error.key == "migration.incoming"
    assert "expected the number of an inherited descriptor" in error.expected


@pytest.mark.parametrize("incoming", ["tcp::7400", "tcp:0:7400", "tcp:0.0.0.0:1", "tcp:[::]:1", "tcp:10.0.0.7:1"])
def test_a_listener_that_others_reach_in_cleartext_needs_an_allow_list(tmp_path: Path, incoming: str) -> None:
    error = refusal(tmp_path, f"[migration]\nincoming = '{incoming}'\n[tls]\nmode = 'off'")
    assert error.key == "migration.incoming"
    assert "expected a loopback address, or allow" in error.expected
    named = load(tmp_path, f"[migration]\nincoming = '{incoming}'\nallow = ['10.0.0.8']\n[tls]\nmode = 'off'")
    assert named.migration.allow == ["10.0.0.8"]
    assert load(tmp_path, f"[migration]\nincoming = '{incoming}'").tls.mode == "auto"  # the keys decide


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("[tls]\nmode = 'of'", "tls.mode", "expected one of auto, required, off, found 'of'"),
        ("[tls]\ndirectory = 'pki'", "tls.directory", "expected an absolute path, found 'pki'"),
        ("[peers]\nmay-send = ['a', '*']", "peers.may-send[1]", "expected a DNS name, an IP address or *.DOMAIN"),
        ("[peers]\nmay-receive = ['a b']", "peers.may-receive[0]", "found 'a b'"),
        ("[peers]\nmay-send = ['a']\n[tls]\nmode = 'off'", "peers.may-send", "without TLS nobody proves"),
    ],
)
def test_what_cannot_be_said_of_peers(tmp_path: Path, text: str, key: str, expected: str) -> None:
    error = refusal(tmp_path, text)
    assert error.key == key
    assert expected in error.expected


def test_known_keys_are_dotted_and_kebab() -> None:
    keys = set(known_keys())
    assert {"machine.name", "workload.attach-timeout", "migration.parameters", "control.group"} <= keys
    assert not any("_" in key for key in keys)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(known_keys())), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_configuration_or_a_refusal(tmp_path: Path, raw: bytes) -> None:
    try:
        load(tmp_path, raw)
    except ConfigError:
        return


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(known_keys())), value=_VALUES)
def test_any_value_of_any_key_is_taken_or_refused(tmp_path: Path, key: str, value: object) -> None:
    try:
        load(tmp_path, f"{key} = {_toml(value)}")
    except ConfigError:
        return


def _toml(value: object) -> str:
    match value:
        case None:
            return "1979-05-27"
        case bool():
            return str(value).lower()
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return "{" + ", ".join(f'"{name}" = {_toml(inner)}' for name, inner in value.items()) + "}"
        case str():
            return '"' + "".join(f"\\U{ord(char):08x}" for char in value if not "\ud800" <= char <= "\udfff") + '"'
        case _:
            return str(value)
