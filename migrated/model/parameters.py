"""Migration capabilities and parameters: one table each, and the immutable values made from them.

The rule of the file: a change is all-or-nothing and refused with QEMU's words. What this version does not act on yet is
refused too (setting it to its default is not a change), never silently accepted. Names, order, defaults, ranges and
texts are QEMU 7.2's; `max-bandwidth` and `return-path` have another default here, ``x-migrated-*`` are our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from migrated.errors import ArgumentError

Value = int | bool | str


class Kind(StrEnum):
    """QMP type of a parameter; the value is what QEMU's error text calls it."""

    SIZE = "size"
    UINT8 = "uint8_t"
    UINT32 = "uint32_t"
    UINT64 = "uint64"
    BOOL = "boolean"
    STR = "StrOrNull"
    ENUM = "string"
    LIST = "array"


_BITS = {Kind.SIZE: 64, Kind.UINT8: 8, Kind.UINT32: 32, Kind.UINT64: 64}


@dataclass(frozen=True, slots=True)
class Capability:
    """One row of the table of capabilities."""

    name: str
    implemented: bool = False
    default: bool = False
    fixed: str = ""
    """Why it cannot be switched off, where it cannot."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One row of the table of parameters; ``expects`` is QEMU's text for a value outside low..high."""

    name: str
    kind: Kind
    default: Value | None
    unit: str = ""
    low: int = 0
    high: int = 2**64 - 1
    expects: str = ""
    choices: tuple[str, ...] = ()
    power_of_two: bool = False
    implemented: bool = False


CAPABILITIES: Mapping[str, Capability] = {
    row.name: row
    for row in (
        Capability("xbzrle", implemented=True),
        Capability("rdma-pin-all"),
        Capability("auto-converge", implemented=True),
        Capability("zero-blocks"),
        Capability("compress"),
        Capability("events", implemented=True),
        Capability("postcopy-ram", implemented=True),
        Capability("x-colo"),
        Capability("release-ram"),
        Capability("block"),
        # QEMU: off. A migration whose end nobody acknowledges leaves its outcome open too often.
        Capability(
            "return-path",
            implemented=True,
            default=True,
            fixed="without an answer nobody knows who owns the machine (only file:, exec: and pipes do without one)",
        ),
        Capability("pause-before-switchover", implemented=True),
        Capability("multifd", implemented=True),
        Capability("dirty-bitmaps"),
        Capability("postcopy-blocktime", implemented=True),
        # Says when disks are locked; without disks there is nothing to do differently.
        Capability("late-block-activate", implemented=True),
        Capability("x-ignore-shared"),
        Capability("validate-uuid", implemented=True),
        Capability("background-snapshot"),
        Capability("zero-copy-send"),
        Capability("postcopy-preempt", implemented=True),
    )
}

_PERCENT = "an integer in the range of 1 to 99"
_BYTE_COUNT = "a value between 1 and 255"
_DOWNTIME_MAX_MS = 2000 * 1000
#: One hour: a deadline beyond that is no deadline.
_DEADLINE_MAX_MS = 3600 * 1000
#: QEMU's limit is SIZE_MAX; half of it also catches negative numbers, which arrive as huge ones.
_RATE_MAX_BPS = 2**63 - 1


def _announce(name: str, default: int, unit: str, low: int, high: int) -> Parameter:
    # QEMU's text for announce-step says 0, its check says 1.
    return Parameter(name, Kind.SIZE, default, unit, low, high, f"a value between 0 and {high}")


def _percent(name: str, default: int, high: int = 99, expects: str = _PERCENT) -> Parameter:
    return Parameter(name, Kind.UINT8, default, "%", 1, high, expects, implemented=True)


def _level(name: str, high: int = 9, *, implemented: bool = True) -> Parameter:
    return Parameter(name, Kind.UINT8, 1, "", 0, high, f"a value between 0 and {high}", implemented=implemented)


def _deadline(name: str, default: int) -> Parameter:
    text = f"an integer in the range of 1 to {_DEADLINE_MAX_MS} ms"
    return Parameter(name, Kind.UINT64, default, "ms", 1, _DEADLINE_MAX_MS, text, implemented=True)


def _rate(name: str, *, implemented: bool) -> Parameter:
    text = f"an integer in the range of 0 to {_RATE_MAX_BPS} bytes/second"
    return Parameter(name, Kind.SIZE, 0, "bytes/s", 0, _RATE_MAX_BPS, text, implemented=implemented)


PARAMETERS: Mapping[str, Parameter] = {
    row.name: row
    for row in (
        _announce("announce-initial", 50, "ms", 0, 100_000),
        _announce("announce-max", 550, "ms", 0, 100_000),
        _announce("announce-rounds", 5, "", 0, 1000),
        _announce("announce-step", 100, "ms", 1, 10_000),
        _level("compress-level", implemented=False),
        Parameter("compress-threads", Kind.UINT8, 8, "", 1, 255, _BYTE_COUNT),
        Parameter("decompress-threads", Kind.UINT8, 2, "", 1, 255, _BYTE_COUNT),
        Parameter("compress-wait-thread", Kind.BOOL, default=True),
        _percent("throttle-trigger-threshold", 50, 100, "an integer in the range of 1 to 100"),
        _percent("cpu-throttle-initial", 20),
        _percent("cpu-throttle-increment", 10),
        Parameter("cpu-throttle-tailslow", Kind.BOOL, default=False, implemented=True),
        Parameter("tls-creds", Kind.STR, ""),
        Parameter("tls-hostname", Kind.STR, "", implemented=True),
        Parameter("tls-authz", Kind.STR, ""),
        # QEMU: 128 MiB/s, a figure from the days of 1 Gbit/s; 0 = unlimited.
        _rate("max-bandwidth", implemented=True),
        Parameter(
            "downtime-limit", Kind.UINT64, 300, "ms", 0, _DOWNTIME_MAX_MS,
            "an integer in the range of 0 to (2000 * 1000) ms", implemented=True,
        ),
        Parameter("x-checkpoint-delay", Kind.UINT32, 20_000, "ms"),
        Parameter("block-incremental", Kind.BOOL, default=False),
        Parameter("multifd-channels", Kind.UINT8, 2, "", 1, 255, _BYTE_COUNT, implemented=True),
        Parameter(
            "xbzrle-cache-size", Kind.SIZE, 64 << 20, "bytes", 4096, 2**63,
            "a power of two no less than the target page size", power_of_two=True, implemented=True,
        ),
        _rate("max-postcopy-bandwidth", implemented=True),
        _percent("max-cpu-throttle", 99, expects="an integer in the range of cpu_throttle_initial to 99"),
        Parameter("multifd-compression", Kind.ENUM, "none", choices=("none", "zlib", "zstd", "auto"), implemented=True),
        _level("multifd-zlib-level"),
        _level("multifd-zstd-level", 20),
        Parameter("block-bitmap-mapping", Kind.LIST, None),
        # How long a workload may take to stop.
        _deadline("x-migrated-stop-timeout", 2_000),
        # How long the source waits for SHUT after the last byte before it calls the outcome unknown.
        _deadline("x-migrated-answer-timeout", 30_000),
        # How long a peer may be silent in the middle of something.
        _deadline("x-migrated-silence-timeout", 10_000),
        # A source without a return path says "completed" without knowing: refused unless an operator wants it.
        Parameter("x-migrated-allow-no-return-path", Kind.BOOL, default=False, implemented=True),
        # What nothing here can load is refused, unless an operator wants it carried along.
        Parameter("x-migrated-checksums", Kind.BOOL, default=True, implemented=True),
        Parameter("x-migrated-data-channels", Kind.BOOL, default=True, implemented=True),
        Parameter("x-migrated-keep-unknown-sections", Kind.BOOL, default=False, implemented=True),
    )
}  # fmt: skip


#: What a destination takes over from a `migrated` source for one migration. Not what decides about the destination's
#: own safety: which sources it believes, what it loads.
ADOPTED_CAPABILITIES = frozenset({"multifd", "postcopy-ram", "postcopy-preempt", "postcopy-blocktime", "validate-uuid"})
ADOPTED_PARAMETERS = frozenset(
    {"multifd-channels", "multifd-compression", "x-migrated-answer-timeout", "x-migrated-silence-timeout"}
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The capabilities as they are set; `replace` makes the next value."""

    _set: Mapping[str, bool] = field(default_factory=dict)

    def get(self, name: str) -> bool:
        """Return whether a capability is on. Raises ArgumentError for a name that does not exist."""
        return self._set.get(name, _capability(name).default)

    def all(self) -> dict[str, bool]:
        """Return every capability in QEMU's order."""
        return {name: self.get(name) for name in CAPABILITIES}

    def refuse_conflicts(self) -> None:
        """Raise ArgumentError where two that are on do not go together (QEMU's check since 8.2, and its text)."""
        if self.get("multifd") and self.get("xbzrle"):
            raise ArgumentError("Multifd is not compatible with xbzrle")

    def replace(self, changes: Mapping[str, bool]) -> Capabilities:
        """Return these capabilities with ``changes``. Raises ArgumentError, and then nothing has changed."""
        for name, on in changes.items():
            if on and not _capability(name).implemented:
                raise ArgumentError(f"Capability '{name}' is not implemented by this version of migrated")
            if not on and (why := _capability(name).fixed):
                raise ArgumentError(f"Capability '{name}' cannot be switched off: {why}")
        return Capabilities(MappingProxyType({**self._set, **changes}))


def _capability(name: str) -> Capability:
    if name not in CAPABILITIES:
        raise ArgumentError(f"Parameter 'capability' does not accept value '{name}'")
    return CAPABILITIES[name]


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters as they are set; `replace` makes the next value."""

    _set: Mapping[str, Value] = field(default_factory=dict)

    def get(self, name: str) -> Value | None:
        """Return a value; None where a parameter has no default and was not set."""
        return self._set.get(name, _parameter(name).default)

    def integer(self, name: str) -> int:
        """Return the value of a parameter that is a number."""
        value = self.get(name)
        if not isinstance(value, int):
            raise TypeError(f"parameter {name} is not a number")
        return value

    def all(self) -> dict[str, Value]:
        """Return every parameter that has a value, in QEMU's order, our own behind them."""
        return {name: value for name in PARAMETERS if (value := self.get(name)) is not None}

    def replace(self, changes: Mapping[str, object]) -> Parameters:
        """Return these parameters with ``changes``. Raises ArgumentError, and then nothing has changed."""
        converted = {name: _convert(_parameter(name), value) for name, value in changes.items()}
        merged = Parameters(MappingProxyType({**self._set, **converted}))
        for row in PARAMETERS.values():
            if row.name in converted or row.name == "max-cpu-throttle":
                _check_range(row, merged)
        for name, value in converted.items():
            if not PARAMETERS[name].implemented and value != PARAMETERS[name].default:
                raise ArgumentError(f"Parameter '{name}' is not implemented by this version of migrated")
        return merged


def _parameter(name: str) -> Parameter:
    if name not in PARAMETERS:
        raise ArgumentError(f"Parameter '{name}' is unexpected")
    return PARAMETERS[name]


def _convert(row: Parameter, value: object) -> Value:
    """Return ``value`` as the row's type, as QEMU's input visitor would."""
    match row.kind:
        case Kind.SIZE | Kind.UINT8 | Kind.UINT32 | Kind.UINT64:
            return _convert_integer(row, value)
        case Kind.BOOL if isinstance(value, bool):
            return value
        case Kind.STR if value is None or isinstance(value, str):
            return value or ""
        case Kind.ENUM if isinstance(value, str):
            if value not in row.choices:
                raise ArgumentError(f"Parameter '{row.name}' does not accept value '{value}'")
            return value
        case Kind.LIST if isinstance(value, list):
            raise ArgumentError(f"Parameter '{row.name}' is not implemented by this version of migrated")
    raise ArgumentError(f"Invalid parameter type for '{row.name}', expected: {row.kind.value}")


def _convert_integer(row: Parameter, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**64:
        raise ArgumentError(f"Parameter '{row.name}' expects uint64")
    # QEMU takes a negative number for the unsigned one with the same bits; the range check then meets a huge value.
    unsigned = value % 2**64
    if unsigned >> _BITS[row.kind]:
        raise ArgumentError(f"Parameter '{row.name}' expects {row.kind.value}")
    return unsigned


def _check_range(row: Parameter, merged: Parameters) -> None:
    if row.kind not in _BITS:
        return
    value = merged.integer(row.name)
    low = merged.integer("cpu-throttle-initial") if row.name == "max-cpu-throttle" else row.low
    odd = row.power_of_two and value & (value - 1)
    if not low <= value <= row.high or odd:
        raise ArgumentError(f"Parameter '{row.name.replace('-', '_')}' expects {row.expects}")
