"""`migratectl snapshot`: save, load, delete, list, verify.

The rule of the file: what takes long is a job of the daemon, followed here to its end and then dismissed; `verify` asks
nobody, it reads the files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from migrated.cli.display import choose_display
from migrated.cli.exit_code import ExitCode
from migrated.cli.progress import Progress
from migrated.cli.session import Json, daemon, if_known, unknown_when_lost
from migrated.cli.units import format_bytes
from migrated.cli.watch import counted_interrupts, wait_for_job
from migrated.control.client import QmpClient
from migrated.errors import MigratedError

snapshot = typer.Typer(
    name="snapshot",
    help="Save the machine to a file and bring it back.\n\nExit codes: 0 done, 2 usage, 3 refused, 4 failed and the"
    " machine is as it was (verify: damaged), 6 failed and no machine is here any more, 130 interrupted.",
    no_args_is_help=True,
)

Tag = Annotated[str, typer.Argument(help="Name of the snapshot.")]


@dataclass(frozen=True, slots=True)
class Words:
    """How a job is spoken of."""

    command: str
    done: str
    failed: str


SAVE = Words("snapshot-save", "Saved", "not saved")
LOAD = Words("snapshot-load", "Loaded", "not loaded")
DELETE = Words("snapshot-delete", "Deleted", "not deleted")


@snapshot.command()
def save(ctx: typer.Context, tag: Tag, as_json: Json = False) -> None:
    """Save the machine, which stands still meanwhile, as TAG. Ctrl-C cancels."""
    _run(ctx, as_json, SAVE, tag)


@snapshot.command()
def load(ctx: typer.Context, tag: Tag, as_json: Json = False) -> None:
    """Replace the machine of this host by the snapshot TAG. Ctrl-C cancels as long as nothing is overwritten."""
    _run(ctx, as_json, LOAD, tag)


@snapshot.command()
def delete(ctx: typer.Context, tag: Tag, as_json: Json = False) -> None:
    """Delete the snapshot TAG."""
    _run(ctx, as_json, DELETE, tag)


@snapshot.command("list")
def list_snapshots(ctx: typer.Context, as_json: Json = False) -> None:
    """Show what there is."""
    with daemon(ctx, as_json) as (client, output):
        found = client.execute("x-migrated-query-snapshots")
        output.result(found, [_line(one) for one in found] or ["There are no snapshots"])


@snapshot.command()
def verify(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="Directory of the snapshot, as 'list' shows it.")],
    as_json: Json = False,
) -> None:
    """Compare every byte of a snapshot with its manifest. No daemon is needed."""
    from migrated.cli.output import Output
    from migrated.migration.snapshot_verify import verify_snapshot

    output = Output(as_json or ctx.obj.as_json)
    if not path.is_dir():
        output.refusal(MigratedError(f"{path} is not the directory of a snapshot"))
        raise typer.Exit(ExitCode.REFUSED)
    try:
        manifest = verify_snapshot(path)
    except MigratedError as error:
        output.refusal(error)
        raise typer.Exit(ExitCode.FAILED_SOURCE_OWNS) from error
    value = {"path": str(path), "verified": True, "bytes": manifest.length, "chunks": len(manifest.chunks)}
    output.result(value, [f"{path} is whole: {format_bytes(manifest.length)} in {len(manifest.chunks)} chunks"])


def _run(ctx: typer.Context, as_json: bool, words: Words, tag: str) -> None:
    """Have the daemon do a job, follow it, and report."""
    job_id = f"migratectl-{os.getpid()}"
    with daemon(ctx, as_json) as (client, output), counted_interrupts() as interrupts:
        client.execute(words.command, {"job-id": job_id, "tag": tag})
        with unknown_when_lost(output, "job"), choose_display(output.as_json) as display:
            job = wait_for_job(client, job_id, lambda job: display.update(read_job(job)), interrupts, display.note)
        if job["status"] != "concluded":
            output.result(job, [f"The job goes on; 'query-jobs' shows how, as '{job_id}'"])
            raise typer.Exit(ExitCode.INTERRUPTED)
        client.execute("job-dismiss", {"id": job_id})
        code = _judge(client, job)
        value = {"tag": tag, "job": job, "exit-code": int(code)}
        if error := job.get("error"):
            error += f" [{job['x-migrated-error']['id']}]" if "x-migrated-error" in job else ""
        output.result(value, [f"{words.done} '{tag}'" if error is None else f"'{tag}' was {words.failed}: {error}"])
        raise typer.Exit(code)


def _judge(client: QmpClient, job: Mapping[str, Any]) -> ExitCode:
    if "error" not in job:
        return ExitCode.DONE
    in_part = if_known(client, "x-migrated-query-ownership").get("record") == "partial"
    return ExitCode.OWNERSHIP_UNKNOWN if in_part else ExitCode.FAILED_SOURCE_OWNS


def read_job(job: Mapping[str, Any]) -> Progress:
    """Pick the figures out of a line of query-jobs. A total of 1 says that nothing is known yet, or counted at all."""
    done, total = job["current-progress"], job["total-progress"] if job["total-progress"] > 1 else 0
    return Progress(
        status=f"{job['type']} {job['status']}", passes=0, transferred_bytes=done, remaining_bytes=max(total - done, 0),
        total_bytes=total, dirty_bps=0, bandwidth_bps=0, expected_downtime_ms=None, eta_ms=None, throttle_percent=0,
        faults="", warning="",
    )  # fmt: skip


def _line(one: Mapping[str, Any]) -> str:
    if "error" in one:
        return f"{one['tag']}: {one['error']} ({one['path']})"
    blocks = ", ".join(f"{block['name']} {format_bytes(block['size'])}" for block in one["blocks"])
    return (
        f"{one['tag']}: {one['machine']}, {one['status']}, {one['created']}, {format_bytes(one['size'])}"
        f" ({blocks or 'no memory'}), {one['path']}"
    )
