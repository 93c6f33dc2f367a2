"""Arguments that QEMU 7.2 refuses, and the sentences in which it does.

The rule of the file: every row holds for a real QEMU 7.2 (`tests/interop/test_qmp_dialect.py` asks one) and for this
daemon (`tests/unit/control/test_commands.py`).
"""

from __future__ import annotations

from typing import Any

REFUSED_ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("migrate", {}, "Parameter 'uri' is missing"),
    ("migrate", {"uri": 1}, "Invalid parameter type for 'uri', expected: string"),
    ("migrate", {"uri": None}, "Invalid parameter type for 'uri', expected: string"),
    ("migrate", {"uri": ["x"]}, "Invalid parameter type for 'uri', expected: string"),
    ("migrate", {"uri": "x:y", "resume": 1}, "Invalid parameter type for 'resume', expected: boolean"),
    ("migrate", {"uri": "x:y", "bogus": 1}, "Parameter 'bogus' is unexpected"),
    ("stop", {"x": 1}, "Parameter 'x' is unexpected"),
    ("snapshot-save", {}, "Parameter 'job-id' is missing"),
    ("snapshot-load", {"job-id": "a", "tag": 1}, "Invalid parameter type for 'tag', expected: string"),
    ("job-cancel", {}, "Parameter 'id' is missing"),
    ("getfd", {"fdname": 3}, "Invalid parameter type for 'fdname', expected: string"),
    ("closefd", {}, "Parameter 'fdname' is missing"),
    ("migrate-continue", {"state": "foo"}, "Parameter 'state' does not accept value 'foo'"),
    ("migrate-continue", {"state": 3}, "Invalid parameter type for 'state', expected: string"),
    ("migrate-set-capabilities", {}, "Parameter 'capabilities' is missing"),
    ("migrate-set-capabilities", {"capabilities": {}}, "Invalid parameter type for 'capabilities', expected: array"),
    (
        "migrate-set-capabilities",
        {"capabilities": [3]},
        "Invalid parameter type for 'capabilities[0]', expected: object",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "foo", "state": True}]},
        "Parameter 'capability' does not accept value 'foo'",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "events", "state": True}, {"capability": 1, "state": True}]},
        "Invalid parameter type for 'capabilities[1].capability', expected: string",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "events", "state": 1}]},
        "Invalid parameter type for 'capabilities[0].state', expected: boolean",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "events"}]},
        "Parameter 'capabilities[0].state' is missing",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "events", "state": True, "z": 1}]},
        "Parameter 'capabilities[0].z' is unexpected",
    ),
    ("migrate-set-parameters", {"downtime-limit": "x"}, "Parameter 'downtime-limit' expects uint64"),
    ("migrate-set-parameters", {"downtime-limit": 1.5}, "Parameter 'downtime-limit' expects uint64"),
    ("migrate-set-parameters", {"downtime-limit": True}, "Parameter 'downtime-limit' expects uint64"),
    ("migrate-set-parameters", {"max-bandwidth": 2**64}, "Parameter 'max-bandwidth' expects uint64"),
    ("migrate-set-parameters", {"max-bandwidth": -(2**63) - 1}, "Parameter 'max-bandwidth' expects uint64"),
    (
        "migrate-set-parameters",
        {"downtime-limit": -5},
        "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms",
    ),
    ("migrate-set-parameters", {"multifd-channels": 256}, "Parameter 'multifd-channels' expects uint8_t"),
    ("migrate-set-parameters", {"multifd-channels": -1}, "Parameter 'multifd-channels' expects uint8_t"),
    ("migrate-set-parameters", {"multifd-channels": "3"}, "Parameter 'multifd-channels' expects uint64"),
    ("migrate-set-parameters", {"x-checkpoint-delay": -1}, "Parameter 'x-checkpoint-delay' expects uint32_t"),
    (
        "migrate-set-parameters",
        {"multifd-compression": "x"},
        "Parameter 'multifd-compression' does not accept value 'x'",
    ),
    (
        "migrate-set-parameters",
        {"cpu-throttle-tailslow": "x"},
        "Invalid parameter type for 'cpu-throttle-tailslow', expected: boolean",
    ),
    ("migrate-set-parameters", {"tls-creds": 3}, "Invalid parameter type for 'tls-creds', expected: StrOrNull"),
    ("migrate-set-parameters", {"foo": 3}, "Parameter 'foo' is unexpected"),
    ("migrate-set-parameters", {"downtime_limit": 3}, "Parameter 'downtime_limit' is unexpected"),
]
