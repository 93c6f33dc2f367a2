"""The manual pages have every command, option and key, and are man(7) without a warning."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from migrated.cli.app import app
from migrated.cli.manual import configuration_page, escape, migratectl_page, migrated_page
from migrated.daemon.config import known_keys
from migrated.model.parameters import CAPABILITIES, PARAMETERS
from tests.house.repository import ROOT, run

DATE = "2026-11-26"
CONFIGURATION = (ROOT / "config" / "migrated.toml").read_text(encoding="utf-8")


def page_of(lines: Iterator[str]) -> str:
    return "\n".join(lines) + "\n"


PAGES = {
    "migratectl.1": page_of(migratectl_page(DATE)),
    "migrated.8": page_of(migrated_page(DATE)),
    "migrated.toml.5": page_of(configuration_page(DATE, CONFIGURATION)),
}


def commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Return every command with its words."""
    for name, one in getattr(command, "commands", {}).items():
        yield f"{path}{name}", one
        yield from commands(one, f"{path}{name} ")


def test_every_command_and_option_is_there() -> None:
    page = PAGES["migratectl.1"]
    for path, command in commands(typer.main.get_command(app)):
        text = re.search(rf'^\.SS "{re.escape(escape(path))} (.*?)(?=^\.S)', page, re.MULTILINE | re.DOTALL)
        assert text is not None, path
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        assert [option for option in options if option != "--json" and escape(option) not in text[1]] == []


@pytest.mark.parametrize("option", ["--config", "--incoming", "--check-config"])
def test_every_option_of_the_daemon_is_there(option: str) -> None:
    assert escape(option) in PAGES["migrated.8"]


def test_every_key_is_there_once() -> None:
    page = PAGES["migrated.toml.5"]
    sections = [key for key in known_keys() if "." not in key] + ["migration.parameters", "migration.capabilities"]
    for section in sections:
        assert page.count(f'.SH "[{escape(section)}]"') == 1, section
    keys = [key.rpartition(".")[2] for key in known_keys() if "." in key and key not in sections]
    keys += [row.name for row in PARAMETERS.values() if row.implemented]
    keys += [row.name for row in CAPABILITIES.values() if row.implemented]
    for key in keys:
        assert page.count(f"\n\\fB{escape(key)} = ") == keys.count(key), key


def test_every_word_of_the_configuration_is_there() -> None:
    text = re.sub(r"\\fB|\\fR|\\&", "", PAGES["migrated.toml.5"]).replace("\\-", "-").replace("\\e", "\\")
    words = re.sub(r"^#( |$)", "", re.sub(r"^# -+$", "", CONFIGURATION, flags=re.MULTILINE), flags=re.MULTILINE).split()
    assert set(words) - set(text.split()) <= {f"[{name}]" for name in _sections()}


def _sections() -> list[str]:
    return re.findall(r"^\[(.+)\]$", CONFIGURATION, re.MULTILINE)


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("name", PAGES)
def test_pages_are_valid(name: str, tmp_path: Any) -> None:
    path = tmp_path / name
    path.write_text(PAGES[name])
    log = tmp_path / "log"
    run("sh", "-c", f"groff -man -ww -Tutf8 -rLL=100n -z {path} 2> {log}; cat {log} >&2; test ! -s {log}")
