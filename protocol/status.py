"""How things are, as the supervisor tells the command line."""

from __future__ import annotations

from typing import NamedTuple


class EngineStatus(NamedTuple):
    """One engine as the supervisor sees it."""

    name: str
    state: str
    """``serving``, ``testing``, ``draining``, ``dead``, or ``broken``: it stays down."""
    pid: int
    epoch: int
    restarts: int
    running: int
    waiting: int
    outstanding: int
    blocks_free: int
    blocks_total: int
    step: int
    beat_age_s: float
    numerics: str = ""
    """The class of its numerics."""
    num_shed: int = 0
    """Steps that did not fit its memory, and were planned anew."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    """Of the drafted tokens."""


class GatewayStatus(NamedTuple):
    """One gateway as the supervisor sees it."""

    name: str
    pid: int
    address: str
    streams: int
    beat_age_s: float
