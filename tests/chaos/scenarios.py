"""Every scenario by the name of its figure.

Golden is what the same calls are answered with in the same cluster when nothing happens. Only
what clients are told counts; the supervisor's own counters merely show that the fault took place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from tests.chaos import deaths, faults, long, network, steps
from tests.chaos.figures import Figure, Size

SCENARIOS: Final[Mapping[str, Callable[[Size], list[Figure]]]] = MappingProxyType(
    {
        "F1": deaths.f1_kill_each_engine,
        "F2": long.f2_large_process,
        "F3": steps.f3_every_step,
        "F4": long.f4_random_kills,
        "F5": faults.f5_freeze,
        "F6": faults.f6_slow_and_stuck,
        "F7": deaths.f7_kill_supervisor,
        "F8": deaths.f8_kill_supervisor_and_engine,
        "F9": deaths.f9_kill_gateway,
        "F10": deaths.f10_all_engines_die,
        "F12": network.f12_bad_bus,
        "F13": network.f13_cut_bus,
        "F16": faults.f16_out_of_memory,
        "F17": faults.f17_not_finite,
        "F18": deaths.f18_dead_at_start,
        "F19": faults.f19_poison,
        "F21": deaths.f21_rolling_restart,
        "F22": faults.f22_other_numerics,
        "F23": faults.f23_wall_clock,
        "F26": long.f26_soak,
        "O8": network.o8_duplicate_posts,
    }
)
