"""Postcopy as an operator meets it: when to switch, what a pause means, what its faults cost.

The rule of the file: words and decisions made from query-migrate's answers; of the daemon it asks only what an operator
could ask in the same moment. `watch` calls it at every poll.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from migrated.cli.exit_code import exit_code_of
from migrated.cli.units import format_ms
from migrated.control.client import QmpClient
from migrated.errors import ChannelError, CommandError

AT_ONCE, AFTER_PASS, WHEN_STUCK = "at-once", "after-pass", "when-stuck"
#: `--postcopy` alone: everything is sent once, so that the machine waits only for what it wrote meanwhile.
DEFAULT_MOMENT = f"{AFTER_PASS}:1"

PAUSED_AT_SOURCE = "The connection is broken, and stays so until 'migratectl recover'"
PAUSED_AT_DESTINATION = "The connection is broken; a `migrated` source connects again by itself. To pause: do it there"

#: Statuses of a migration in which `migrate-start-postcopy` still changes something.
_BEFORE = frozenset({"setup", "wait-unplug", "active"})
#: A pass over little memory takes milliseconds; the moment should not be missed by several.
SWITCH_POLL_S = 0.02
#: A connection that was refused is tried again after so many polls.
RETRY_POLLS = 10


@dataclass(frozen=True, slots=True)
class Moment:
    """When a migration is to switch to postcopy."""

    kind: str
    passes: int = 0

    def has_come(self, info: Mapping[str, Any]) -> bool:
        """Look at query-migrate's answer."""
        if info.get("status") not in _BEFORE:
            return False
        match self.kind:
            case "after-pass":
                return _finished_passes(info) >= self.passes
            case "when-stuck":
                return not info.get("x-migrated-convergence", {}).get("converging", True)
            case _:
                return True


def parse_moment(text: str) -> Moment:
    """``at-once``, ``after-pass:N`` or ``when-stuck``. Raises ValueError."""
    if text in (AT_ONCE, WHEN_STUCK):
        return Moment(text)
    if (match := re.fullmatch(rf"{AFTER_PASS}(?:[: ]([1-9][0-9]{{0,5}}))?", text)) is not None:
        return Moment(AFTER_PASS, int(match[1] or 1))
    raise ValueError(f"'{text}' is not {AT_ONCE}, {AFTER_PASS}:N or {WHEN_STUCK}")


def give_value(args: Sequence[str]) -> list[str]:
    """Write ``--postcopy`` as ``--postcopy=MOMENT``: with the word behind it if that is one, else the default."""
    words: list[str] = []
    for word in args:
        if words and words[-1] == "--postcopy" and _is_moment(word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return [f"{word}={DEFAULT_MOMENT}" if word == "--postcopy" else word for word in words]


def _is_moment(word: str) -> bool:
    try:
        parse_moment(word)
    except ValueError:
        return False
    return True


@contextmanager
def capability(client: QmpClient, wanted: bool) -> Iterator[None]:
    """Have postcopy-ram on if it is ``wanted``, and off again afterwards if it was, unless the migration goes on."""
    rows = client.execute("query-migrate-capabilities") if wanted else []
    if all(row["state"] for row in rows if row["capability"] == "postcopy-ram"):
        yield
        return
    _set_capability(client, True)
    try:
        yield
    finally:
        with suppress(ChannelError):
            _switch_off_again(client)


def _switch_off_again(client: QmpClient) -> None:
    for _ in range(20):  # it may still be busy for a moment after the end that it has told of
        info = client.execute("query-migrate")
        if info.get("status", "none") != "none" and exit_code_of(info) is None:
            return
        try:
            _set_capability(client, False)
        except CommandError:
            client.next_event(0.05)
        else:
            return


def _set_capability(client: QmpClient, state: bool) -> None:
    client.execute("migrate-set-capabilities", {"capabilities": [{"capability": "postcopy-ram", "state": state}]})


class Switch:
    """Starts postcopy when its moment has come."""

    def __init__(self, client: QmpClient, moment: Moment) -> None:
        self._client = client
        self._moment = moment
        self._done = False

    @property
    def poll_s(self) -> float | None:
        """How soon to look again; None: no sooner than anybody else needs."""
        return None if self._done else SWITCH_POLL_S

    def look(self, info: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Act on query-migrate's answer."""
        if self._done or not self._moment.has_come(info):
            return
        self._done = True
        try:
            self._client.execute("migrate-start-postcopy")
        except CommandError as error:
            note(f"Cannot switch to postcopy: {error}")
        else:
            note(
                "Switching to postcopy: the machine moves, its memory follows, unless the rest fits the downtime limit"
            )


class Reconnect:
    """Has a paused source connect to an address, again and again until it has."""

    poll_s: float | None = None

    def __init__(self, client: QmpClient, uri: str) -> None:
        self._client = client
        self._uri = uri
        self._polls = 0

    def look(self, info: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Act on query-migrate's answer."""
        if info.get("status") != "postcopy-paused":
            self._polls = 0
            return
        if self._polls % RETRY_POLLS == 0:
            self.ask()
        self._polls += 1

    def ask(self) -> None:
        """Ask for a connection. That it is not paused any more is no obstacle: then it goes on."""
        try:
            self._client.execute("migrate", {"uri": self._uri, "resume": True})
        except CommandError as error:
            if "no paused migration" not in str(error):
                raise


def is_postcopy(info: Mapping[str, Any]) -> bool:
    """The machine runs at the destination, or is about to; nothing is cancelled any more."""
    return str(info.get("status", "")).startswith("postcopy-")


def is_source(info: Mapping[str, Any], run_state: str) -> bool:
    """Say at which end of a migration this host is; a QEMU shows it by its run state only."""
    return "x-migrated-outcome" in info or run_state in ("finish-migrate", "postmigrate")


def last_address(info: Mapping[str, Any]) -> str | None:
    """The URI at which a source's destination was last reached; None where it cannot be connected to twice."""
    peer = str(info.get("x-migrated-peer", {}).get("address", ""))
    if peer.startswith("unix:"):
        return peer
    return f"tcp:{peer}" if re.fullmatch(r".+:[0-9]+", peer) and not re.match(r"(fd|exec|file):", peer) else None


def next_step(info: Mapping[str, Any], run_state: str) -> str | None:
    """What to do in the middle of a postcopy; None outside of one."""
    peer = info.get("x-migrated-peer", {})
    where, by_itself = peer.get("address") or "the other host", peer.get("kind") == "migrated"
    if not is_postcopy(info):
        return None
    source, status = is_source(info, run_state), info["status"]
    if status == "postcopy-paused":
        return _after_a_pause(str(where), source=source, by_itself=by_itself)
    if status in ("postcopy-recover", "postcopy-recover-setup"):
        return "wait: both ends find out what has arrived"
    if source:
        return f"wait, and keep this host up: memory that the machine needs at {where} is still only here"
    return f"wait: memory still comes from {where}"


def _after_a_pause(where: str, *, source: bool, by_itself: bool) -> str:
    if not source:
        return (
            f"`migratectl recover` at the source ({where}), unless it connects again by itself; to be reached at"
            " another address: `migratectl recover URI` here first"
        )
    if by_itself:
        return (
            f"this host connects to {where} again by itself, unless `migratectl pause` broke the connection. To"
            " go on at once: `migratectl recover`; at another address: `migratectl recover URI` at the destination,"
            " then here"
        )
    return "`migrate-recover` at the destination, then `migratectl recover URI` here"


def pause_note(info: Mapping[str, Any]) -> str:
    """Say that a waiting `migrate` sees a pause, why, and what comes next."""
    reason = info.get("error-desc") or "the connection broke"
    where = info.get("x-migrated-peer", {}).get("address") or "the destination"
    return (
        f"Paused: {reason}. Nothing is lost: the machine is at {where} and stands still where it needs memory that has"
        f" not arrived. Next: {next_step(info, 'finish-migrate')}"
    )


# -- faults --------------------------------------------------------------------------------------------------------


def describe_faults(faults: Mapping[str, Any]) -> str:
    """Faults that waited for the source, with their latencies; then the cheaper ones."""
    remote = faults["remote"]
    text = f"{remote['count']} waited for the source"
    if remote["count"]:
        text += f" (p50 {_us(remote['p50-us'])}, p99 {_us(remote['p99-us'])}, max {_us(remote['max-us'])})"
    if joined := faults["in-flight"]["count"]:
        text += f", {joined} for a page that was on its way"
    if local := faults["local"]["count"]:
        text += f", {local} found the page here"
    return text


def faults_in_short(info: Mapping[str, Any]) -> str:
    """The same beside a progress bar; empty where there are none to tell of."""
    remote = info.get("x-migrated-faults", {}).get("remote", {})
    if not remote.get("count"):
        return ""
    return f"{remote['count']} faults (p50 {_us(remote['p50-us'])}, p99 {_us(remote['p99-us'])})"


def describe_blocktime(info: Mapping[str, Any]) -> str:
    """How long the machine stood still for its memory; empty where the capability was off."""
    if "postcopy-blocktime" not in info:
        return ""
    threads = info.get("postcopy-vcpu-blocktime", ())
    longest = f" of {len(threads)} threads, at most {format_ms(max(threads))} one of them" if threads else ""
    return f"{format_ms(info['postcopy-blocktime'])} all{longest}"


def _us(microseconds: float) -> str:
    return format_ms(microseconds / 1000)


def _finished_passes(info: Mapping[str, Any]) -> int:
    if "x-migrated-passes" in info:
        return len(info["x-migrated-passes"])
    return int(info.get("ram", {}).get("dirty-sync-count", 0)) - 1
