"""What is built of the tree has everything in it: the sdist all files, the wheel what an installation needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.house.repository import PACKAGE, ROOT, run, tracked_files

#: Directories that a wheel brings as they are.
SHARED = ("config", "systemd")

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, in which builds may leave what they like."""
    copy = tmp_path_factory.mktemp("tree")
    for path in tracked_files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return copy


def build(tree: Path, kind: str, directory: Path) -> Path:
    """Have the build backend make an sdist or a wheel."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, directory], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = directory.iterdir()
    return made


def test_the_sdist_is_complete(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(build(tree, "sdist", tmp_path)) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in tracked_files()} - packed == set()


def test_the_wheel_has_the_package_and_the_units(tree: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(tree, "wheel", tmp_path)) as archive:
        packed = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.suffix in (".py", ".typed")}
    assert modules - packed == set()
    shared = {name.partition(".data/data/share/migrated/")[2] for name in packed} - {""}
    assert shared == {
        str(path.relative_to(ROOT)) for path in tracked_files() if path.relative_to(ROOT).parts[0] in SHARED
    }
    assert {name for name in packed if name.startswith("tests")} == set()


@pytest.mark.parametrize("script", ["instances", "postinst", "prerm", "postrm"])
def test_scripts_of_the_package_are_posix_shell(script: str) -> None:
    run("sh", "-n", f"packaging/debian/{script}")


def test_the_build_script_is_a_program() -> None:
    run("bash", "-n", "packaging/build-deb")
    assert (ROOT / "packaging" / "build-deb").stat().st_mode & 0o111
