"""What a supervisor has counted."""

from __future__ import annotations


class Totals:
    """Counts since the start."""

    __slots__ = (
        "admitted",
        "adopted",
        "broken",
        "finished",
        "quarantined",
        "rejected",
        "resumed",
        "resumed_inexact",
        "shed",
        "stale",
        "tokens",
    )

    def __init__(self) -> None:
        self.admitted = self.finished = self.rejected = self.tokens = 0
        self.resumed_inexact = self.shed = 0
        self.resumed = self.adopted = self.stale = self.broken = self.quarantined = 0
