"""The base of all shapes of the control protocol.

The rule of the file: that of `control.shapes`, which says what a shape is; the other files of shapes have it in common.
"""

from __future__ import annotations

import msgspec


class Shape(msgspec.Struct, frozen=True, rename="kebab", omit_defaults=True):
    """Base of all: hyphenated member names."""
