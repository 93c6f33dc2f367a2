"""Who may do what on the control socket: real processes of another user."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from migrated.control.commands import COMMANDS
from migrated.control.server import ControlServer
from tests.support.fake_services import FakeDaemon
from tests.support.open_paths import let_others_in

OPERATORS, WATCHERS, NOBODY = 1, 2, 65534
AS_NOBODY = """
import json, os, sys
from migrated.control.client import QmpClient
from migrated.errors import CommandError
path, groups, commands = json.loads(sys.argv[1])
os.setgroups(groups); os.setgid(65534); os.setuid(65534)
answers = []
try:
    with QmpClient(path) as client:
        for command in commands:
            try:
                client.execute(command)
                answers.append("done")
            except CommandError as error:
                answers.append([error.error_id, str(error)])
except CommandError as error:
    answers = [error.error_id, str(error)]
print(json.dumps(answers))
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


async def ask_as_nobody(tmp_path: Path, groups: list[int], commands: list[str]) -> Any:
    let_others_in(tmp_path)
    daemon = FakeDaemon()
    operators, watchers = (grp.getgrgid(gid).gr_name for gid in (OPERATORS, WATCHERS))
    path = str(tmp_path / "qmp.sock")
    server = ControlServer(daemon.services, path, mode=0o666, group=operators, read_only_group=watchers)
    await server.start()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", AS_NOBODY, json.dumps([path, groups, commands]), stdout=asyncio.subprocess.PIPE
        )
        said, _ = await process.communicate()
    finally:
        await server.close()
    return json.loads(said)


@needs_root
async def test_a_stranger_is_told_who_may(tmp_path: Path) -> None:
    error_id, text = await ask_as_nobody(tmp_path, [], ["query-status"])
    assert error_id == "access-denied"
    assert text.startswith("uid 65534, process ")
    assert text.endswith(f"may not use this socket, only uid 0, members of group {grp.getgrgid(OPERATORS).gr_name}")


@needs_root
async def test_an_operator_may_all(tmp_path: Path) -> None:
    assert await ask_as_nobody(tmp_path, [OPERATORS], ["query-status", "stop"]) == ["done", "done"]


@needs_root
async def test_a_watcher_may_ask(tmp_path: Path) -> None:
    asked, refused, unknown = await ask_as_nobody(tmp_path, [WATCHERS], ["query-migrate", "stop", "no-such"])
    assert asked == "done"
    assert refused == ["access-denied", "stop is for those with full access to this socket; you may ask (query-...)"]
    assert unknown[0] == "command-unknown"


def test_what_asks_is_told_by_its_name() -> None:
    asking = {name for name, command in COMMANDS.items() if command.asks}
    assert {"query-migrate", "x-migrated-query-ownership", "qmp_capabilities"} <= asking
    assert not asking & {"migrate", "quit", "getfd", "x-migrated-release", "x-migrated-preflight", "snapshot-delete"}
