"""The accounts: what each tenant's requests cost, for fair shares, limits and the bill. Pure.

Shares are charged when a request is given to an engine, with as many tokens as its tenant's answers
have had of late, and put right while it runs and when it ends: charged only for what has come, a
tenant would get one batch after another before the first of them counts (Sheng et al. call it VTC
with length prediction). Limits are charged when it is taken in and when it ends. Usage counts when
it ends, and then for good: a record of the tenant's day goes into the journal with the very turn in
which the request ended, and so each is counted once, whoever is killed when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from understudy.protocol.request import FinishReason
from understudy.protocol.usage import DayUsage
from understudy.runtime.control.fair_share import (
    IDLE_TENANTS_MAX,
    KV_TOKEN_S_COST,
    OUTPUT_TOKEN_COST,
    PROMPT_TOKEN_COST,
    FairShare,
)
from understudy.runtime.control.forecast import Course, Forecast, Promise
from understudy.runtime.control.ledger import Entry
from understudy.runtime.control.registry import Member
from understudy.runtime.control.tenancy import PolicyOf, TenantLimits
from understudy.runtime.storage.image import USAGE_DAYS_KEPT
from understudy.runtime.storage.records import Usage

USUAL_LENGTH: Final = 16.0
"""What a tenant's first answer is taken to have."""


class _Meter:
    """What was charged of one living request."""

    __slots__ = (
        "cached",
        "forecast",
        "had_to_wait",
        "has_run",
        "kv_token_s",
        "num_beside",
        "output",
        "settled_at",
    )

    def __init__(self, entry: Entry, now: float, forecast: Promise | None) -> None:
        self.output = entry.num_answer_tokens
        self.cached = entry.num_cached_tokens
        self.has_run = entry.attempt > 0
        self.settled_at = now
        self.kv_token_s = 0.0
        self.forecast = forecast
        self.num_beside = 0
        self.had_to_wait = False


class Accounts:
    """The accounts of all tenants.

    Args:
        policy_of: Gives a tenant's policy.
        today: Gives the day, in days since 1970.
    """

    def __init__(self, policy_of: PolicyOf, today: Callable[[], int]) -> None:
        self.fair_share = FairShare(policy_of)
        self.limits = TenantLimits(policy_of)
        self.forecast = Forecast()
        self._today = today
        self._meters: dict[int, _Meter] = {}
        self._lengths: dict[str, float] = {}
        """How long the answers of each tenant are of late."""
        self._usage: dict[str, dict[int, DayUsage]] = {}
        self._changed: set[tuple[str, int]] = set()

    def begin(self, entry: Entry, now: float, forecast: Promise | None) -> None:
        """A request was taken in, with this forecast."""
        self._meters[entry.request_id] = _Meter(entry, now, forecast)
        request = entry.request
        self.limits.begin(
            request.tenant,
            num_prompt_tokens=request.num_prompt_tokens,
            now=now,
            num_calls=int(request.request_id == request.group_id),
        )

    def resume(self, entry: Entry, now: float) -> None:
        """A request of an earlier supervisor goes on."""
        self._meters[entry.request_id] = _Meter(entry, now, None)
        self.limits.begin(entry.request.tenant, num_prompt_tokens=0, now=now, num_calls=0)

    def assigned(self, entry: Entry, engine: Member, num_beside: int, now: float) -> None:
        """A request was given to an engine, which has ``num_beside`` with it."""
        num_places = 0 if engine.capacity is None else engine.capacity.max_num_seqs
        meter = self._meters[entry.request_id]
        meter.settled_at = now
        if not meter.has_run:
            meter.has_run = True
            meter.num_beside = num_beside
            meter.had_to_wait = num_beside > num_places
            request = entry.request
            usual = self._lengths.get(request.tenant, USUAL_LENGTH)
            meter.output = entry.num_answer_tokens + min(int(usual), request.max_answer_tokens)
            prompt_cost = PROMPT_TOKEN_COST * request.num_prompt_tokens
            cost = prompt_cost + OUTPUT_TOKEN_COST * meter.output
            self.fair_share.charge(request.tenant, cost)

    def settle(self, entry: Entry, now: float) -> None:
        """Charge what a request has had since the last time."""
        meter = self._meters[entry.request_id]
        output = entry.num_answer_tokens
        # While it runs only what is more than expected is charged, at its end the rest given back.
        counted = output if entry.finish else max(output, meter.output)
        cost = OUTPUT_TOKEN_COST * (counted - meter.output)
        if entry.output and entry.engine is not None:
            kv_token_s = entry.num_tokens * max(0.0, now - meter.settled_at)
            meter.kv_token_s += kv_token_s
            cost += KV_TOKEN_S_COST * kv_token_s
        if entry.num_cached_tokens != meter.cached:
            cost -= PROMPT_TOKEN_COST * (entry.num_cached_tokens - meter.cached)
            meter.cached = entry.num_cached_tokens
        meter.output = counted
        meter.settled_at = now
        if cost:
            self.fair_share.charge(entry.request.tenant, cost)

    def end(self, entry: Entry, now: float) -> None:
        """A request has ended; its engine is still noted in the entry if it had one."""
        self.settle(entry, now)
        meter = self._meters.pop(entry.request_id)
        output = entry.num_answer_tokens
        life_s = now - entry.admitted_at
        if meter.has_run and entry.request.pooling is None:
            self._note_length(entry.request.tenant, output)
        self.limits.end(entry.request.tenant, num_output_tokens=output, life_s=life_s, now=now)
        if meter.has_run:
            self._bill(entry, meter.kv_token_s)
        self._learn(entry, meter, now)

    def usage(self, tenant: str) -> tuple[DayUsage, ...]:
        """What a tenant has used, day by day."""
        days = self._usage.get(tenant, {})
        return tuple(days[day] for day in sorted(days))

    def restore(self, kept: Iterable[Usage]) -> None:
        """Take over the usage that an earlier supervisor wrote down."""
        for one in kept:
            self._usage.setdefault(one.tenant, {})[one.usage.day] = one.usage

    def take_records(self) -> list[Usage]:
        """The days that have changed since the last call."""
        if not self._changed:
            return []
        changed, self._changed = sorted(self._changed), set()
        return [Usage(tenant, self._usage[tenant][day]) for tenant, day in changed]

    def check_integrity(self, living: Iterable[Entry]) -> None:
        """Every living request has a meter, and each tenant's concurrency is right."""
        entries = list(living)
        assert self._meters.keys() == {entry.request_id for entry in entries}
        for tenant in {entry.request.tenant for entry in entries}:
            count = sum(entry.request.tenant == tenant for entry in entries)
            assert self.limits.concurrency(tenant) == count

    def _note_length(self, tenant: str, num_tokens: int) -> None:
        usual = self._lengths.pop(tenant, float(num_tokens))
        self._lengths[tenant] = usual + (num_tokens - usual) / 8
        if len(self._lengths) > IDLE_TENANTS_MAX:
            del self._lengths[next(iter(self._lengths))]

    def _bill(self, entry: Entry, kv_token_s: float) -> None:
        tenant, day = entry.request.tenant, self._today()
        days = self._usage.setdefault(tenant, {})
        before = days.get(day) or DayUsage(day, 0, 0, 0, 0, 0.0)
        days[day] = DayUsage(
            day,
            before.requests + 1,
            before.prompt_tokens + entry.request.num_prompt_tokens,
            before.cached_tokens + entry.num_cached_tokens,
            before.output_tokens + entry.num_answer_tokens,
            before.kv_token_s + kv_token_s,
        )
        self._changed.add((tenant, day))
        if len(days) > USAGE_DAYS_KEPT:
            del days[min(days)]

    def _learn(self, entry: Entry, meter: _Meter, now: float) -> None:
        """Compare what was forecast with what came of it."""
        has_ended_itself = entry.finish in {FinishReason.STOP, FinishReason.LENGTH}
        is_plain = (
            entry.attempt == 1
            and entry.output
            and entry.assigned_at
            and not entry.request.params.echoed
        )
        if has_ended_itself and is_plain:
            course = Course(
                num_prompt_tokens=entry.request.num_prompt_tokens - entry.num_cached_tokens,
                num_output_tokens=entry.num_answer_tokens,
                prefill_s=entry.first_token_at - entry.assigned_at,
                decode_s=now - entry.first_token_at,
                num_beside=meter.num_beside,
                had_to_wait=meter.had_to_wait,
            )
            self.forecast.learn(course)
        was_late = entry.finish == FinishReason.DEADLINE
        if meter.forecast is None or not (has_ended_itself or was_late):
            return
        first_token_at = entry.first_token_at if entry.output else now
        self.forecast.judge(
            meter.forecast,
            first_token_s=first_token_at - entry.admitted_at,
            finish_s=now - entry.admitted_at,
        )
