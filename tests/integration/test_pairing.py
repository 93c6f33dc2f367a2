"""From nothing to two paired hosts in three commands, as README has it; and what `migratectl pki` refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.repository import ROOT
from tests.support.following import wait_until
from tests.support.holding_site import HoldingSite
from tests.support.keys import tls

BLOCKS = {"heap": 1 << 20}


def pki(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "migrated.cli.app", "pki", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)


def shown_in_readme() -> list[list[str]]:
    """Return the words of the three commands that pair host-a and host-b."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Pair two hosts")[2]
    block = re.search(r"```console\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return [shlex.split(line.partition("#")[0].strip("$ ")) for line in block[1].splitlines()]


@pytest.fixture
def hosts(tmp_path: Path) -> tuple[Path, Path]:
    """Run what README shows, in directories instead of on hosts; return where the keys of both are."""
    a, b = tmp_path / "a", tmp_path / "b"
    for shown in shown_in_readme():
        words = [re.sub(r"10\.0\.0\.[78]", "127.0.0.1", word).replace("/etc/migrated", str(a)) for word in shown]
        if words[0] == "scp":
            assert shown[-1] == "host-b:/etc/migrated/pki"
            command = ["cp", "-r", words[-2], str(b)]
        else:
            command = [sys.executable, "-m", "migrated.cli.app", *words[1:], "--ca", str(a / "ca")]
            command += ["--out", str(a / "pki")] if "init" in words else []
        subprocess.run(command, check=True, timeout=50, capture_output=True)
    return a / "pki", b


def test_three_commands_pair_two_hosts(hosts: tuple[Path, Path], tmp_path: Path) -> None:
    here, there = hosts
    assert len(shown_in_readme()) == 3
    with (
        HoldingSite("A", tmp_path, blocks=BLOCKS, incoming=None, config=tls(here)) as a,
        HoldingSite("B", tmp_path, blocks=BLOCKS, config=tls(there, '[peers]\nmay-send = ["host-a"]')) as b,
    ):
        a.poke("heap", 0, b"moved under TLS")
        a.migrate(b.address)
        wait_until(lambda: b.run_state() == "running", "it runs")
        assert b.peek("heap").startswith(b"moved under TLS")


def test_keys_are_for_their_owner_only(hosts: tuple[Path, Path]) -> None:
    for directory in (*hosts, hosts[0].parent / "ca"):
        for path in directory.iterdir():
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o600 if path.name.endswith("-key.pem") else 0o644), path
    assert not (hosts[1] / "ca-key.pem").exists()
    shown = pki("show", hosts[1], "--json")
    certificate = json.loads(shown.stdout)["server-cert.pem"]
    assert certificate["names"] == ["host-b", "127.0.0.1"]
    assert certificate["days-left"] == 824


def test_nothing_is_overwritten_by_mistake(tmp_path: Path) -> None:
    ca, out = tmp_path / "ca", tmp_path / "pki"
    assert pki("init", "a", "--ca", ca, "--out", out).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}
    again = pki("init", "a", "--ca", ca, "--out", out)
    assert (again.returncode, "there is a CA in" in again.stderr) == (3, True), again
    again = pki("issue", "b", "--ca", ca, "--out", out)
    assert (again.returncode, "there is a certificate in" in again.stderr) == (3, True), again
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pem")} == before
    assert pki("issue", "b", "--ca", ca, "--out", out, "--replace").returncode == 0
    assert "'b' (for b;" in pki("show", out).stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["issue", "b", "--ca", "nowhere"], "there is no CA here that could be used"),
        (["issue", "bäd", "--ca", "ca"], "'bäd' is neither a DNS name nor an IP address"),
        (["issue", "b", "--ca", "ca", "--out", "ca/ca-cert.pem/x"], "cannot be written: Not a directory"),
        (["show", "nowhere"], "TLS-KEYS: nowhere/ca-cert.pem cannot be read: No such file or directory"),
        (["check", "127.0.0.1:1", "--directory", "pki"], "Connection refused"),
    ],
)
def test_what_cannot_be_done_is_said(words: list[str], says: str, tmp_path: Path) -> None:
    assert pki("init", "a", "--ca", tmp_path / "ca", "--out", tmp_path / "pki").returncode == 0
    command = [sys.executable, "-m", "migrated.cli.app", "pki", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=50, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode in (3, 4), done
    assert says in done.stdout + done.stderr


def test_a_damaged_authority_signs_nothing(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert pki("init", "a", "--ca", tmp_path / name, "--out", tmp_path / f"pki-{name}").returncode == 0
    (tmp_path / "one" / "ca-key.pem").write_bytes((tmp_path / "two" / "ca-key.pem").read_bytes())
    mixed = pki("issue", "b", "--ca", tmp_path / "one")
    assert "ca-key.pem is not the key of ca-cert.pem" in mixed.stderr
    (tmp_path / "one" / "ca-key.pem").write_bytes(b"no key")
    assert "is damaged" in pki("issue", "b", "--ca", tmp_path / "one").stderr
