"""Two daemons in two network namespaces: the link goes down at each phase and comes back; the end is the matrix's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.test_matrix import lead_to
from tests.support.namespaces import NamespaceStage, why_not

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NamespaceStage]:
    with NamespaceStage(tmp_path_factory.mktemp("namespaces")) as stage:
        yield stage


@pytest.mark.parametrize(
    ("point", "postcopy", "owner"),
    [
        pytest.param("source.setup", False, "source", marks=pytest.mark.row(14), id="setup"),
        pytest.param("source.pass", False, "source", marks=pytest.mark.row(14), id="pass"),
        pytest.param("source.stopped", False, "source", marks=pytest.mark.row(15), id="switchover"),
        pytest.param("target.write-prepared", False, "source", marks=pytest.mark.row(15), id="prepared"),
        pytest.param("source.write-released", False, "target", marks=pytest.mark.row(16), id="released"),
        pytest.param("target.run", False, "target", marks=pytest.mark.row(16), id="owner"),
        pytest.param("source.stopped", True, "source", marks=pytest.mark.row(15), id="postcopy-switchover"),
        pytest.param("source.write-released", True, "target", marks=pytest.mark.row(16), id="postcopy-released"),
        pytest.param("source.background", True, "target", marks=pytest.mark.row(17), id="postcopy-source"),
        pytest.param("target.background", True, "target", marks=pytest.mark.row(17), id="postcopy-destination"),
    ],
)
def test_the_link_goes_down_and_comes_back(point: str, postcopy: bool, owner: str, stage: NamespaceStage) -> None:
    assert stage.whole, "the test before left this pair as it was"
    site = lead_to(stage, point, postcopy=postcopy)
    stage.pull()
    site.let_go(point)
    stage.wait_status(stage.source, "failed", "postcopy-paused")
    stage.mend_link()
    stage.check(owner)
