"""What every test gets: a time limit.

The rule of the file: the limit is there so that a hang fails with a traceback instead of stopping the run; no test is
about time.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Generator
from types import FrameType

import pytest
from hypothesis import HealthCheck, settings

# These machines are noisy: how long an example takes to make or to run says nothing about the code.
settings.register_profile("noisy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("noisy")

#: Far beyond any single test on a slow machine with two processors.
LIMIT_S = 60.0
#: What does not end when it is cancelled is interrupted where it stands, this much later.
GRACE_S = 5.0


class _Limit:
    """One test's time limit."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.passed = False

    @property
    def text(self) -> str:
        return f"not done after its time limit of {self.seconds:g} s"

    def expired(self, signum: int, frame: FrameType | None) -> None:
        """Handle SIGALRM: cancel what runs on the event loop; raise where there is none, or if that did not help."""
        try:
            tasks = asyncio.all_tasks()
        except RuntimeError:
            tasks = set()
        if not tasks or self.passed:
            pytest.fail(self.text)
        # uvloop swallows what a signal handler raises, but a cancelled task ends on any loop.
        self.passed = True
        for task in tasks:
            task.print_stack(file=sys.stderr)
            task.cancel(self.text)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fail the test when its time is up."""
    marker = item.get_closest_marker("limit")
    limit = _Limit(float(marker.args[0]) if marker else LIMIT_S)
    previous = signal.signal(signal.SIGALRM, limit.expired)
    signal.setitimer(signal.ITIMER_REAL, limit.seconds, GRACE_S)
    try:
        result = yield
    except asyncio.CancelledError:
        if limit.passed:
            pytest.fail(limit.text)
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    if limit.passed:
        pytest.fail(limit.text)
    return result
