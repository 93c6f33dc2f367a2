"""`migratectl pki`: keys for hosts that are to know each other, without a CA of one's own.

The rule of the file: no daemon is asked, but by `check`, and that one as any peer would.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from migrated.cli.exit_code import ExitCode
from migrated.cli.output import Output
from migrated.cli.session import Json
from migrated.errors import MigratedError

#: Where everything is, by default; the daemon looks for `pki` here.
ROOT = Path("/etc/migrated")
CHECK_TIMEOUT_S = 10.0
DEFAULT_PORT = 7400

pki = typer.Typer(
    name="pki",
    help="Give hosts keys by which they know each other.\n\nExit codes: 0 done, 2 usage, 3 refused, 4 the other host"
    " and this one do not trust each other (check).",
    no_args_is_help=True,
)

Names = Annotated[
    list[str] | None, typer.Option("--name", "-n", help="Further DNS name or IP address of that host; may be repeated.")
]
Ca = Annotated[Path, typer.Option(help="Directory of the CA.")]
Days = Annotated[float, typer.Option(min=0.01, max=3650, help="How long the certificate is good for.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace what is there.")]


@pki.command()
def init(
    ctx: typer.Context,
    host: Annotated[str, typer.Argument(help="DNS name or IP address of this host; default: its host name.")] = "",
    names: Names = None,
    ca: Ca = ROOT / "ca",
    output_dir: Annotated[Path, typer.Option("--out", help="Where this host's keys go.")] = ROOT / "pki",
    days: Days = 825,
    as_json: Json = False,
) -> None:
    """Make a CA on this host, and keys for this host."""
    from migrated.cli.authority import create_authority

    host = host or socket.gethostname()
    with _refused(ctx, as_json) as output:
        create_authority(ca, f"migrated CA of {host}")
        _issue(output, ca, output_dir, host, names, days, replace=False, here=True)


@pki.command()
def issue(
    ctx: typer.Context,
    host: Annotated[str, typer.Argument(help="DNS name or IP address of the host.")],
    names: Names = None,
    ca: Ca = ROOT / "ca",
    output_dir: Annotated[
        Path | None, typer.Option("--out", help="Where its keys go; default: /etc/migrated/issued/HOST.")
    ] = None,
    days: Days = 825,
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Make keys for a host, as a directory that becomes /etc/migrated/pki there."""
    with _refused(ctx, as_json) as output:
        # Keys that wait to be copied to another host are nobody's here.
        here = output_dir is not None
        _issue(output, ca, output_dir or ca.parent / "issued" / host, host, names, days, replace=replace, here=here)


@pki.command()
def show(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(help="Directory with keys.")] = ROOT / "pki",
    as_json: Json = False,
) -> None:
    """Show the certificates of a directory, and whether they could be used now."""
    from migrated.transport.credentials import load_credentials

    with _refused(ctx, as_json) as output:
        found = load_credentials(directory).certificates
        now = datetime.now(UTC)
        output.result(
            {
                name: {
                    "subject": one.subject,
                    "issuer": one.issuer,
                    "names": list(one.names),
                    "not-before": one.not_before.isoformat(),
                    "not-after": one.not_after.isoformat(),
                    "days-left": (one.not_after - now).days,
                }
                for name, one in found.items()
            },
            [f"{name}: {one}, {(one.not_after - now).days} days left" for name, one in found.items()],
        )


@pki.command()
def check(
    ctx: typer.Context,
    host: Annotated[
        str, typer.Argument(help=f"HOST or HOST:PORT of a daemon that waits (default port {DEFAULT_PORT}).")
    ],
    directory: Annotated[Path, typer.Option(help="Directory with this host's keys.")] = ROOT / "pki",
    name: Annotated[str, typer.Option("--tls-hostname", help="The name its certificate has to be for.")] = "",
    as_json: Json = False,
) -> None:
    """Meet the daemon at HOST as a source would, and say whether each trusts the other. Nothing is migrated."""
    import asyncio

    from migrated.errors import ChannelError, TlsError

    output = Output(as_json or ctx.obj.as_json)
    try:
        certificate = asyncio.run(_meet(host, directory, name))
    except ChannelError as error:
        problem = error.problem if isinstance(error, TlsError) else ""
        output.result({"trusted": False, "problem": problem, "error": str(error)}, [f"{host}: {error}"])
        raise typer.Exit(ExitCode.FAILED_SOURCE_OWNS) from error
    except MigratedError as error:
        output.refusal(error)
        raise typer.Exit(ExitCode.REFUSED) from error
    output.result(
        {"trusted": True, "names": list(certificate.names), "not-after": certificate.not_after.isoformat()},
        [f"{host} and this host trust each other: it is {certificate}"],
    )


async def _meet(host: str, directory: Path, name: str) -> Any:
    from migrated.transport.address import TcpAddress, parse_address
    from migrated.transport.credentials import ALPN_CHECK, load_credentials
    from migrated.transport.dial import dial
    from migrated.transport.tls_channel import TlsChannel
    from migrated.transport.trust import Trust

    has_port = host.rpartition("]")[2].count(":") == 1
    address = parse_address(f"tcp:{host}" if has_port else f"tcp:{host}:{DEFAULT_PORT}")
    assert isinstance(address, TcpAddress)
    trust = Trust(load_credentials(directory, alpn=ALPN_CHECK))
    channel = await dial(address, timeout_s=CHECK_TIMEOUT_S, fds=int, trust=trust, name=name)
    assert isinstance(channel, TlsChannel)
    await channel.close()
    return channel.certificate


def _issue(
    output: Output,
    ca: Path,
    directory: Path,
    host: str,
    names: list[str] | None,
    days: float,
    *,
    replace: bool,
    here: bool,
) -> None:
    from migrated.cli import authority
    from migrated.transport.credentials import read_certificate

    authority.issue(
        authority.open_authority(ca), directory, host, names or (), replace=replace, validity=authority.from_now(days)
    )
    certificate = read_certificate(directory / "server-cert.pem")
    owned = here and authority.give_to_service(directory)
    value = {
        "directory": str(directory),
        "names": list(certificate.names),
        "not-after": certificate.not_after.isoformat(),
    }
    lines = [
        f"Issued {certificate}",
        f"  in {directory}" + (f", readable by group {authority.SERVICE_GROUP}" if owned else ""),
    ]
    output.result(value, lines)


@contextmanager
def _refused(ctx: typer.Context, as_json: bool) -> Iterator[Output]:
    output = Output(as_json or ctx.obj.as_json)
    try:
        yield output
    except MigratedError as error:
        output.refusal(error)
        raise typer.Exit(ExitCode.REFUSED) from error
