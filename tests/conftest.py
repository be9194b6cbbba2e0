"""What holds for every test: Hypothesis does not time its examples, since machines are busy."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("understudy", deadline=None)
settings.load_profile("understudy")
