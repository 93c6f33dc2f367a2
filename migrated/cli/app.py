"""`migratectl`: the operator's tool.

The rule of the file: a command is a few calls of the QMP client and one call of `Output`; nothing is decided here that
a script talking QMP could not decide as well. rich and the demo are imported when they are needed, so that a command in
a script costs little.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from migrated.cli.complete import complete_capability, complete_machine, complete_parameter
from migrated.cli.display import choose_display
from migrated.cli.exit_code import ExitCode
from migrated.cli.history import history, report
from migrated.cli.output import Output
from migrated.cli.ownership import ownership_lines, read_ownership, release, resolve, whoowns
from migrated.cli.pki import pki
from migrated.cli.postcopy import (
    AT_ONCE,
    DEFAULT_MOMENT,
    PAUSED_AT_DESTINATION,
    PAUSED_AT_SOURCE,
    Moment,
    Reconnect,
    Switch,
    capability,
    give_value,
    is_postcopy,
    is_source,
    last_address,
    parse_moment,
)
from migrated.cli.progress import progress_line, read_progress
from migrated.cli.report import (
    arrival_lines,
    arrival_object,
    format_address,
    not_needed_lines,
    preflight_lines,
    recovery_lines,
    report_lines,
    report_object,
    status_lines,
)
from migrated.cli.session import Json, Options, State, daemon, if_known, unknown_when_lost
from migrated.cli.settings import format_value, parse_switches, parse_values
from migrated.cli.snapshot import snapshot
from migrated.cli.watch import Errand, Interrupts, counted_interrupts, wait_for_end, wait_for_load
from migrated.control.client import QmpClient
from migrated.errors import ChannelError, ConfigError

app = typer.Typer(
    name="migratectl",
    help="Move running machines between hosts.\n\nExit codes: 0 done, 2 usage, 3 refused, 4 failed and the source still"
    " owns the machine, 5 failed and the destination owns it, 6 ownership unknown, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(snapshot)
app.add_typer(pki)
app.command()(whoowns)
app.command()(release)
app.command()(resolve)
app.command()(history)
app.command()(report)


@app.callback()
def options(
    ctx: typer.Context,
    machine: Annotated[
        str,
        typer.Option(
            help="Name of the machine; its socket is /run/migrated/NAME/qmp.sock.", autocompletion=complete_machine
        ),
    ] = "migrated",
    socket: Annotated[str | None, typer.Option(help="Path of the daemon's control socket.")] = None,
    as_json: Json = False,
) -> None:
    ctx.obj = Options(socket or f"/run/migrated/{machine}/qmp.sock", as_json, Path("/var/lib/migrated", machine))


@app.command()
def status(ctx: typer.Context, state: State = None, as_json: Json = False) -> None:
    """Show the machine, who owns it, and the migration. Without a daemon: what the record says (and exit code 3)."""

    def from_disk(output: Output, error: ChannelError) -> None:
        try:
            ownership = read_ownership(state or ctx.obj.state)
        except ConfigError as unreadable:
            output.refusal(unreadable if state else error)
        else:
            output.refusal(error, {"ownership": ownership})
            output.text(ownership_lines(ownership))

    with daemon(ctx, as_json, from_disk) as (client, output):
        run_state = client.execute("query-status")
        machine = if_known(client, "x-migrated-query-machine") or client.execute("query-name")
        ownership = if_known(client, "x-migrated-query-ownership")
        info = client.execute("query-migrate")
        members = {"status": run_state, "machine": machine, "ownership": ownership, "migration": info}
        output.result(members, status_lines(run_state, machine, ownership, info))


class WithMoment(typer.core.TyperCommand):
    """A command whose option --postcopy may stand alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, give_value(args))


@app.command(cls=WithMoment)
def migrate(
    ctx: typer.Context,
    uri: Annotated[str, typer.Argument(help="tcp:HOST:PORT, unix:PATH, exec:COMMAND, fd:NAME or file:PATH")],
    postcopy: Annotated[
        str | None,
        typer.Option(
            metavar="[=MOMENT]",
            help="Let the machine run at the destination first, its memory follows: at-once, after-pass:N, or"
            f" when-stuck (when it does not converge). Alone: {DEFAULT_MOMENT}.",
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return as soon as it has begun.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only ask both sides what stands in the way. Not for a QEMU: it exits when nothing comes."
        ),
    ] = False,
    request_id: Annotated[
        str, typer.Option(help="The same id twice is one migration: the second call reports how the first one ends.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Move the machine away; wait for the end and report. Ctrl-C cancels, a second one, or one in postcopy, leaves."""
    with daemon(ctx, as_json) as (client, output), counted_interrupts() as interrupts:
        moment = parse_moment(postcopy) if postcopy is not None else None
        if detach and moment not in (None, Moment(AT_ONCE)):
            raise ValueError("nobody waits for the moment with --detach: only --postcopy=at-once goes with it")
        with capability(client, moment is not None):
            if dry_run:
                verdict = client.execute("x-migrated-preflight", {"uri": uri})
                output.result(verdict, preflight_lines(verdict, uri))
                raise typer.Exit(ExitCode.DONE if verdict["ready"] else ExitCode.REFUSED)
            client.execute("migrate", {"uri": uri} | ({"x-migrated-request-id": request_id} if request_id else {}))
            if not detach:
                errand = Switch(client, moment) if moment is not None else None
                raise typer.Exit(_follow(client, output, interrupts, errand))
            if moment is not None:
                client.execute("migrate-start-postcopy")
            output.result({"status": "setup"}, ["Migration started; 'migratectl status' shows how it goes"])


@app.command()
def incoming(
    ctx: typer.Context,
    uri: str,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not wait for the end of a load.")] = False,
    as_json: Json = False,
) -> None:
    """Wait for a machine at URI. From a file or a command it is loaded at once: wait for the end and report."""
    with daemon(ctx, as_json) as (client, output), counted_interrupts() as interrupts:
        earlier = client.execute("query-migrate").get("x-migrated-migration-id")
        client.execute("migrate-incoming", {"uri": uri})
        addresses = client.execute("query-migrate").get("socket-address", [])
        if addresses or detach:
            lines = [f"Waiting at {format_address(one)}" for one in addresses]
            started = "The load has started; 'migratectl status' shows how it goes"
            output.result({"socket-address": addresses}, lines or [started])
            return
        with unknown_when_lost(output, "load"), choose_display(output.as_json) as display:
            code, info = wait_for_load(client, display, interrupts, earlier)
        if code is ExitCode.INTERRUPTED:
            output.result(info, ["The load goes on; 'migratectl status' shows how"])
            raise typer.Exit(code)
        ownership = if_known(client, "x-migrated-query-ownership")
        if code and ownership.get("record") == "accepted":
            code = ExitCode.OWNERSHIP_UNKNOWN
        state = client.execute("query-status")
        output.result(arrival_object(info, code, state), arrival_lines(info, code, state, ownership))
        raise typer.Exit(code)


@app.command()
def cancel(ctx: typer.Context, as_json: Json = False) -> None:
    """Cancel the migration; the machine goes on here."""
    with daemon(ctx, as_json) as (client, output):
        client.execute("migrate_cancel")
        info = client.execute("query-migrate")
        output.result(info, [progress_line(read_progress(info))])


@app.command("start-postcopy")
def start_postcopy(ctx: typer.Context, as_json: Json = False) -> None:
    """Let the migration under way switch to postcopy. The capability postcopy-ram must be on since before it began."""
    _run(ctx, as_json, "migrate-start-postcopy")


@app.command()
def pause(ctx: typer.Context, as_json: Json = False) -> None:
    """Break the connection of a postcopy. The machine stays at the destination, and waits there for missing memory."""
    with daemon(ctx, as_json) as (client, output):
        source = is_source(client.execute("query-migrate"), client.execute("query-status")["status"])
        answer = client.execute("migrate-pause")
        output.result(answer, [PAUSED_AT_SOURCE if source else PAUSED_AT_DESTINATION])


@app.command()
def recover(
    ctx: typer.Context,
    uri: Annotated[str | None, typer.Argument(help="Where to wait, or to connect to; where it was, without.")] = None,
    as_json: Json = False,
) -> None:
    """Go on after a pause: at the destination, wait for the source at URI; at the source, connect to URI and follow."""
    with daemon(ctx, as_json) as (client, output), counted_interrupts() as interrupts:
        info = client.execute("query-migrate")
        if not is_source(info, client.execute("query-status")["status"]):
            if uri is not None or info.get("status") != "postcopy-paused":
                client.execute("migrate-recover", {"uri": uri or ""})
            info = client.execute("query-migrate")
            addresses = info.get("socket-address", [])
            output.result({"socket-address": addresses}, recovery_lines(info))
            return
        if (target := uri or last_address(info)) is None:
            raise ValueError("it is not known how to reach the destination again: say URI")
        errand = Reconnect(client, target)
        if not is_postcopy(info):
            client.execute("migrate", {"uri": target, "resume": True})  # refused, with the daemon's words
        if not output.as_json:
            print(f"Connecting to {target}, which must wait there ('migratectl status' at the destination says where)")
        raise typer.Exit(_follow(client, output, interrupts, errand))


@app.command("continue")
def proceed(ctx: typer.Context, as_json: Json = False) -> None:
    """Go on after the pause before the switchover."""
    _run(ctx, as_json, "migrate-continue", {"state": "pre-switchover"})


@app.command()
def capabilities(
    ctx: typer.Context,
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=on|off", autocompletion=complete_capability)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the capabilities, or switch some, all or none."""
    with daemon(ctx, as_json) as (client, output):
        if switches := parse_switches(changes or ()):
            rows = [{"capability": name, "state": state} for name, state in switches.items()]
            client.execute("migrate-set-capabilities", {"capabilities": rows})
        current = {row["capability"]: row["state"] for row in client.execute("query-migrate-capabilities")}
        output.result(current, _settings(current, switches))


@app.command()
def parameters(
    ctx: typer.Context,
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE", autocompletion=complete_parameter)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the parameters, or set some, all or none. Sizes may end in K, M, G."""
    with daemon(ctx, as_json) as (client, output):
        current = client.execute("query-migrate-parameters")
        if values := parse_values(changes or (), current):
            client.execute("migrate-set-parameters", values)
            current = client.execute("query-migrate-parameters")
        output.result(current, _settings(current, values))


@app.command()
def stop(ctx: typer.Context, as_json: Json = False) -> None:
    """Stop the machine."""
    _run(ctx, as_json, "stop")


@app.command()
def cont(ctx: typer.Context, as_json: Json = False) -> None:
    """Let the machine go on, if this host owns it."""
    _run(ctx, as_json, "cont")


@app.command()
def events(ctx: typer.Context, as_json: Json = False) -> None:
    """Print events as they come, until Ctrl-C or the end of the daemon."""
    with daemon(ctx, as_json) as (client, output):
        try:
            while event := client.next_event():
                output.result(event, [_event_line(event)])
                if event["event"] == "SHUTDOWN":
                    return
        except KeyboardInterrupt:
            return


@app.command()
def demo(
    ctx: typer.Context,
    ram_mib: Annotated[int, typer.Option(min=1, help="Size of the demo machine's memory.")] = 128,
    as_json: Json = False,
) -> None:
    """Move a process that never stops writing between two daemons on this host, and back, and check its memory."""
    from migrated.demo.app import main as run_demo

    raise typer.Exit(run_demo(ram_mib=ram_mib, as_json=as_json or ctx.obj.as_json))


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="migratectl")


def _follow(client: QmpClient, output: Output, interrupts: Interrupts, errand: Errand | None) -> ExitCode:
    """Wait for the end of an outgoing migration, and report."""
    with unknown_when_lost(output, "migration"), choose_display(output.as_json) as display:
        code, info = wait_for_end(client, display, interrupts, errand)
    if code is ExitCode.INTERRUPTED:
        why = "Postcopy cannot be cancelled: the" if is_postcopy(info) else "The"
        output.result(info, [f"{why} migration goes on; 'migratectl status' shows how"])
    else:
        ownership = if_known(client, "x-migrated-query-ownership") if code else {}
        lines = report_lines(info, code, ownership) + not_needed_lines(info, code, wanted=isinstance(errand, Switch))
        output.result(report_object(info, code), lines)
    return code


def _run(ctx: typer.Context, as_json: bool, command: str, arguments: Mapping[str, object] | None = None) -> None:
    """Run a command that has nothing to tell but that it was done."""
    with daemon(ctx, as_json) as (client, output):
        output.result(client.execute(command, arguments))


def _settings(current: dict[str, object], changed: dict[str, Any]) -> list[str]:
    names = changed or current
    return [f"{name}={format_value(current.get(name))}" for name in names]


def _event_line(event: dict[str, Any]) -> str:
    stamp = event["timestamp"]
    at = datetime.fromtimestamp(stamp["seconds"]).astimezone().strftime("%H:%M:%S")
    members = " ".join(f"{name}={format_value(value)}" for name, value in event.get("data", {}).items())
    return f"{at}.{stamp['microseconds'] // 1000:03d} {event['event']} {members}".rstrip()


if __name__ == "__main__":
    main()
