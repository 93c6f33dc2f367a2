"""What query-migrate really answers, at each status and at both ends, is what query-qmp-schema says it answers."""

from __future__ import annotations

from typing import Any

import pytest

from migrated.demo.site import Site
from tests.support.following import migrate, wait_status, wait_until
from tests.support.qmp_schema import QmpSchema

#: Far less than the walker dirties, even on a busy machine.
NARROW_BPS = 24 << 20


class Answers:
    """Asks query-migrate and checks each answer against the daemon's own schema."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._schema = QmpSchema(site.qmp.execute("query-qmp-schema"))
        self._type = self._schema.entries["query-migrate"]["ret-type"]

    def ask(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._site.qmp.execute("query-migrate")
        self._schema.check(self._type, answer, f"query-migrate at {answer.get('status')}")
        return answer

    def ask_until(self, *, status: str, member: str = "status") -> dict[str, Any]:
        """Ask, checking, until the status is there, and with it a member that comes some time later."""
        return dict(wait_until(lambda: _if(self.ask(), status, member), f"{member} at {status}"))


def _if(answer: dict[str, Any], status: str, member: str) -> dict[str, Any] | None:
    return answer if answer.get("status") == status and member in answer else None


@pytest.fixture
def answers(pair: tuple[Site, Site]) -> tuple[Answers, Answers]:
    a, b = pair
    return Answers(a), Answers(b)


def test_from_nothing_to_completed(pair: tuple[Site, Site], answers: tuple[Answers, Answers]) -> None:
    a, b = pair
    here, there = answers
    assert "status" not in here.ask()
    assert "status" not in there.ask()
    switch = {"capability": "pause-before-switchover", "state": True}
    a.qmp.execute("migrate-set-capabilities", {"capabilities": [switch]})
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": NARROW_BPS, "downtime-limit": 20})
    a.qmp.execute("migrate", {"uri": b.address})
    here.ask()
    here.ask_until(status="active", member="x-migrated-convergence")
    there.ask_until(status="active")
    a.qmp.execute("migrate-set-parameters", {"downtime-limit": 30_000})
    here.ask_until(status="pre-switchover")
    a.qmp.execute("migrate-continue", {"state": "pre-switchover"})
    assert "operator" in here.ask_until(status="completed")["x-migrated-downtime"]
    there.ask_until(status="completed")


def test_what_cannot_be_known_is_left_out(pair: tuple[Site, Site], answers: tuple[Answers, Answers]) -> None:
    a, b = pair
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": NARROW_BPS, "downtime-limit": 20})
    a.qmp.execute("migrate", {"uri": b.address})

    def outpaced() -> dict[str, Any] | None:
        answer = answers[0].ask()
        return answer if answer["x-migrated-dirty-rate-bps"] > answer["x-migrated-bandwidth-bps"] > 0 else None

    assert "x-migrated-eta-ms" not in wait_until(outpaced, "the walker writes faster than the link carries")
    a.qmp.execute("migrate_cancel")
    wait_status(a, {"cancelled"})
    answers[0].ask()
    wait_status(b, {"failed"})
    answers[1].ask()


def test_failed_and_back_again(pair: tuple[Site, Site], answers: tuple[Answers, Answers]) -> None:
    a, b = pair
    a.qmp.execute("migrate", {"uri": "tcp:127.0.0.1:1"})
    wait_status(a, {"failed"})
    assert answers[0].ask()["error-desc"]
    migrate(a, b)
    migrate(b, a)
    for one in answers:
        one.ask()
