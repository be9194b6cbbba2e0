"""What a tenant is allowed, and whether it has used that up. Pure.

A tenant is who pays for a call: all keys of one tenant share its limits, whichever gateway they
come through, because it is the supervisor that counts.

Rates are token buckets (Turner, "New directions in communications", 1986): a bucket fills at the
rate and holds what one period gives, so that a tenant may send in bursts and not exceed its rate
for long. Generated tokens are not known at the door, so a bucket of tokens may be overdrawn: who
has drawn too much waits until it is filled again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

BURST_S: Final = 1.0
"""A tenant may send what its rate of requests gives in so long at once, and one request always."""
MINUTE_S: Final = 60.0
CONCURRENCY_RETRY_S: Final = 1.0
"""When to come back if no request of the tenant has ended yet, so that nothing can be computed."""
IDLE_TENANTS_MAX: Final = 4096
"""Counters of tenants without a living request are kept up to so many."""
_ROUNDING: Final = 1e-9
"""Who comes back at the very time that was named is let in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantPolicy:
    """What a tenant is allowed; ``None`` is without a limit."""

    weight: float = 1.0
    """Its share of a busy cluster, in proportion to the weights of the others."""
    requests_per_s: float | None = None
    tokens_per_min: int | None = None
    """Prompt and output tokens."""
    concurrency: int | None = None
    """Requests that live at the same time."""


UNLIMITED: Final = TenantPolicy()

PolicyOf = Callable[[str], TenantPolicy]
"""Gives a tenant's policy as it is at the moment."""


class OwnLimit(NamedTuple):
    """Which of its own limits a tenant has reached, and when there is room again."""

    message: str
    retry_after_s: float


class Bucket:
    """A token bucket that may be overdrawn."""

    __slots__ = ("_at", "_level")

    def __init__(self, level: float, now: float) -> None:
        self._level = level
        self._at = now

    def level(self, rate_per_s: float, capacity: float, now: float) -> float:
        """What is in it now, at this rate and size."""
        self._level = min(capacity, self._level + rate_per_s * max(0.0, now - self._at))
        self._at = now
        return self._level

    def draw(self, amount: float) -> None:
        """Take out, even what is not there."""
        self._level -= amount


class _Tenant:
    """What one tenant has used lately."""

    __slots__ = ("concurrency", "mean_life_s", "requests", "tokens")

    def __init__(self) -> None:
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.concurrency = 0
        self.mean_life_s: float | None = None


class TenantLimits:
    """Counts what each tenant uses, and says when it is too much."""

    def __init__(self, policy_of: PolicyOf) -> None:
        self._policy_of = policy_of
        self._tenants: dict[str, _Tenant] = {}

    def reached(self, tenant: str, *, num_requests: int, now: float) -> OwnLimit | None:
        """Which limit stands against further requests of a tenant; ``None`` if none does."""
        policy = self._policy_of(tenant)
        used = self._tenants.get(tenant)
        if used is None:
            return None
        limit = policy.concurrency
        if limit is not None and used.concurrency and used.concurrency + num_requests > limit:
            life_s = used.mean_life_s
            wait_s = CONCURRENCY_RETRY_S if life_s is None else life_s / used.concurrency
            return OwnLimit(f"{used.concurrency} requests are open; {limit} may be", wait_s)
        if policy.requests_per_s is not None and used.requests is not None:
            rate = policy.requests_per_s
            level = used.requests.level(rate, max(1.0, rate * BURST_S), now)
            if level < 1.0 - _ROUNDING:
                return OwnLimit(f"{rate:g} requests a second may be sent", (1.0 - level) / rate)
        if policy.tokens_per_min is not None and used.tokens is not None:
            rate = policy.tokens_per_min / MINUTE_S
            level = used.tokens.level(rate, policy.tokens_per_min, now)
            if level < _ROUNDING:
                text = f"{policy.tokens_per_min} tokens a minute may be used"
                return OwnLimit(text, (1.0 - level) / rate)
        return None

    def begin(self, tenant: str, *, num_prompt_tokens: int, now: float, num_calls: int = 1) -> None:
        """A request of a tenant was taken in; further choices of a call are no calls."""
        policy = self._policy_of(tenant)
        used = self._tenants.get(tenant)
        if used is None:
            used = self._tenants[tenant] = _Tenant()
            self._forget_idle(tenant)
        used.concurrency += 1
        if policy.requests_per_s is not None:
            burst = max(1.0, policy.requests_per_s * BURST_S)
            if used.requests is None:
                used.requests = Bucket(burst, now)
            used.requests.level(policy.requests_per_s, burst, now)
            used.requests.draw(num_calls)
        self._draw_tokens(used, policy, num_prompt_tokens, now)

    def end(self, tenant: str, *, num_output_tokens: int, life_s: float, now: float) -> None:
        """A request of a tenant has ended, after so long."""
        used = self._tenants[tenant]
        used.concurrency -= 1
        assert used.concurrency >= 0, "a request ends once"
        mean = used.mean_life_s
        used.mean_life_s = life_s if mean is None else mean + (life_s - mean) / 8
        self._draw_tokens(used, self._policy_of(tenant), num_output_tokens, now)

    def concurrency(self, tenant: str) -> int:
        """How many requests of a tenant live."""
        used = self._tenants.get(tenant)
        return 0 if used is None else used.concurrency

    def _draw_tokens(
        self, used: _Tenant, policy: TenantPolicy, num_tokens: int, now: float
    ) -> None:
        if policy.tokens_per_min is None:
            return
        if used.tokens is None:
            used.tokens = Bucket(policy.tokens_per_min, now)
        used.tokens.level(policy.tokens_per_min / MINUTE_S, policy.tokens_per_min, now)
        used.tokens.draw(num_tokens)

    def _forget_idle(self, newest: str) -> None:
        if len(self._tenants) <= IDLE_TENANTS_MAX:
            return
        for tenant, used in list(self._tenants.items()):
            if not used.concurrency and tenant != newest:
                del self._tenants[tenant]
