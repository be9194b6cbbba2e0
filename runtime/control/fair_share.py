"""Fair share: who has had the least, for its weight, is served next. Pure.

Virtual token counters, after Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024):
each tenant has a counter of what its requests have cost, divided by its weight, and the tenant with
the lowest counter is next. A tenant that comes back is lifted to where the others are, so that
nobody saves up a claim by being idle. Among tenants that always have something waiting, the
difference between any two counters stays bounded by what a batch costs, whatever others do, and
capacity that one does not use goes to the others.

Cost is counted in prompt tokens. The paper weighs an output token as two of the prompt; held KV
memory is added, because a long context that answers slowly keeps others out just as well.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from understudy.runtime.control.tenancy import PolicyOf

PROMPT_TOKEN_COST: Final = 1.0
OUTPUT_TOKEN_COST: Final = 2.0
KV_TOKEN_S_COST: Final = 0.01
"""A token that is held for a second: a context of 1,000 tokens costs 10 a second, like 5 tokens."""
IDLE_TENANTS_MAX: Final = 4096
"""Counters of tenants that wait for nothing are kept up to so many. One that was dropped is lifted
to the others when it comes back, like any that was idle for long."""


class FairShare:
    """The virtual counters of all tenants."""

    def __init__(self, policy_of: PolicyOf) -> None:
        self._policy_of = policy_of
        self._counters: dict[str, float] = {}
        self._latest = 0.0
        """The counter of the tenant that was the last to wait."""

    def counter(self, tenant: str) -> float:
        """What a tenant has had, for its weight."""
        return self._counters.get(tenant, 0.0)

    def weight(self, tenant: str) -> float:
        """A tenant's weight now."""
        return self._policy_of(tenant).weight

    def charge(self, tenant: str, cost: float) -> None:
        """A tenant has had so much; a negative cost gives back."""
        self._counters[tenant] = self.counter(tenant) + cost / self.weight(tenant)

    def begin_waiting(self, tenant: str, others: Collection[str]) -> None:
        """A tenant has something waiting again; ``others`` have, too."""
        floor = min(map(self.counter, others)) if others else self._latest
        self._counters[tenant] = max(self.counter(tenant), floor)
        if len(self._counters) > IDLE_TENANTS_MAX + len(others) + 1:
            kept = {tenant, *others}
            self._counters = {name: at for name, at in self._counters.items() if name in kept}

    def end_waiting(self, tenant: str) -> None:
        """A tenant has nothing waiting any more."""
        self._latest = self.counter(tenant)
