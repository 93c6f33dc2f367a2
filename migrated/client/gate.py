"""Where a workload's threads wait while the machine is stopped.

The rule of the file: a thread that is *in* the gate (parked) does not touch the machine's memory, one that is out may.
The stop is complete when every live participant is in. A participant is a thread that called `checkpoint` once; it is
forgotten when it ends, because only its own thread-local storage keeps it alive, and when it was told that the machine
moved.

The fast path is two attribute tests and no lock; `smooth` is False whenever a passing thread has anything to do.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from enum import Enum

from migrated.client.errors import AttachError, MachineMoved

#: Auto-converge: run this long, then sleep; QEMU's CPU_THROTTLE_TIMESLICE_NS.
SLICE_S = 0.010


class State(Enum):
    """What the machine does, as far as this process has been told."""

    RUNNING = "running"
    STOPPED = "stopped"
    INCOMING = "incoming"
    MOVED = "moved"
    STANDBY = "standby"


class _Participant:
    """One thread. ``parked``: in the gate. ``moves``: how many departures of the machine there were when it passed."""

    __slots__ = ("__weakref__", "moves", "parked", "slice_start")

    def __init__(self, moves: int) -> None:
        self.moves = moves
        self.parked = False
        self.slice_start = 0.0


class _Mine(threading.local):
    joined = False
    token: _Participant | None = None


class Gate:
    """The state of the machine, and the threads that wait for it to change."""

    def __init__(self, state: State, wake: Callable[[], None]) -> None:
        self.smooth = False
        """True: a participant passes `checkpoint` without a look at anything else."""
        self.mine = _Mine()
        self.peer = ""
        self.ever_ran = False
        self._state = state
        self._wake = wake
        self._awaited = False
        self._throttle = 0
        self._moves = 0
        self._why_closed = ""
        self._changed = threading.Condition()
        self._participants: weakref.WeakSet[_Participant] = weakref.WeakSet()
        self.enter(state)

    # -- threads of the workload -------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """The slow half of `Machine.checkpoint`."""
        token = self.mine.token
        throttled = token is not None and self._throttle and self._state is State.RUNNING
        if token is not None and throttled and time.monotonic() - token.slice_start < SLICE_S:
            return
        with self._changed:
            if token is None:
                token = self._join()
            while True:
                self._check_open()
                if self._state is State.MOVED or token.moves != self._moves:
                    self._leave(token)
                    raise MachineMoved(self.peer)
                if self._state is not State.RUNNING:
                    self._park(token)
                elif self._throttle and time.monotonic() - token.slice_start >= SLICE_S:
                    self._park(token, timeout_s=SLICE_S * self._throttle / (100 - self._throttle))
                    if self._state is State.RUNNING:
                        token.slice_start = time.monotonic()
                else:
                    return

    def wait_running(self) -> None:
        """Wait until the machine runs; the caller does not become a participant by it."""
        with self._changed:
            token = self.mine.token or _Participant(self._moves)
            while self._state is not State.RUNNING:
                self._check_open()
                if self._state is State.MOVED:
                    self._leave(token)
                    raise MachineMoved(self.peer)
                self._park(token)
            self._check_open()
            token.moves = self._moves

    def _join(self) -> _Participant:
        token = self.mine.token = _Participant(self._moves)
        self._participants.add(token)
        self.mine.joined = True
        return token

    def _leave(self, token: _Participant) -> None:
        # It was told that the machine is gone, so it may do something else; a stop waits for it no longer.
        self._participants.discard(token)
        self.mine.joined = False
        self.mine.token = None

    def _park(self, token: _Participant, timeout_s: float | None = None) -> None:
        token.parked = True
        if self._awaited:
            self._wake()
        self._changed.wait(timeout_s)
        token.parked = False

    def _check_open(self) -> None:
        if self._why_closed:
            raise AttachError(self._why_closed)

    # -- the service thread ------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What the machine does."""
        return self._state

    def enter(self, state: State) -> None:
        """Change the state; whoever waits looks again."""
        with self._changed:
            if state is State.MOVED and self._state is not State.MOVED:
                self._moves += 1
            self._state = state
            self.ever_ran = self.ever_ran or state is State.RUNNING
            self._refresh()

    def throttle(self, percent: int) -> None:
        """Let participants run (100 - percent) % of the time."""
        with self._changed:
            self._throttle = percent
            self._refresh()

    def quiet(self) -> bool:
        """Say whether every live participant is parked. As long as one is not, a thread that parks calls ``wake``."""
        with self._changed:
            quiet = all(token.parked for token in list(self._participants))
            self._awaited = not quiet
            return quiet

    def close(self, why: str) -> None:
        """Let every waiting and every coming thread raise AttachError(why)."""
        with self._changed:
            self._why_closed = why
            self._refresh()

    def _refresh(self) -> None:
        self.smooth = self._state is State.RUNNING and not self._throttle and not self._why_closed
        self._changed.notify_all()
