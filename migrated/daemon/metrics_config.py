"""The ``[metrics]`` section of the configuration: where Prometheus may ask.

The rule of the file: that of `config`, which reads it. Whoever may connect may read; so what other hosts can reach has
to be asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from migrated.errors import CommandError
from migrated.transport.address import TcpAddress, UnixAddress, parse_address
from migrated.transport.listen import parse_allow


class Metrics(Struct, frozen=True, rename="kebab"):
    """Where figures can be had, and by whom."""

    listen: str | None = None
    allow: list[str] = []

    @property
    def address(self) -> TcpAddress | UnixAddress | None:
        """Where to listen; None: nowhere. Raises CommandError."""
        if self.listen is None:
            return None
        address = parse_address(self.listen if self.listen.startswith("unix:") else f"tcp:{self.listen}")
        assert isinstance(address, TcpAddress | UnixAddress)
        return address


def metrics_problems(metrics: Metrics) -> Iterator[tuple[str, str]]:
    """Return what is wrong, as (key, what was expected)."""
    try:
        parse_allow(metrics.allow)
    except CommandError as error:
        yield "metrics.allow", str(error)
    try:
        address = metrics.address
    except CommandError as error:
        yield "metrics.listen", f"expected HOST:PORT or unix:PATH, found '{metrics.listen}': {error}"
        return
    if isinstance(address, UnixAddress) and not address.path.startswith("/"):
        yield "metrics.listen", f"expected an absolute path, found '{metrics.listen}'"
    if isinstance(address, TcpAddress) and not address.is_loopback and not metrics.allow:
        expected = 'expected a loopback address, or allow = ["ADDRESS", ...] with those that may ask'
        yield "metrics.listen", f"{expected}, found '{metrics.listen}': nobody is asked who he is"
