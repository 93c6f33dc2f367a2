"""Hypothesis without its deadline: how long an example takes is the machine's business, not the model's."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
