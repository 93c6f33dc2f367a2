"""What goes to standard output and standard error.

The rule of the file: with ``--json`` standard output carries one JSON object per result and nothing else; without it,
results go to standard output and refusals to standard error, as text for people.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from migrated.errors import CommandError, MigratedError


@dataclass(frozen=True, slots=True)
class Output:
    """How this call of the program speaks."""

    as_json: bool

    def result(self, value: object, lines: Iterable[str] = ()) -> None:
        """Say how it went: ``value`` to programs, ``lines`` to people."""
        for line in [json.dumps(value)] if self.as_json else lines:
            print(line, flush=True)

    def text(self, lines: Iterable[str]) -> None:
        """Say something more to people."""
        if not self.as_json:
            self.result(None, lines)

    def note(self, text: str) -> None:
        """Say something beside the result, where it does not get in a program's way."""
        print(f"migratectl: {text}", file=sys.stderr, flush=True)

    def refusal(self, error: MigratedError, more: Mapping[str, object] = MappingProxyType({})) -> None:
        """Say why it did not go; ``more`` is for programs."""
        if self.as_json:
            kind = error.qmp_class if isinstance(error, CommandError) else type(error).__name__
            self.result({"error": {"class": kind, "desc": str(error), "id": error.error_id}, **more})
        else:
            print(f"migratectl: {error} [{error.error_id}]", file=sys.stderr, flush=True)
