"""``config/migrated.toml`` describes every key there is, with its default."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from migrated.daemon.config import known_keys, load_config
from migrated.model.parameters import CAPABILITIES, PARAMETERS
from tests.house.repository import ROOT

FILE = ROOT / "config" / "migrated.toml"

#: Keys without a default; the file shows an example.
EXAMPLES = {
    "machine.uuid", "control.group", "control.read-only-group", "attach.group", "migration.incoming", "migration.allow",
    "metrics.listen",
}  # fmt: skip

_COMMENTED_KEY = re.compile(r"^# (?=[a-z0-9-]+ = )", re.MULTILINE)


def spelt_out() -> str:
    """Return the file with every commented key switched on."""
    return _COMMENTED_KEY.sub("", FILE.read_text())


def keys_of(table: dict[str, Any], prefix: str = "") -> set[str]:
    """Return the paths of all keys; the free tables of parameters and capabilities count as one."""
    found = set()
    for name, value in table.items():
        key = f"{prefix}{name}"
        found.add(key)
        if isinstance(value, dict) and key not in ("migration.parameters", "migration.capabilities"):
            found |= keys_of(value, f"{key}.")
    return found


def test_the_file_as_it_is_changes_nothing(tmp_path: Path) -> None:
    empty = tmp_path / FILE.name
    empty.touch()
    assert load_config(FILE) == load_config(empty)


def test_every_key_is_there_and_no_other() -> None:
    assert keys_of(tomllib.loads(spelt_out())) == set(known_keys())


def test_what_is_shown_is_the_default(tmp_path: Path) -> None:
    lines = [line for line in spelt_out().splitlines() if not _is_example(line)]
    shown, empty = tmp_path / "shown" / FILE.name, tmp_path / FILE.name
    shown.parent.mkdir()
    shown.write_text("\n".join(lines))
    empty.touch()
    config, default = load_config(shown), load_config(empty)
    assert config.parameters().all() == default.parameters().all()
    assert config.capabilities().all() == default.capabilities().all()
    for section in ("machine", "paths", "control", "attach", "history", "metrics", "handlers", "workload", "log"):
        assert getattr(config, section) == getattr(default, section)


def _is_example(line: str) -> bool:
    name = line.partition(" = ")[0]
    return any(key.rpartition(".")[2] == name for key in EXAMPLES)


def test_examples_are_valid(tmp_path: Path) -> None:
    path = tmp_path / FILE.name
    # The example of a second group wants a socket that everybody can connect to.
    path.write_text(spelt_out().replace('"0660"', '"0666"'))
    config = load_config(path)
    assert config.migration.incoming is not None
    assert config.migration.allow


def test_every_setting_that_does_something_is_there_with_its_default() -> None:
    migration = tomllib.loads(spelt_out())["migration"]
    assert migration["parameters"] == {row.name: row.default for row in PARAMETERS.values() if row.implemented}
    assert migration["capabilities"] == {row.name: row.default for row in CAPABILITIES.values() if row.implemented}


def test_units_and_configuration_agree_on_places(tmp_path: Path) -> None:
    for unit, instance in (("migrated.service", "migrated"), ("migrated@.service", "kv")):
        text = (ROOT / "systemd" / unit).read_text().replace("%i", instance)
        values = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]\w*=", line))
        file = values["ExecStart"].rpartition(" ")[2]
        path = tmp_path / Path(file).name
        path.touch()
        paths = load_config(path).paths
        assert file == f"/etc/migrated/{instance}.toml"
        assert paths.runtime == f"/run/{values['RuntimeDirectory']}"
        assert paths.state == f"/var/lib/{values['StateDirectory']}"
