"""How long ``understudy status`` takes, most of which is imports."""

from __future__ import annotations

import resource
import time

import pytest

from tests.cluster import running_cluster

RUNS = 10
LIMIT_S = 0.2


@pytest.mark.perf
def test_status_takes_less_than_200_ms(capsys: pytest.CaptureFixture[str]) -> None:
    with running_cluster(engines=1) as cluster:
        walls, cpus = [], []
        for _ in range(RUNS):
            wall, cpu = time.perf_counter(), children_cpu_s()
            assert cluster.run("status").returncode == 0
            walls.append(time.perf_counter() - wall)
            cpus.append(children_cpu_s() - cpu)
    with capsys.disabled():
        print(f"\nstatus: best of {RUNS}: {min(walls):.3f} s of wall, {min(cpus):.3f} s of CPU")
    assert min(cpus) < LIMIT_S


def children_cpu_s() -> float:
    """CPU seconds of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
