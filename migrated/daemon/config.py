"""The configuration file: what it may say, and how it is read.

The rule of the file: nothing is guessed and nothing is ignored. An unknown key, a wrong type or an impossible value is
a ConfigError that names the file, the key and what was expected. Reading it changes nothing on this host.

``config/migrated.toml`` describes every key; a test keeps the two in step.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from migrated.daemon.inherited import inherited_number
from migrated.daemon.metrics_config import Metrics, metrics_problems
from migrated.errors import CommandError, ConfigError
from migrated.model.parameters import CAPABILITIES, PARAMETERS, Capabilities, Parameters
from migrated.transport.address import FdAddress, TcpAddress, parse_address
from migrated.transport.listen import parse_allow
from migrated.transport.unix_path import PATH_MAX_BYTES

#: A file larger than this is not a configuration.
FILE_MAX_BYTES = 1 << 20
#: Machine names become directory and unit names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@:-]{0,63}")
#: Handlers are named as entry points are: package.module:function.
_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

#: A DNS name, an IP address, or a whole domain.
_PEER = re.compile(r"(\*\.)?[A-Za-z0-9_-][A-Za-z0-9_.:-]{0,252}")

RUNTIME_ROOT = "/run/migrated"
STATE_ROOT = "/var/lib/migrated"
DEFER = "defer"


class FileMode(int):
    """Permission bits; in the file an octal string such as ``"0660"``."""


class Machine(Struct, frozen=True, rename="kebab"):
    """Who the machine is."""

    name: str = ""
    uuid: str | None = None
    # The configuration section's length field could hold more, but QEMU's names are C identifiers and short.
    type: Annotated[str, Meta(min_length=1, max_length=255)] = "none"


class Paths(Struct, frozen=True, rename="kebab"):
    """Where the daemon keeps things."""

    runtime: str = ""
    state: str = ""


class Socket(Struct, frozen=True, rename="kebab"):
    """One Unix socket; an empty path is filled in with the default below the runtime directory."""

    socket: str = ""
    mode: FileMode = FileMode(0o660)
    group: str | None = None


class Control(Socket, frozen=True, rename="kebab"):
    """The QMP socket; with a second group, whose members may ask, everybody connects and credentials decide."""

    read_only_group: str | None = None


class Migration(Struct, frozen=True, rename="kebab"):
    """Where a machine may arrive, and the start values of what QMP can change."""

    incoming: str | None = None
    allow: list[str] = []
    parameters: dict[str, Any] = {}
    capabilities: dict[str, Any] = {}


class Tls(Struct, frozen=True, rename="kebab"):
    """Whether connections to other hosts are encrypted and their peers known, and by which keys."""

    mode: Literal["auto", "required", "off"] = "auto"
    directory: str = ""


class Peers(Struct, frozen=True, rename="kebab"):
    """Which hosts, by the names in their certificates, may send this machine here, and receive it."""

    may_send: list[str] = []
    may_receive: list[str] = []


class History(Struct, frozen=True, rename="kebab"):
    """What is kept of migrations that have ended."""

    keep: Annotated[int, Meta(ge=0, le=1000)] = 100


class Handlers(Struct, frozen=True, rename="kebab"):
    """In-daemon handlers."""

    load: list[str] = []


class Workload(Struct, frozen=True, rename="kebab"):
    """The program the daemon starts, and how long an arriving machine waits for its blocks."""

    command: list[str] = []
    attach_timeout: Annotated[float, Meta(ge=0, le=3600)] = 30


class Log(Struct, frozen=True, rename="kebab"):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Config(Struct, frozen=True, rename="kebab"):
    """One configuration file, complete: every default that depends on the file's name is filled in."""

    machine: Machine = Machine()
    paths: Paths = Paths()
    control: Control = Control()
    attach: Socket = Socket()
    migration: Migration = Migration()
    tls: Tls = Tls()
    peers: Peers = Peers()
    history: History = History()
    metrics: Metrics = Metrics()
    handlers: Handlers = Handlers()
    workload: Workload = Workload()
    log: Log = Log()

    @property
    def control_socket(self) -> str:
        """Path of the QMP socket."""
        return self.control.socket

    @property
    def attach_socket(self) -> str:
        """Path of the attach socket."""
        return self.attach.socket

    def capabilities(self) -> Capabilities:
        """Return QEMU's defaults with ``[migration.capabilities]`` on top."""
        return Capabilities().replace(self.migration.capabilities)

    def parameters(self) -> Parameters:
        """Return the defaults with ``[migration.parameters]`` on top."""
        return Parameters().replace(self.migration.parameters)


def load_config(path: str | Path) -> Config:
    """Read, complete and check a configuration file. Raises ConfigError."""
    file = str(path)
    table = _read(file)
    _check_keys(file, table)
    try:
        config = msgspec.convert(table, Config, dec_hook=_convert_custom)
    except msgspec.ValidationError as error:
        raise _from_validation(file, error) from error
    config = _with_defaults(config, Path(file).stem)
    for key, expected in _problems(config):
        raise ConfigError(file, key, expected)
    return config


def _read(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            raw = stream.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(file, "", f"cannot be read: {error.strerror or error}") from error
    if len(raw) > FILE_MAX_BYTES:
        raise ConfigError(file, "", f"is larger than {FILE_MAX_BYTES} bytes: not a configuration")
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(file, "", f"is not TOML: {error}") from error


# -- keys --------------------------------------------------------------------------------------------------------


def known_keys(struct: type[Struct] = Config, prefix: str = "") -> Iterator[str]:
    """Return the path of every key there is; the free tables of parameters and capabilities count as one."""
    for field in msgspec.structs.fields(struct):
        key = f"{prefix}{field.encode_name}"
        yield key
        if isinstance(field.type, type) and issubclass(field.type, Struct):
            yield from known_keys(field.type, f"{key}.")


def _check_keys(file: str, table: Mapping[str, Any]) -> None:
    known = set(known_keys())
    for key in _keys(table):
        if key not in known:
            raise ConfigError(file, key, f"unknown key{_suggest(key, known)}")


def _keys(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Return the paths of all keys of ``table``, without those of free tables."""
    for name, value in table.items():
        key = f"{prefix}{name}"
        yield key
        if isinstance(value, dict) and key not in ("migration.parameters", "migration.capabilities"):
            yield from _keys(value, f"{key}.")


def _suggest(key: str, known: set[str]) -> str:
    """Return "; did you mean ...?" with the nearest key, also one that has been put in the wrong section."""
    name = key.rpartition(".")[2]
    misplaced = [candidate for candidate in sorted(known) if candidate.rpartition(".")[2] == name]
    near = misplaced or difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


# -- values ------------------------------------------------------------------------------------------------------


def _convert_custom(kind: type, value: object) -> object:
    if kind is FileMode and isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value):
        return FileMode(value, 8)
    raise ValueError('expected permissions as an octal string such as "0660"')


def _from_validation(file: str, error: msgspec.ValidationError) -> ConfigError:
    what, _, where = str(error).partition(" - at `")
    key = where.rstrip("`").removeprefix("$.")
    if what.startswith("Invalid enum value"):
        what = f"expected one of {', '.join(_choices(key))}, found {what.removeprefix('Invalid enum value ')}"
    return ConfigError(file, key, what[:1].lower() + what[1:].replace("`", "").replace("object", "table"))


def _choices(key: str) -> Sequence[str]:
    """Return what the Literal of a key allows."""
    section, _, name = key.partition(".")
    return get_args(get_type_hints(getattr(Config(), section).__class__)[name])


def _with_defaults(config: Config, stem: str) -> Config:
    machine = msgspec.structs.replace(config.machine, name=config.machine.name or stem)
    runtime = config.paths.runtime or f"{RUNTIME_ROOT}/{machine.name}"
    state = config.paths.state or f"{STATE_ROOT}/{machine.name}"
    return msgspec.structs.replace(
        config,
        machine=machine,
        paths=Paths(runtime, state),
        control=msgspec.structs.replace(config.control, socket=config.control.socket or f"{runtime}/qmp.sock"),
        attach=msgspec.structs.replace(config.attach, socket=config.attach.socket or f"{runtime}/attach.sock"),
    )


def _problems(config: Config) -> Iterator[tuple[str, str]]:
    """Return what is wrong, as (key, what was expected)."""
    yield from _machine_problems(config.machine)
    yield from _path_problems(config)
    yield from _incoming_problems(config)
    yield from metrics_problems(config.metrics)
    yield from _peer_problems(config)
    yield from _setting_problems(config.migration)
    for number, entry in enumerate(config.handlers.load):
        if not _ENTRY.fullmatch(entry):
            yield f"handlers.load[{number}]", f"expected package.module:function, found '{entry}'"
    if config.workload.command and not config.workload.command[0]:
        yield "workload.command", "expected a program first, found an empty string"


def _machine_problems(machine: Machine) -> Iterator[tuple[str, str]]:
    if not _NAME.fullmatch(machine.name):
        yield (
            "machine.name",
            f"expected 1 to 64 letters, digits and any of _ . @ : - (it names directories), found '{machine.name}'",
        )
    if machine.uuid is not None:
        try:
            uuid.UUID(machine.uuid)
        except ValueError:
            yield "machine.uuid", f"expected a UUID, found '{machine.uuid}'"


def _path_problems(config: Config) -> Iterator[tuple[str, str]]:
    paths = {
        "paths.runtime": config.paths.runtime,
        "paths.state": config.paths.state,
        "control.socket": config.control.socket,
        "attach.socket": config.attach.socket,
    }
    for key, path in paths.items():
        if not path.startswith("/") or "\0" in path:
            yield key, f"expected an absolute path, found '{path}'"
        if key.endswith("socket") and (length := len(path.encode())) > PATH_MAX_BYTES:
            yield key, f"expected at most {PATH_MAX_BYTES} bytes for a socket's path, found {length} ('{path}')"
    if config.control.read_only_group is not None and config.control.mode & 0o006 != 0o006:
        expected = 'expected mode = "0666": members of two groups connect, and what they may do their credentials say'
        yield "control.mode", f'{expected}, found "{config.control.mode:04o}"'
    if config.control.socket == config.attach.socket:
        yield "attach.socket", "expected another path than control.socket"


def _incoming_problems(config: Config) -> Iterator[tuple[str, str]]:
    migration = config.migration
    try:
        parse_allow(migration.allow)
    except CommandError as error:
        yield "migration.allow", str(error)
    if migration.incoming is None or migration.incoming == DEFER:
        return
    try:
        address = parse_address(migration.incoming)
    except CommandError as error:
        yield "migration.incoming", str(error)
        return
    if isinstance(address, FdAddress) and inherited_number(migration.incoming) is None:
        expected = 'expected the number of an inherited descriptor, or "defer": names are given by getfd, later'
        yield "migration.incoming", f"{expected}, found '{migration.incoming}'"
    exposed = isinstance(address, TcpAddress) and not address.is_loopback
    if exposed and config.tls.mode == "off" and not migration.allow:
        expected = 'expected a loopback address, or allow = ["ADDRESS", ...] with the peers that may connect'
        yield "migration.incoming", f"{expected}, found '{migration.incoming}': without TLS nobody proves who he is"


def _peer_problems(config: Config) -> Iterator[tuple[str, str]]:
    if config.tls.directory and not config.tls.directory.startswith("/"):
        yield "tls.directory", f"expected an absolute path, found '{config.tls.directory}'"
    for key, names in (("peers.may-send", config.peers.may_send), ("peers.may-receive", config.peers.may_receive)):
        for number, name in enumerate(names):
            if not _PEER.fullmatch(name):
                expected = "expected a DNS name, an IP address or *.DOMAIN, as in the peer's certificate"
                yield f"{key}[{number}]", f"{expected}, found '{name}'"
        if names and config.tls.mode == "off":
            yield key, 'expected [tls] mode = "auto" or "required": without TLS nobody proves what he is called'


def _setting_problems(migration: Migration) -> Iterator[tuple[str, str]]:
    for name, value in migration.capabilities.items():
        if name in CAPABILITIES and not isinstance(value, bool):
            yield f"migration.capabilities.{name}", f"expected true or false, found {value!r}"
    yield from _refusals("migration.capabilities", migration.capabilities, CAPABILITIES, Capabilities().replace)
    yield from _refusals("migration.parameters", migration.parameters, PARAMETERS, Parameters().replace)


def _refusals(
    path: str, table: dict[str, Any], known: Mapping[str, object], replace: Callable[[dict[str, Any]], object]
) -> Iterator[tuple[str, str]]:
    for name in table:
        if name not in known:
            yield f"{path}.{name}", f"unknown name{_suggest(name, set(known))}"
    # One by one, to name the key; then together, because limits may depend on each other.
    for key, changes in [*((f"{path}.{name}", {name: value}) for name, value in table.items()), (path, table)]:
        try:
            replace(changes)
        except CommandError as error:
            yield key, str(error)
