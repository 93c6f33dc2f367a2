"""The shape of the tree: what no linter knows about this house."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.house.repository import PACKAGE, ROOT, modules, run, tracked_files

#: Soft limits are the architecture's (250 and 40); beyond these a module or a function does a second thing.
MODULE_MAX_LINES = 400
BODY_MAX_LINES = 60

#: Nothing of the machine a change was made on, and no place packages come from, belongs into the project. The brackets
#: keep the patterns from finding themselves.
FOREIGN = re.compile(
    rb"/wor[k]/|/roo[t]/|/hom[e]/[a-z]|share[d]/(design|reference|hooks)"
    rb"|py[p]i\.org|python[h]osted|npm[j]s\.|crate[s]\.io|golan[g]\.org"
)


def test_package_init_files_are_empty() -> None:
    # The client's is its public face.
    filled = [path for path in modules() if path.name == "__init__.py" and path.read_text().strip()]
    assert filled in ([], [PACKAGE / "client" / "__init__.py"])


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_and_function_sizes(path: os.PathLike[str]) -> None:
    with open(path, encoding="utf-8") as stream:
        text = stream.read()
    assert text.count("\n") <= MODULE_MAX_LINES
    bodies = {
        node.name: (node.end_lineno or 0) - node.body[0].lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in bodies.items() if lines > BODY_MAX_LINES} == {}


def test_every_module_says_what_it_is() -> None:
    silent = [
        path
        for path in modules()
        if (text := path.read_text(encoding="utf-8")).strip() and ast.get_docstring(ast.parse(text)) is None
    ]
    assert silent == []


def test_nothing_of_this_machine_is_in_the_project() -> None:
    found = {
        str(path.relative_to(ROOT)): match.group().decode()
        for path in tracked_files()
        if (match := FOREIGN.search(path.read_bytes()))
    }
    assert found == {}


def test_importing_the_client_costs_only_the_standard_library() -> None:
    program = "import sys; before = set(sys.modules); import migrated.client; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {name.partition(".")[0] for name in done.stdout.split()} - {"migrated"}
    assert top <= sys.stdlib_module_names
    assert "asyncio" not in top


def test_the_version_is_in_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_license_is_all_there() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_ci_run_is_a_program() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    run("bash", "-n", ".ci/run")
