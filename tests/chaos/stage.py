"""The cluster under chaos, and the hand that disturbs it."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Final

from tests.chaos.clients import KEYS, Call, Comparison, Outcome, Progress, compare, run_calls
from tests.chaos.figures import Size
from tests.chaos.proxy import Proxy
from tests.cluster import WAIT_MAX_S, Cluster, empty_cluster, running_cluster
from understudy.protocol.messages import StatusReply

PARSERS: Final = ("--tool-call-parser=hermes", "--reasoning-parser=deepseek_r1")
"""A model of this format begins with thoughts whatever the prompt: any model is one that thinks."""
SABOTAGE: Final = Path(__file__).with_name("sabotage")
_LOOK_EVERY_S: Final = 0.002


class Stage:
    """A running cluster, what it does undisturbed, and ways to disturb it."""

    def __init__(self, cluster: Cluster, fault_dir: Path) -> None:
        self.cluster = cluster
        self.fault_dir = fault_dir

    def golden(self, calls: Sequence[Call]) -> list[Outcome]:
        """What the calls are answered with when nothing happens."""
        outcomes = run_calls(self.cluster.base_url, calls)
        problems = {outcome.problem for outcome in outcomes} - {""}
        assert not problems, problems
        return outcomes

    def disturbed(
        self,
        calls: Sequence[Call],
        golden: Sequence[Outcome],
        fault: Callable[[Progress], None],
    ) -> Comparison:
        """Run the calls again with a fault beside them, and compare."""
        return compare(golden, run_calls(self.cluster.base_url, calls, fault))

    def pid(self, name: str) -> int:
        """The process that plays a part now."""
        return self.cluster.pids()[name]

    def kill(self, name: str) -> int:
        """``kill -9``; gives the pid that it was."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_for_reply(self, is_so: Callable[[StatusReply], bool]) -> float:
        """Wait until the supervisor says something; gives the time at which it did."""
        deadline = time.monotonic() + WAIT_MAX_S
        while time.monotonic() < deadline:
            reply = self.cluster.report().reply
            if reply is not None and is_so(reply):
                return time.monotonic()
            time.sleep(_LOOK_EVERY_S)
        raise AssertionError(f"it never came to be\n{self.cluster.log}")

    def wait_until_fallen(self, name: str, pid: int) -> float:
        """Wait until the supervisor knows that this process serves no more; gives the time."""
        return self.wait_for_reply(
            lambda reply: (
                not any(
                    (engine.name, engine.pid, engine.state) == (name, pid, "serving")
                    for engine in reply.engines
                )
            )
        )

    def wait_until_whole(self, engines: int) -> float:
        """Wait until all engines serve again, and a gateway."""
        return self.wait_for_reply(
            lambda reply: (
                sum(engine.state == "serving" for engine in reply.engines) == engines
                and bool(reply.gateways)
            )
        )

    def sabotage(self, name: str, fault: str) -> None:
        """Have an engine do what ``sabotage/sitecustomize.py`` describes; "engines": all."""
        path = self.fault_dir / name
        temporary = path.with_suffix(".new")
        temporary.write_text(fault)
        temporary.rename(path)

    def mend(self, name: str) -> None:
        """End a fault that lasts."""
        (self.fault_dir / name).unlink(missing_ok=True)


@contextmanager
def on_stage(*flags: str, engines: int = 2, size: Size | None = None) -> Iterator[Stage]:
    """A cluster whose engines can be sabotaged: of the kind that a size names, or echo engines."""
    with ExitStack() as stack:
        fault_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(
            running_cluster(
                *PARSERS,
                f"--key-file={write_keys(fault_dir)}",
                *flags,
                engines=engines,
                engine="echo" if size is None else size.engine,
                environment={
                    **({} if size is None else size.settings),
                    **sabotaged_environment(fault_dir),
                },
            )
        )
        yield Stage(cluster, fault_dir)


def sabotaged_environment(fault_dir: Path) -> dict[str, str]:
    """The environment of processes that look for faults there."""
    return {
        "CHAOS_DIR": str(fault_dir),
        "PYTHONPATH": os.pathsep.join((str(SABOTAGE), os.environ.get("PYTHONPATH", ""))),
    }


def write_keys(directory: Path) -> Path:
    """A key file with the clients' keys, each of a tenant of its own."""
    keys = [
        {"id": f"k{place}", "sha256": sha256(key.encode()).hexdigest(), "tenant": f"tenant-{place}"}
        for place, key in enumerate(KEYS)
    ]
    path = directory / "keys.json"
    path.write_text(json.dumps({"version": 1, "tenants": {}, "keys": keys}))
    path.chmod(0o600)
    return path


@contextmanager
def in_bad_weather(*flags: str, engines: int, seed: int) -> Iterator[tuple[Stage, Proxy]]:
    """Echo engines and a gateway that reach their supervisor through a proxy only."""
    with ExitStack() as stack:
        cluster = stack.enter_context(empty_cluster())
        members = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", prefix="us-")))
        proxy = stack.enter_context(
            Proxy(
                members / "supervisor.sock",
                cluster.run_dir / "supervisor.sock",
                seed=seed,
            )
        )
        cluster.start("supervisor")
        beyond = f"--run-dir={members}"
        for index in range(engines):
            cluster.start("engine", beyond, f"--name=engine-{index}", "--engine=echo", *flags)
        cluster.start("gateway", beyond, "--name=gateway-0", "--port=0", *PARSERS)
        stage = Stage(cluster, members)
        stage.wait_until_whole(engines)
        yield stage, proxy
