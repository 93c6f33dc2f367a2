"""Named places between the acts of a hand-over, at which a test may let something go wrong.

The rule of the file: names, and nothing that goes wrong. A daemon that was not started for a test (`daemon.faults`)
passes each of them at the cost of one call. After every act of `model.handover` there is one, named after the side and
the act; before every record that is written there is one, named after the record; the others are phases.

    source.setup         the destination has shown what it is      target.load        the first section has come
    source.pass          a pass begins                             target.listen      postcopy: faults are served
    source.stopped       the machine stands still                  target.background  postcopy: it runs, memory comes
    source.sent          everything is sent
    source.background    postcopy: it runs there, memory follows
    source.write-released, ...   behind that act                   target.write-prepared, ...
    record.released, ...         before that record, at either end
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from migrated.model.handover import SOURCE, TARGET, Act, Hold

FaultPoint = Callable[[str], Awaitable[None]]


def behind(side: str, act: Act) -> str:
    """Return the name of the point behind an act of ``source`` or ``target``."""
    return f"{side}.{act.value.replace(' ', '-')}"


def before_record(hold: Hold) -> str:
    """Return the name of the point before a record."""
    return f"record.{hold.value}"


PHASES = frozenset(
    {
        "source.setup", "source.pass", "source.stopped", "source.sent", "source.background",
        "target.load", "target.listen", "target.background",
    }
)  # fmt: skip
POINTS = (
    PHASES
    | {behind("source", act) for _, acts in SOURCE.values() for act in acts}
    | {behind("target", act) for _, acts in TARGET.values() for act in acts}
    | {before_record(hold) for hold in Hold}
)


async def no_fault(point: str) -> None:
    """Pass."""
