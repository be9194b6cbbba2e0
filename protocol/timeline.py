"""What became of a request: when it was where, as the supervisor saw it."""

from __future__ import annotations

from typing import Final, NamedTuple

EVENTS_MAX: Final = 64
"""Of one request; what comes after them is not kept, but for the end."""

QUEUED: Final = "queued"
ASSIGNED: Final = "assigned"
RESUMED: Final = "resumed"
"""Assigned again, to go on behind what it has put out."""
BEGUN: Final = "begun"
"""It has its first token."""
ENDED: Final = "ended"
RESTORED: Final = "restored"
"""Taken over by a supervisor that knows no more of the time before."""


class TimelineEvent(NamedTuple):
    """One thing that happened to a request."""

    at_s: float
    """Since its admission."""
    what: str
    engine: str = ""
    """The engine that it happened with, if one."""


class RequestTimeline(NamedTuple):
    """One request, and all that happened to it."""

    request_id: int
    group_id: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int
    """Of the drafted ones."""
    finish: int
    """A ``FinishReason``, or 0."""
    code: str
    """Of the error that ended it, or empty."""
    events: tuple[TimelineEvent, ...]
