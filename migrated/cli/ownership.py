"""Who owns the machine: what the record on this host's disk says, and the commands that act on what it says.

The rule of the file: reading needs neither a daemon nor a peer, and says no more than the record does. Who settles
something by his word is told what that may cost. What reads the record is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from migrated.cli.exit_code import ExitCode
from migrated.cli.output import Output
from migrated.cli.report import next_step_lines, release_lines, release_object, row
from migrated.cli.session import Json, State, daemon
from migrated.errors import ConfigError

UNKNOWN = "unknown"
#: What a record says about the owner. One that is not here was written by a newer version.
_OWNERS = {
    "owner": "this host",
    "incomplete": "this host",
    "moved": "the other host",
    "none": "nobody",
    "partial": "nobody",
}


def whoowns(ctx: typer.Context, state: State = None, as_json: Json = False) -> None:
    """Say who owns the machine, from the record on this host's disk alone. Exit code 6: the record does not know."""
    output = Output(as_json or ctx.obj.as_json)
    try:
        ownership = read_ownership(state or ctx.obj.state)
    except ConfigError as error:
        output.refusal(error)
        raise typer.Exit(ExitCode.REFUSED) from error
    output.result(ownership, ownership_lines(ownership))
    raise typer.Exit(owner_code(ownership))


def release(ctx: typer.Context, as_json: Json = False) -> None:
    """Let go of the memory of a machine that has moved away."""
    with daemon(ctx, as_json) as (client, output):
        before = client.execute("x-migrated-query-machine")
        client.execute("x-migrated-release")
        done = release_object(before, client.execute("x-migrated-query-machine"))
        output.result(done, release_lines(done))


def resolve(
    ctx: typer.Context,
    peer_is_fenced: Annotated[
        bool, typer.Option("--peer-is-fenced", help="I made sure that the other host cannot run the machine.")
    ] = False,
    peer_is_running: Annotated[
        bool, typer.Option("--peer-is-running", help="I have seen that the machine runs at the other host.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Settle an unknown outcome by your word. A wrong word means two running copies, or a lost machine."""
    if peer_is_fenced == peer_is_running:
        raise typer.BadParameter("say exactly one of --peer-is-fenced and --peer-is-running")
    arguments = {"peer-is-fenced": peer_is_fenced, "peer-is-running": peer_is_running}
    with daemon(ctx, as_json) as (client, output):
        before = client.execute("x-migrated-query-ownership")
        client.execute("x-migrated-resolve", arguments)
        lost = may_be_lost(before["record"], before.get("peer", ""), peer_is_fenced=peer_is_fenced)
        after = client.execute("x-migrated-query-ownership")
        lines = [f"Settled by your word: {after['text']}", row("may be lost", lost), *next_step_lines(after)]
        output.result({"ownership": after, "may-be-lost": lost}, lines)


def read_ownership(state: Path) -> dict[str, object]:
    """Return what the record in a state directory says, as x-migrated-query-ownership does. Raises ConfigError."""
    if not state.is_dir():
        raise ConfigError(str(state), "", "there is no such state directory. Next: say where it is (--state DIR)")
    from migrated.daemon.record import FileRecordStore
    from migrated.migration.ownership import Ownership

    store = FileRecordStore(state)
    ownership = Ownership(store).as_dict()
    owner = _OWNERS.get(str(ownership["record"]), UNKNOWN)
    return {**ownership, "owner": owner, "state": str(state), "written": store.read() is not None}


def owner_code(ownership: Mapping[str, Any]) -> ExitCode:
    """Return 6 where the record does not know."""
    return ExitCode.OWNERSHIP_UNKNOWN if ownership["owner"] == UNKNOWN else ExitCode.DONE


def ownership_lines(ownership: Mapping[str, Any]) -> list[str]:
    """What the record says, for people."""
    lines = [row("owner", ownership["owner"]), row("record", f"{ownership['record']}: {ownership['text']}")]
    if not ownership["written"]:
        lines.append(row("note", f"no daemon has ever written a record in {ownership['state']}"))
    lines.append(row("epoch", ownership["epoch"]))
    if peer := ownership.get("peer"):
        lines.append(row("peer", peer))
    if migration_id := ownership.get("migration-id"):
        lines.append(row("migration", migration_id))
    return lines + next_step_lines(ownership)


def may_be_lost(record: str, peer: str, *, peer_is_fenced: bool) -> str:
    """Say what an operator's word about an unknown outcome may cost."""
    peer = peer or "the other host"
    if not peer_is_fenced:
        return (
            f"nothing, if the machine really runs at {peer}; if it does not, it runs nowhere, and the memory here,"
            " which is complete, is given up with the next machine that arrives"
        )
    if record == "released":
        return (
            f"if the machine had begun to run at {peer}: everything that it has done and acknowledged there since; if"
            " it ever runs there again, there are two of it"
        )
    return f"nothing, if {peer} really does not run the machine; if it does, there are two of it from now on"
