"""What is said when there is nothing more to wait for: the end of a migration, and the state of a machine.

The rule of the file: pure functions from QMP answers to lines of text, or to the object that ``--json`` prints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from migrated.cli.exit_code import ExitCode
from migrated.cli.postcopy import describe_blocktime, describe_faults, next_step
from migrated.cli.progress import describe_convergence, progress_line, read_progress
from migrated.cli.units import format_bytes, format_ms, format_rate

_VERDICTS = {
    ExitCode.DONE: "Migration completed",
    ExitCode.FAILED_SOURCE_OWNS: "Migration {status}; this host still owns the machine",
    ExitCode.FAILED_DESTINATION_OWNS: "Migration {status}; the destination owns the machine",
    ExitCode.OWNERSHIP_UNKNOWN: "Migration {status}; it is unknown which host owns the machine",
}


def report_object(info: Mapping[str, Any], code: ExitCode) -> dict[str, Any]:
    """The end of a migration for programs; times in ms, sizes in bytes, members missing where they are unknown."""
    ram: Mapping[str, Any] = info.get("ram", {})
    members: dict[str, Any] = {
        "status": info.get("status"),
        "exit-code": int(code),
        "outcome": _outcome(info, code),
        "error": info.get("error-desc"),
        "error-id": info.get("x-migrated-error", {}).get("id"),
        "blockers": info.get("x-migrated-blockers"),
        "migration-id": info.get("x-migrated-migration-id"),
        "peer": info.get("x-migrated-peer"),
        "total-time": info.get("total-time"),
        "setup-time": info.get("setup-time"),
        "downtime": info.get("downtime"),
        "downtime-split": info.get("x-migrated-downtime") or None,
        "passes": info.get("x-migrated-passes"),
        "transferred": ram.get("transferred"),
        "ram": ram.get("total"),
        "throughput": throughput_bps(info),
        "faults": info.get("x-migrated-faults"),
        "convergence": info.get("x-migrated-convergence"),
    }
    return {name: value for name, value in members.items() if value is not None}


def report_lines(info: Mapping[str, Any], code: ExitCode, ownership: Mapping[str, Any]) -> list[str]:
    """The end of a migration for people, and what they may do next."""
    lines = [_VERDICTS[code].format(status=info.get("status"))]
    if peer := info.get("x-migrated-peer", {}).get("address"):
        lines[0] += f" (peer {peer})"
    lines += reason_lines(info, ownership) + figure_lines(info)
    convergence = info.get("x-migrated-convergence", {})
    if code is not ExitCode.DONE and not convergence.get("converging", True):
        lines.append(row("convergence", describe_convergence(convergence)))
    return lines + next_step_lines(ownership) if code else lines


def figure_lines(info: Mapping[str, Any], passes_left_out: int = 0) -> list[str]:
    """How long it took and how much went over, as far as that is known."""
    lines = []
    if "total-time" in info:
        lines.append(row("total time", format_ms(info["total-time"])))
    if "downtime" in info:
        lines.append(row("downtime", _downtime(info)))
    if passes := info.get("x-migrated-passes"):
        lines.append(row("passes", _passes(passes, passes_left_out)))
    if (ram := info.get("ram")) and ram.get("total"):
        lines.append(row("transferred", f"{format_bytes(ram['transferred'])} for {format_bytes(ram['total'])} of RAM"))
    if (rate := throughput_bps(info)) is not None:
        lines.append(row("throughput", format_rate(rate)))
    return lines + _fault_lines(info)


def arrival_object(info: Mapping[str, Any], code: ExitCode, status: Mapping[str, Any]) -> dict[str, Any]:
    """The end of a load for programs."""
    members: dict[str, Any] = {
        "status": info.get("status"),
        "exit-code": int(code),
        "error": info.get("error-desc"),
        "error-id": info.get("x-migrated-error", {}).get("id"),
        "peer": info.get("x-migrated-peer"),
        "total-time": info.get("total-time"),
        "ram": info.get("ram", {}).get("total"),
        "run-state": status.get("status"),
    }
    return {name: value for name, value in members.items() if value is not None}


def arrival_lines(
    info: Mapping[str, Any], code: ExitCode, status: Mapping[str, Any], ownership: Mapping[str, Any]
) -> list[str]:
    """The end of a load for people, and what they may do next."""
    peer = info.get("x-migrated-peer", {}).get("address", "the source")
    if code is ExitCode.DONE:
        lines = [f"The machine is here, loaded from {peer}; it is {status.get('status')}"]
    else:
        lines = [f"The machine was not loaded from {peer}", *reason_lines(info, ownership)]
    if "total-time" in info:
        lines.append(row("total time", format_ms(info["total-time"])))
    if total := info.get("ram", {}).get("total"):
        lines.append(row("memory", format_bytes(total)))
    return lines + next_step_lines(ownership) if code else lines


def release_object(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What `release` did, from two answers of x-migrated-query-machine."""
    kept = [{"name": one["name"], "workloads": one["workloads"]} for one in after.get("blocks", ())]
    still = {one["name"] for one in kept}
    return {"released": [one["name"] for one in before.get("blocks", ()) if one["name"] not in still], "kept": kept}


def release_lines(done: Mapping[str, Any]) -> list[str]:
    """The same for people."""
    lines = [f"Released the memory of block {name}" for name in done["released"]]
    lines += [
        f"Kept block {one['name']}: {_by(one['workloads'])} still maps it; end the workload, then release again"
        for one in done["kept"]
    ]
    return lines or ["There is no memory to release"]


def next_step_lines(ownership: Mapping[str, Any]) -> list[str]:
    """What the operator may safely do next, where there is anything to do."""
    step = ownership.get("next-step")
    return [row("next step", step)] if step and step != "nothing" else []


def throughput_bps(info: Mapping[str, Any]) -> int | None:
    """Bytes sent per second over the whole migration, setup excluded; None where it cannot be told."""
    duration_ms = info.get("total-time", 0) - info.get("setup-time", 0)
    sent_bytes = int(info.get("ram", {}).get("transferred", 0))
    return sent_bytes * 1000 // duration_ms if duration_ms > 0 and sent_bytes else None


def status_lines(
    status: Mapping[str, Any], machine: Mapping[str, Any], ownership: Mapping[str, Any], info: Mapping[str, Any]
) -> list[str]:
    """A machine's state for people; ``machine`` and ``ownership`` are empty where the socket is a QEMU's."""
    lines = [row("machine", f"{machine.get('name') or '(unnamed)'}, {status.get('status')}")]
    lines += [
        row("block", f"{block['name']}, {format_bytes(block['size'])}, {_by(block['workloads'])}")
        for block in machine.get("blocks", ())
    ]
    lines += [
        row("device", f"{device['id']}, instance {device['instance-id']}, {_by([device['workload']])}")
        for device in machine.get("devices", ())
    ]
    lines += [
        row(
            "kept", f"{one['id']}, instance {one['instance-id']}, {format_bytes(one['size'])}, for a host that knows it"
        )
        for one in info.get("x-migrated-kept-sections", ())
    ]
    if ownership:
        lines.append(row("ownership", f"{ownership.get('record')}: {ownership.get('text')}"))
    if (step := next_step(info, str(status.get("status")))) is not None:
        lines.append(row("next step", step))  # the record does not know how far the migration is
    else:
        lines += next_step_lines(ownership)
    lines += [row("waiting at", format_address(address)) for address in info.get("socket-address", ())]
    lines.append(row("migration", progress_line(read_progress(info))))
    lines += _fault_lines(info)
    return lines + reason_lines(info, ownership)


def recovery_lines(info: Mapping[str, Any]) -> list[str]:
    """Where a paused destination waits, and what is to be done at the source."""
    addresses = [format_address(address) for address in info.get("socket-address", ())]
    if not addresses:
        return ["The source has no address to come to. Next: 'migratectl recover URI' here"]
    lines = [f"Waiting for the source at {address}" for address in addresses]
    if re.match(r"tcp:(0\.0\.0\.0|\[::\]):", addresses[0]):
        port = addresses[0].rpartition(":")[2]
        return [*lines, row("next step", f"at the source: `migratectl recover tcp:THIS-HOST:{port}`")]
    return [*lines, row("next step", f"at the source: `migratectl recover {addresses[0]}`")]


def format_address(address: Mapping[str, Any]) -> str:
    """A QMP SocketAddress as a migration URI."""
    match address.get("type"):
        case "inet":
            host = str(address.get("host", ""))
            return f"tcp:{f'[{host}]' if ':' in host else host}:{address.get('port')}"
        case "unix":
            return f"unix:{address.get('path')}"
        case kind:
            return f"{kind}:{address.get('str', '')}"


def reason_lines(info: Mapping[str, Any], ownership: Mapping[str, Any]) -> list[str]:
    """Why it failed, without the next step, which has a line of its own."""
    if blockers := info.get("x-migrated-blockers"):
        return blocker_lines(blockers)
    reason = str(info.get("error-desc") or "").removesuffix(f". Next: {ownership.get('next-step')}")
    error_id = info.get("x-migrated-error", {}).get("id")
    return [row("reason", f"{reason} [{error_id}]" if error_id else reason)] if reason else []


def blocker_lines(blockers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands in the way of a migration, each with what takes it away."""
    lines = []
    for one in blockers:
        lines.append(row("warning" if one["warning"] else "blocker", f"{one['side']}: {one['text']} [{one['id']}]"))
        lines.append(row("", f"next: {one['next-step']}"))
    return lines


def preflight_lines(verdict: Mapping[str, Any], uri: str) -> list[str]:
    """What both sides say before anything moves."""
    blockers = verdict["blockers"]
    if verdict["ready"]:
        lines = [f"Ready: nothing stands in the way of a migration to {uri}"]
    else:
        count = sum(not one["warning"] for one in blockers)
        lines = [f"Not ready: {count} {'blocker' if count == 1 else 'blockers'} to a migration to {uri}"]
    if (destination := verdict.get("destination")) is not None:
        lines.append(row("destination", f"{destination['name']}, {destination['tool']}"))
    elif verdict["ready"]:
        lines.append(row("note", "the peer does not know how to be asked: only this side was checked"))
    return lines + blocker_lines(blockers)


def _fault_lines(info: Mapping[str, Any]) -> list[str]:
    """What postcopy has cost, where there was one."""
    lines = [row("faults", describe_faults(info["x-migrated-faults"]))] if "x-migrated-faults" in info else []
    blocktime = describe_blocktime(info)
    return [*lines, row("blocked", blocktime)] if blocktime else lines


def not_needed_lines(info: Mapping[str, Any], code: ExitCode, *, wanted: bool) -> list[str]:
    """Say that a postcopy which was asked for did not take place. A QEMU's faults are not known."""
    if not wanted or code is not ExitCode.DONE or "x-migrated-faults" in info or "x-migrated-passes" not in info:
        return []
    return [row("postcopy", "not needed: what was left fitted the downtime limit")]


def _outcome(info: Mapping[str, Any], code: ExitCode) -> str:
    if code is ExitCode.DONE:
        return "destination-owns"
    return str(info.get("x-migrated-outcome", "source-owns"))


def _downtime(info: Mapping[str, Any]) -> str:
    split = info.get("x-migrated-downtime", {})
    parts = " + ".join(f"{name} {format_ms(part_ms)}" for name, part_ms in split.items())
    return format_ms(info["downtime"]) + (f" = {parts}" if parts else "")


def _passes(passes: Sequence[Mapping[str, Any]], left_out: int) -> str:
    """The first and the last few passes tell the story; a machine that does not converge makes hundreds."""
    sizes = [format_bytes(one["sent-bytes"]) for one in passes]
    if len(sizes) > 6:
        sizes[3:-2] = ["..."]
    return f"{len(passes) + left_out} ({', '.join(sizes)})"


def _by(workloads: Sequence[str]) -> str:
    return f"workload {', '.join(workloads)}" if workloads else "no workload"


def row(name: str, value: object) -> str:
    """A line of a report."""
    return f"  {name:<12} {value}"
