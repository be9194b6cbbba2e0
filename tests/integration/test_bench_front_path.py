"""The front-path measurement against a real cluster of echo engines."""

from __future__ import annotations

import asyncio
from pathlib import Path

from understudy.tools.bench.front_path import Load, measure
from understudy.tools.bench.serve import first_model
from understudy.tools.bench.servers import ROLES, echo_cluster


def test_a_cluster_is_started_measured_by_role_and_ended() -> None:
    load = Load("short", "short", 4, 6, 0.5, 100.0)
    with echo_cluster("two", num_engines=2, tokens_per_s=load.tokens_per_s) as server:
        model = first_model(server.target, None)
        assert model is not None
        figures = asyncio.run(measure(server, load, model=model, seed=0))
        assert set(server.cpu_s_by_role()) == {*ROLES, "other"}
    assert figures["tokens_per_s"] > 0.0
    assert 0.0 <= figures["delay_p50_ms"] <= 10.0
    assert not Path(f"/proc/{server.pid}").exists()
