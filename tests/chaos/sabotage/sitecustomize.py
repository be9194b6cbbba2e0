"""Faults inside real processes, for the chaos suite alone: nothing of this is in the product.

Python imports a module of this name from its path before anything else. With the environment
variable ``CHAOS_DIR`` set, every engine of the cluster looks, at each step, for a file of its name
in that directory, and does what it says, once or for as long as the file is there::

    hang                this step never returns
    hold SECONDS        this step holds the interpreter's lock for so long
    slow SECONDS        every step takes so much longer
    oom                 steps with more than one sequence do not fit the device
    nan REQUESTS        so many sequences get no finite numbers; 0: none does, and the engine ends
    poison TOKEN        a step with a prompt that begins with this token kills the process
    die WHEN TOKENS     the process is killed in the first step that a client's sequence begins with
                        so many tokens computed: before it, after it (nobody hears of it), or told
                        (a moment after what it brought was sent)
    start-dead          the process ends before it has joined
    numerics CLASS      the engine says that its numerics are of this class
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

DIRECTORY = os.environ.get("CHAOS_DIR", "")
CLOCK_FILE = "clock"
_TOLD_S = 0.002
"""Sending what a step brought takes less."""
_when_reported: list[threading.Timer] = []


def _name() -> str:
    """Which engine this process is, if it is one."""
    if "engine" not in sys.orig_argv:
        return ""
    for number, word in enumerate(sys.orig_argv):
        if word == "--name" and number + 1 < len(sys.orig_argv):
            return sys.orig_argv[number + 1]
        if word.startswith("--name="):
            return word.partition("=")[2]
    return "engine-0"


def _fault() -> list[str]:
    for name in (_name(), "engines"):
        try:
            return (Path(DIRECTORY) / name).read_text().split()
        except OSError:
            continue
    return []


def _take() -> None:
    """A fault that happens once."""
    for name in (_name(), "engines"):
        (Path(DIRECTORY) / name).unlink(missing_ok=True)


def _before_step(plan: Any) -> None:
    from understudy.runtime.scheduling.decision import OutOfMemory

    match _fault():
        case ["hang"]:
            _take()
            while True:
                time.sleep(1)
        case ["hold", seconds]:
            _take()
            sys.setswitchinterval(1000)
            end = time.monotonic() + float(seconds)
            while time.monotonic() < end:
                pass
            sys.setswitchinterval(0.005)
        case ["slow", seconds]:
            time.sleep(float(seconds))
        case ["oom"]:
            if len(plan.scheduled) > 1:
                raise OutOfMemory("injected")
        case ["die", when, tokens] if _has_reached(plan, int(tokens)) and when != "after":
            _take()
            if when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            kill = threading.Timer(_TOLD_S, os.kill, (os.getpid(), signal.SIGKILL))
            _when_reported.append(kill)
        case ["poison", token]:
            if any(s.sequence.token_ids[0] == int(token) for s in plan.scheduled):
                os.kill(os.getpid(), signal.SIGKILL)
        case _:
            pass


def _has_reached(plan: Any, num_tokens: int) -> bool:
    """Whether a client's sequence begins this step so far; canaries have ids of 64 bits."""
    return any(
        (share.sequence.num_tokens if plan.is_ahead else share.sequence.num_computed_tokens)
        >= num_tokens
        and share.sequence.request_id >> 63 == 0
        for share in plan.scheduled
    )


def _after_step(plan: Any, drawn: Any) -> Any:
    from understudy.runtime.scheduling.decision import EngineFault

    while _when_reported:
        _when_reported.pop().start()
    match _fault():
        case ["die", "after", tokens] if _has_reached(plan, int(tokens)):
            _take()
            os.kill(os.getpid(), signal.SIGKILL)
        case ["nan", count] if drawn:
            if int(count) == 0:
                _take()
                raise EngineFault("injected: no logits are finite")
            if len(drawn) > int(count):
                _take()
                return dict(list(drawn.items())[int(count) :])
    return drawn


class _Flight:
    """A step that ends as the fault of the moment wants it."""

    def __init__(self, plan: Any, flight: Any) -> None:
        self._plan = plan
        self._flight = flight

    def collect(self) -> Any:
        return _after_step(self._plan, self._flight.collect())


def _sabotage() -> None:
    from understudy.actors import engine_process, loading
    from understudy.actors.loading import Loaded
    from understudy.runtime.config import EngineConfig
    from understudy.runtime.kit.clock import Clock

    def load_runner(config: EngineConfig, clock: Clock) -> Loaded:
        loaded = loading.load_runner(config, clock)
        runner: Any = loaded.runner
        launch = runner.launch

        def sabotaged(plan: Any) -> _Flight:
            _before_step(plan)
            return _Flight(plan, launch(plan))

        runner.launch = sabotaged
        match _fault():
            case ["start-dead"]:
                os._exit(1)
            case ["numerics", name]:
                return loaded._replace(numerics=name)
            case _:
                return loaded

    engine_process.load_runner = load_runner  # type: ignore[attr-defined]


class _Finder:
    """Sabotages the module that makes the engine as soon as it is imported."""

    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> Any:
        if name != "understudy.actors.engine_process":
            return None
        import importlib.util

        sys.meta_path.remove(_Finder)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            sys.modules[name] = module
            _sabotage()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _bend_the_clock() -> None:
    """The wall clock of this process is off by what a file says; nothing else is."""
    wall_clock = time.time

    def bent() -> float:
        try:
            return wall_clock() + float((Path(DIRECTORY) / CLOCK_FILE).read_text())
        except (OSError, ValueError):
            return wall_clock()

    time.time = bent


if DIRECTORY:
    _bend_the_clock()
    if _name():
        sys.meta_path.insert(0, _Finder)
