"""Quarantine: a request that kills engines must not take the whole company down with it.

When an engine dies in a step, the requests of that step are *suspects*: one of them may have done
it. A suspect goes on, but its next step is run with nobody else in it, so that a second death
convicts nobody else. If that step ends well, it was somebody else, and the suspicion is lifted; if
the engine dies of it, the request is convicted: it ends with an error that says a retry cannot
help, and its fingerprint (what it asks, not who it is) is remembered, so that the same request does
not start over under another name. Whoever was in too many fatal steps is convicted in any case, so
that nothing goes on for ever. Everyone else just goes on.

Engines also die of what has nothing to do with requests, and then by chance in the step of a
suspect: with many suspects one after another that is no small chance. What a request asks shows in
its first step. So one that has come through steps before has to be alone in two fatal ones.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

FATAL_STEPS_MAX: Final = 4
"""In so many fatal steps nobody is by accident."""
FINGERPRINTS_MAX: Final = 1024
FINGERPRINT_KEPT_S: Final = 3600.0


class Quarantine:
    """Counts deaths by request, and remembers who was convicted."""

    def __init__(self) -> None:
        self._fatal_steps: dict[int, int] = {}
        self._suspects: dict[int, int] = {}
        """In how many fatal steps each has been alone since it is one."""
        self._convicted: OrderedDict[bytes, float] = OrderedDict()

    def record_death(self, request_id: int, *, was_alone: bool, is_proven: bool) -> bool:
        """An engine died in a step of this request; whether that convicts it.

        ``is_proven``: it has come through a step before.
        """
        self._fatal_steps[request_id] = self._fatal_steps.get(request_id, 0) + 1
        was_suspect = request_id in self._suspects
        times_alone = self._suspects.get(request_id, 0) + (was_alone and was_suspect)
        self._suspects[request_id] = times_alone
        if times_alone >= (2 if is_proven else 1):
            return True
        return self._fatal_steps[request_id] >= FATAL_STEPS_MAX

    def is_suspect(self, request_id: int) -> bool:
        """Whether the request's next step must be run alone."""
        return request_id in self._suspects

    def lift(self, request_id: int) -> None:
        """The request's step has ended well: it was somebody else."""
        self._suspects.pop(request_id, None)

    def convict(self, fingerprint: bytes, now: float) -> None:
        """Remember what a convicted request asked."""
        self._convicted[fingerprint] = now
        self._convicted.move_to_end(fingerprint)
        while len(self._convicted) > FINGERPRINTS_MAX:
            self._convicted.popitem(last=False)

    def is_convicted(self, fingerprint: bytes, now: float) -> bool:
        """Whether a request that asks the same was convicted not long ago."""
        at = self._convicted.get(fingerprint)
        return at is not None and now < at + FINGERPRINT_KEPT_S

    def release(self, fingerprint: bytes) -> bool:
        """Forget a conviction; whether there was one."""
        return self._convicted.pop(fingerprint, None) is not None

    def forget(self, request_id: int) -> None:
        """The request has ended."""
        self._fatal_steps.pop(request_id, None)
        self._suspects.pop(request_id, None)
