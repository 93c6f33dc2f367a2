"""A call of `migratectl` as its commands see it: the connection to the daemon, and how to speak.

The rule of the file: what a refusal and a lost daemon mean for the exit status is decided here, once for all commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from migrated.cli.exit_code import ExitCode
from migrated.cli.output import Output
from migrated.control.client import QmpClient
from migrated.errors import ChannelError, CommandError, MigratedError

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

State = Annotated[
    Path | None, typer.Option(help="The daemon's state directory ([paths] state); default /var/lib/migrated/MACHINE.")
]


@dataclass(frozen=True, slots=True)
class Options:
    """What stands before the command."""

    socket: str
    as_json: bool
    state: Path
    """Where the daemon keeps the ownership record, if its configuration does not say otherwise."""


@contextmanager
def daemon(
    ctx: typer.Context, as_json: bool, when_lost: Callable[[Output, ChannelError], None] | None = None
) -> Iterator[tuple[QmpClient, Output]]:
    """Connect; whatever the daemon refuses, and a daemon that cannot be reached, ends the program with 3."""
    output = Output(as_json or ctx.obj.as_json)
    try:
        with QmpClient(ctx.obj.socket) as client:
            yield client, output
    except (CommandError, ChannelError) as error:
        if when_lost is not None and isinstance(error, ChannelError):
            when_lost(output, error)
        else:
            output.refusal(error)
        raise typer.Exit(ExitCode.REFUSED) from error
    except ValueError as error:  # a word on the command line that cannot be understood
        raise typer.BadParameter(str(error)) from error


@contextmanager
def unknown_when_lost(output: Output, what: str) -> Iterator[None]:
    """A daemon that is lost while it works ends the program with 6."""
    try:
        yield
    except ChannelError as error:
        output.refusal(MigratedError(f"{error}: how the {what} ended is unknown, ask 'migratectl status'"))
        raise typer.Exit(ExitCode.OWNERSHIP_UNKNOWN) from error


def if_known(client: QmpClient, command: str) -> dict[str, Any]:
    """Run one of our own queries; empty where the socket is a QEMU's."""
    try:
        answer: dict[str, Any] = client.execute(command)
    except CommandError as error:
        if error.qmp_class != "CommandNotFound":
            raise
        return {}
    return answer
