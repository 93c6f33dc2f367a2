"""Where a running migration is shown: a bar on a terminal, one line per second elsewhere, nowhere for programs.

The rule of the file: displays only write; what they write is made in `progress`. rich is imported when a bar is shown.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from migrated.cli.progress import Progress, figures, progress_line

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_EVERY_S = 1.0


class Display(Protocol):
    """A context manager around the waiting."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def update(self, progress: Progress) -> None:
        """Show how it stands now."""
        ...

    def note(self, text: str) -> None:
        """Say something that must not be overwritten."""
        ...


class NoDisplay:
    """For ``--json``: the report at the end is all there is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return

    def update(self, progress: Progress) -> None:
        return

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class LineDisplay:
    """For pipes and logs: a line at once, one per second, and one at every change of status."""

    def __init__(self) -> None:
        self._status = ""
        self._due = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return

    def update(self, progress: Progress) -> None:
        now = time.monotonic()
        if now >= self._due or progress.status != self._status:
            self._due = now + LINE_EVERY_S
            self._status = progress.status
            print(progress_line(progress), flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)


class BarDisplay:
    """For terminals; rich leaves colours out where ``NO_COLOR`` asks for it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._bar: RichProgress = RichProgress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}", markup=False), auto_refresh=False,
        )  # fmt: skip
        self._task = self._bar.add_task("setup", total=1.0, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, progress: Progress) -> None:
        self._bar.update(
            self._task, description=progress.status, completed=progress.fraction, figures=figures(progress)
        )
        self._bar.refresh()

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


def choose_display(as_json: bool) -> Display:
    """Pick the display for where standard output goes."""
    if as_json:
        return NoDisplay()
    return BarDisplay() if sys.stdout.isatty() else LineDisplay()
