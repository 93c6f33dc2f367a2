"""Postcopy at the destination: how far it is, and which command may come now.

The rule of the file: a table. States, their numbers (they are in the texts of refusals) and the texts are QEMU's:
NONE -> ADVISE -> [DISCARD ->] LISTENING -> RUNNING -> END.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum

from migrated.errors import RemoteProtocolError


class PostcopyState(IntEnum):
    """How far the destination is."""

    NONE = 0
    """No postcopy, or not yet."""
    ADVISE = 1
    """The source may change to postcopy; pages still come as in precopy."""
    DISCARD = 2
    """It is about to: stale pages are being forgotten."""
    LISTENING = 3
    """Missing pages are waited for and served; from here on pages are placed, never written."""
    RUNNING = 4
    """The machine runs here, or may."""
    END = 5
    """Every page is here."""

    @property
    def listening(self) -> bool:
        """True while pages may be missing under somebody who waits for them."""
        return self in (PostcopyState.LISTENING, PostcopyState.RUNNING)


class PostcopyStep(StrEnum):
    """What moves the destination on, spelt as QEMU's refusals spell it."""

    ADVISE = "CMD_POSTCOPY_ADVISE"
    DISCARD = "CMD_POSTCOPY_RAM_DISCARD"
    LISTEN = "CMD_POSTCOPY_LISTEN"
    RUN = "CMD_POSTCOPY_RUN"
    #: No command: the end of the stream.
    END = "end of the stream"


_S = PostcopyState

#: In which states a step is allowed, and where it leads.
STEPS: Mapping[PostcopyStep, tuple[frozenset[PostcopyState], PostcopyState]] = {
    PostcopyStep.ADVISE: (frozenset({_S.NONE}), _S.ADVISE),
    PostcopyStep.DISCARD: (frozenset({_S.ADVISE, _S.DISCARD}), _S.DISCARD),
    # Where nothing was to be forgotten there was no DISCARD.
    PostcopyStep.LISTEN: (frozenset({_S.ADVISE, _S.DISCARD}), _S.LISTENING),
    PostcopyStep.RUN: (frozenset({_S.LISTENING}), _S.RUNNING),
    # From ADVISE: the source made it within precopy. Anywhere else pages or the order to run are missing.
    PostcopyStep.END: (frozenset({_S.ADVISE, _S.RUNNING}), _S.END),
}


def next_state(state: PostcopyState, step: PostcopyStep) -> PostcopyState:
    """Return the state behind ``step``. Raises RemoteProtocolError where it is not allowed now.

    A stream that ends without ever having been advised is plain precopy: no step at all.
    """
    allowed, to = STEPS[step]
    if state not in allowed:
        raise RemoteProtocolError(
            f"{step} in wrong postcopy state ({state.value})",
            expected=" or ".join(one.name for one in sorted(allowed)),
            found=state.name,
        )
    return to
