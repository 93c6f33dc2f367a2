"""From QMP answers to words and numbers: the pure half of `migratectl`."""

from __future__ import annotations

from typing import Any

import pytest

from migrated.cli.exit_code import ExitCode, exit_code_of
from migrated.cli.progress import progress_line, read_progress
from migrated.cli.report import (
    arrival_lines,
    arrival_object,
    format_address,
    release_lines,
    release_object,
    report_lines,
    report_object,
    status_lines,
    throughput_bps,
)
from migrated.cli.settings import format_value, parse_switches, parse_values
from migrated.cli.units import format_bytes, format_ms, format_rate, parse_size
from migrated.demo.app import describe

QEMU_ACTIVE: dict[str, Any] = {
    "status": "active", "total-time": 500, "setup-time": 0, "expected-downtime": 300, "cpu-throttle-percentage": 20,
    "ram": {"total": 1 << 20, "remaining": 1 << 19, "transferred": 1 << 19, "page-size": 4096, "mbps": 8.0,
            "dirty-pages-rate": 256, "dirty-sync-count": 3},
}  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1024, "1 KiB"), (1536, "1.50 KiB"), (10 << 20, "10 MiB"),
        (123456789, "118 MiB"), (1 << 30, "1 GiB"), (1 << 62, "4 EiB"), (1 << 75, "32768 EiB"),
    ],
)  # fmt: skip
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text
    assert format_rate(count) == text + "/s"


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0 ms"), (0.4213, "0.42 ms"), (41.23, "41.2 ms"), (999.4, "999 ms"), (2310, "2.31 s"), (119_900, "120 s"),
        (185_000, "3 min 05 s"),
    ],
)  # fmt: skip
def test_durations(ms: float, text: str) -> None:
    assert format_ms(ms) == text


def test_sizes_as_operators_write_them() -> None:
    assert [parse_size(text) for text in ("0", "4096", "512M", "2g", "1KiB", "3 ".strip(), "1TB")] == [
        0, 4096, 512 << 20, 2 << 30, 1024, 3, 1 << 40,
    ]  # fmt: skip
    for text in ("", "-1", "1.5G", "x", "1Q", "1 G"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)


def test_settings_are_written_as_they_are_read() -> None:
    assert parse_switches(["a=on", "b=OFF", "c=yes"]) == {"a": True, "b": False, "c": True}
    current = {"flag": False, "size": 1, "text": ""}
    parsed = parse_values(["flag=on", "size=2K", "text=a=b", "new=1"], current)
    assert parsed == {"flag": True, "size": 2048, "text": "a=b", "new": "1"}
    assert [format_value(value) for value in (True, False, 3, "x")] == ["on", "off", "3", "x"]
    with pytest.raises(ValueError, match="not of the form NAME=VALUE"):
        parse_switches(["oops"])
    with pytest.raises(ValueError, match="flag is on or off, not '1'"):
        parse_values(["flag=1"], current)


def test_progress_of_a_real_qemu() -> None:
    assert progress_line(read_progress(QEMU_ACTIVE)) == (
        "active: 50% of 1 MiB, pass 3, 512 KiB sent, 512 KiB left, 977 KiB/s, dirtied 1 MiB/s, throttled 20 %,"
        " expected downtime 300 ms"
    )


def test_progress_of_nothing() -> None:
    assert progress_line(read_progress({})) == "none"
    assert read_progress({}).fraction == 0.0


@pytest.mark.parametrize(("remaining", "fraction"), [(0, 1.0), (1 << 20, 0.0), (1 << 21, 0.0), (-5, 1.0)])
def test_fraction_stays_between_nothing_and_all(remaining: int, fraction: float) -> None:
    assert read_progress({"ram": {"total": 1 << 20, "remaining": remaining}}).fraction == fraction


def test_warning_without_suggestions_and_without_text() -> None:
    info = {"x-migrated-convergence": {"converging": False}}
    assert read_progress(info).warning == "the migration does not converge"
    assert read_progress({"x-migrated-convergence": {"converging": True, "text": "x"}}).warning == ""


@pytest.mark.parametrize(
    ("info", "code"),
    [
        ({}, None),
        ({"status": "setup"}, None),
        ({"status": "device", "x-migrated-outcome": "unknown"}, None),
        ({"status": "cancelling"}, None),
        ({"status": "postcopy-paused"}, None),
        ({"status": "completed"}, 0),
        ({"status": "completed", "x-migrated-outcome": "destination-owns"}, 0),
        ({"status": "failed"}, 4),
        ({"status": "cancelled", "x-migrated-outcome": "source-owns"}, 4),
        ({"status": "failed", "x-migrated-outcome": "destination-owns"}, 5),
        ({"status": "failed", "x-migrated-outcome": "unknown"}, 6),
    ],
)
def test_exit_codes(info: dict[str, Any], code: int | None) -> None:
    assert exit_code_of(info) == code


def test_report_of_a_real_qemu() -> None:
    info = {**QEMU_ACTIVE, "status": "completed", "downtime": 7}
    assert report_lines(info, ExitCode.DONE, {}) == [
        "Migration completed",
        "  total time   500 ms",
        "  downtime     7 ms",
        "  transferred  512 KiB for 1 MiB of RAM",
        "  throughput   1 MiB/s",
    ]
    assert report_object(info, ExitCode.DONE) == {
        "status": "completed", "exit-code": 0, "outcome": "destination-owns", "total-time": 500, "setup-time": 0,
        "downtime": 7, "transferred": 1 << 19, "ram": 1 << 20, "throughput": 1 << 20,
    }  # fmt: skip


def test_report_of_many_passes_is_short() -> None:
    passes = [{"pass": i, "sent-bytes": i << 20, "dirtied-bytes": 0, "ms": 1.0} for i in range(1, 101)]
    lines = report_lines({"status": "completed", "x-migrated-passes": passes}, ExitCode.DONE, {})
    assert lines[1] == "  passes       100 (1 MiB, 2 MiB, 3 MiB, ..., 99 MiB, 100 MiB)"


@pytest.mark.parametrize(("done", "number"), [(0, 1), (1, 2), (7, 8)])
def test_the_pass_under_way_has_the_number_that_the_demo_gives_it(done: int, number: int) -> None:
    passes = [{"pass": i + 1, "sent-bytes": 0, "dirtied-bytes": 0, "ms": 1.0} for i in range(done)]
    info = {**QEMU_ACTIVE, "x-migrated-passes": passes, "x-migrated-bandwidth-bps": 0, "x-migrated-dirty-rate-bps": 0}
    assert f", pass {number}, " in progress_line(read_progress(info))
    assert f"pass {number} " in describe(info)
    assert read_progress({**info, "status": "completed"}).passes == done


def test_an_incoming_machine_has_no_passes() -> None:
    info = {"status": "active", "ram": {"total": 1 << 20, "remaining": 1 << 19, "transferred": 0}}
    assert "pass" not in progress_line(read_progress(info))


UNKNOWN = {"record": "released", "text": "nobody knows", "next-step": "ask the other host"}


def test_the_next_step_is_said_once() -> None:
    info = {"status": "failed", "error-desc": "reset; nobody knows. Next: ask the other host"}
    report = report_lines(info, ExitCode.OWNERSHIP_UNKNOWN, UNKNOWN)
    assert report[1:] == ["  reason       reset; nobody knows", "  next step    ask the other host"]
    lines = "\n".join(status_lines({"status": "finish-migrate"}, {}, UNKNOWN, info))
    assert lines.count("ask the other host") == 1
    assert "Next:" not in lines


def test_report_of_a_load() -> None:
    info: dict[str, Any] = {
        "status": "completed",
        "x-migrated-peer": {"address": "file:/m", "kind": "unknown"},
        "total-time": 20,
        "ram": {"total": 1 << 20},
    }
    assert arrival_lines(info, ExitCode.DONE, {"status": "running"}, {"next-step": "nothing"}) == [
        "The machine is here, loaded from file:/m; it is running",
        "  total time   20 ms",
        "  memory       1 MiB",
    ]
    failed = {"status": "failed", "error-desc": "not a machine", "x-migrated-peer": {"address": "file:/m"}}
    assert arrival_lines(failed, ExitCode.FAILED_SOURCE_OWNS, {}, {"next-step": "load it again"}) == [
        "The machine was not loaded from file:/m",
        "  reason       not a machine",
        "  next step    load it again",
    ]
    assert arrival_object(info, ExitCode.DONE, {"status": "running"}) == {
        "status": "completed", "exit-code": 0, "peer": info["x-migrated-peer"], "total-time": 20, "ram": 1 << 20,
        "run-state": "running",
    }  # fmt: skip


def test_report_of_a_release() -> None:
    one = {"name": "heap", "workloads": []}
    used = {"name": "log", "workloads": ["kv"]}
    done = release_object({"blocks": [one, used]}, {"blocks": [used]})
    assert done == {"released": ["heap"], "kept": [used]}
    assert release_lines(done) == [
        "Released the memory of block heap",
        "Kept block log: workload kv still maps it; end the workload, then release again",
    ]
    assert release_lines(release_object({"blocks": []}, {"blocks": []})) == ["There is no memory to release"]


def test_throughput_needs_time_and_bytes() -> None:
    assert throughput_bps({}) is None
    assert throughput_bps({"total-time": 5, "setup-time": 5, "ram": {"transferred": 1}}) is None
    assert throughput_bps({"total-time": 5, "ram": {}}) is None


def test_status_of_a_real_qemu() -> None:
    lines = status_lines({"status": "prelaunch"}, {}, {}, {})
    assert lines == ["  machine      (unnamed), prelaunch", "  migration    none"]


def test_addresses_as_uris() -> None:
    assert format_address({"type": "inet", "host": "::", "port": "1"}) == "tcp:[::]:1"
    assert format_address({"type": "vsock", "cid": "1", "port": "2"}) == "vsock:"
