"""What ``status`` tells of an actor, from what its member of the registry knows."""

from __future__ import annotations

from understudy.protocol.status import EngineStatus, GatewayStatus
from understudy.runtime.control.registry import Member


def engine_status(member: Member, now: float, *, outstanding: int) -> EngineStatus:
    """Of an engine that has so many requests."""
    beat, capacity = member.beat, member.capacity
    return EngineStatus(
        name=member.name,
        state=member.state.value,
        pid=member.pid,
        epoch=member.epoch,
        restarts=member.restarts,
        running=0 if beat is None else beat.running,
        waiting=0 if beat is None else beat.waiting,
        outstanding=outstanding,
        blocks_free=0 if beat is None else beat.blocks_free,
        blocks_total=0 if capacity is None else capacity.num_blocks,
        step=0 if beat is None else beat.step,
        beat_age_s=now - member.heard_at,
        numerics=member.numerics,
        num_shed=0 if beat is None else beat.num_shed,
        num_draft_tokens=0 if beat is None else beat.num_draft_tokens,
        num_accepted_tokens=0 if beat is None else beat.num_accepted_tokens,
    )


def gateway_status(member: Member, now: float, *, streams: int) -> GatewayStatus:
    """Of a gateway that listens to so many requests."""
    return GatewayStatus(
        name=member.name,
        pid=member.pid,
        address=member.address,
        streams=streams,
        beat_age_s=now - member.heard_at,
    )
