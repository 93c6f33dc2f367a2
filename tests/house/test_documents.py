"""Links in the documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.house.repository import ROOT, tracked_files

DOCUMENTS = [path for path in tracked_files() if path.suffix == ".md"]

_CODE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s*<?(\S+?)>?\s*$", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


def links(path: Path) -> list[str]:
    """Return the targets of a document's links, without those inside code."""
    text = _INLINE_CODE.sub("", _CODE.sub("", path.read_text(encoding="utf-8")))
    return [first or second for first, second in _LINK.findall(text)]


def anchors(path: Path) -> set[str]:
    """Return the names that a document's headings get, as the usual renderers make them."""
    text = _CODE.sub("", path.read_text(encoding="utf-8"))
    titles = [re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title)).lower() for title in _HEADING.findall(text)]
    return {title.strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    broken = []
    for link in links(path):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        inside = target == ROOT or ROOT in target.parents
        if not inside or not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []
