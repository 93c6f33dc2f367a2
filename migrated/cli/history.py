"""`migratectl history` and `migratectl report`: what became of earlier migrations.

The rule of the file: the daemon is asked, and where it cannot be, its state directory is read; either way it is the
same text. What reads the directory is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from migrated.cli.exit_code import ExitCode
from migrated.cli.output import Output
from migrated.cli.report import figure_lines, reason_lines, row
from migrated.cli.session import Json, Options, State
from migrated.cli.units import format_bytes, format_ms
from migrated.control.client import QmpClient
from migrated.errors import ChannelError, CommandError, ConfigError

if TYPE_CHECKING:
    from migrated.model.history import Report, Unreadable

#: An id is shown as far as it tells it from the others, and no shorter than this.
SHORT_ID = 8
#: Who had the machine behind a migration, in the words of `whoowns`.
_OWNERS = {
    ("outgoing", "source-owns"): "this host",
    ("outgoing", "destination-owns"): "the other host",
    ("incoming", "source-owns"): "the other host",
    ("incoming", "destination-owns"): "this host",
}
_DIRECTIONS = {"outgoing": "to", "incoming": "from"}


def history(
    ctx: typer.Context,
    count: Annotated[int, typer.Option("-n", "--lines", min=1, help="How many, the latest ones.")] = 20,
    state: State = None,
    as_json: Json = False,
) -> None:
    """List the migrations of this host, the latest first. Without a daemon, or with --state: from the disk."""
    output = Output(as_json or ctx.obj.as_json)
    found = _ask(ctx.obj, state, output, lambda client: client.execute("x-migrated-query-history"), _listed)[:count]
    output.result(found, history_lines(found))


def report(
    ctx: typer.Context,
    migration_id: Annotated[str, typer.Argument(metavar="ID", help="Id of a migration, or the beginning of it.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Show the report of a migration that has ended. Without a daemon, or with --state: from the disk."""
    output = Output(as_json or ctx.obj.as_json)

    def ask(client: QmpClient) -> Any:
        return client.execute("x-migrated-query-report", {"id": migration_id})

    found = _ask(ctx.obj, state, output, ask, lambda reports: _found(reports, migration_id))
    output.result(found, report_lines(found))


def _ask(
    options: Options,
    state: Path | None,
    output: Output,
    ask: Callable[[QmpClient], Any],
    read: Callable[[Sequence[Report | Unreadable]], Any],
) -> Any:
    """Return the daemon's answer, or what the disk says; whatever is refused ends the program with 3."""
    try:
        if state is not None:
            return read(_on_disk(state))
        try:
            with QmpClient(options.socket) as client:
                return ask(client)
        except ChannelError as error:
            if not options.state.is_dir():
                raise
            output.note(f"{error}; this is what the disk says")
            return read(_on_disk(options.state))
    except (CommandError, ChannelError, ConfigError) as error:
        output.refusal(error)
        raise typer.Exit(ExitCode.REFUSED) from error


def _on_disk(state: Path) -> Sequence[Report | Unreadable]:
    if not state.is_dir():
        raise ConfigError(str(state), "", "there is no such state directory. Next: say where it is (--state DIR)")
    from migrated.daemon.history import FileHistoryStore

    return FileHistoryStore(state, keep=0).reports()


def _listed(reports: Sequence[Report | Unreadable]) -> list[dict[str, object]]:
    from migrated.model.history import listed

    return listed(reports)


def _found(reports: Sequence[Report | Unreadable], wanted: str) -> dict[str, object]:
    from msgspec import to_builtins

    from migrated.model.history import Report, find

    found: dict[str, object] = to_builtins(find([one for one in reports if isinstance(one, Report)], wanted))
    return found


# -- for people ----------------------------------------------------------------------------------------------------


def history_lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of migrations; reports that are damaged stand below it."""
    reports = [one for one in entries if "id" in one]
    short = _short_ids([one["id"] for one in reports])
    rows = [["ID", "STARTED", "", "PEER", "STATUS", "DOWNTIME", "TOTAL", "DATA"]] if reports else []
    rows += [
        [
            short[one["id"]],
            _local(one["started"]),
            _DIRECTIONS.get(one["direction"], one["direction"]),
            one.get("peer") or one.get("uri", ""),
            _status(one),
            format_ms(one["downtime"]) if "downtime" in one else "",
            format_ms(one["total-time"]) if "total-time" in one else "",
            format_bytes(one["transferred"]) if "transferred" in one else "",
        ]
        for one in reports
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]
    lines += [f"{one['path']} cannot be read: {one['unreadable']}" for one in entries if "unreadable" in one]
    return lines or ["There are no reports of migrations"]


def report_lines(found: Mapping[str, Any]) -> list[str]:
    """One report, as `migrate` ends with it, and what belongs to it afterwards."""
    info: Mapping[str, Any] = found.get("migration", {})
    way = _DIRECTIONS.get(found["direction"], found["direction"])
    lines = [f"Migration {way} {found.get('peer') or found.get('uri') or 'an unknown peer'}: {found['status']}"]
    lines += [row("id", found["id"]), row("machine", found["machine"])]
    if uri := found.get("uri"):
        lines.append(row("uri", uri))
    lines.append(row("started", _local(found["started"])))
    if ended := found.get("ended"):
        lines.append(row("ended", _local(ended)))
    lines.append(row("owner", _OWNERS.get((found["direction"], found["outcome"]), "unknown")))
    lines += reason_lines(info, {}) or _reason_of(found)
    return lines + figure_lines(info, found.get("passes-left-out", 0))


def _reason_of(found: Mapping[str, Any]) -> list[str]:
    """Why, where query-migrate was not asked any more."""
    return [row("reason", f"{found['error']} [{found['error-id']}]")] if "error" in found else []


def _status(one: Mapping[str, Any]) -> str:
    error_id = one.get("error-id")
    return f"{one['status']} [{error_id}]" if error_id else str(one["status"])


def _short_ids(ids: Sequence[str]) -> dict[str, str]:
    """Return as much of each id as `report` needs to find it."""
    length = SHORT_ID
    while len({one[:length] for one in ids}) < len(set(ids)):
        length += 1
    return {one: one[:length] for one in ids}


def _local(wall: str) -> str:
    return datetime.fromisoformat(wall).astimezone().strftime("%Y-%m-%d %H:%M:%S")
