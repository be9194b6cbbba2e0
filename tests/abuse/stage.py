"""A real cluster that is abused, and the streams beside that must not notice."""

from __future__ import annotations

import json
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

from tests.chaos.clients import Outcome, compare, run_calls
from tests.chaos.workload import mixed_calls
from tests.cluster import Cluster, run_understudy, running_cluster

GOLDEN_STREAMS: Final = 6
GOLDEN_TOKENS: Final = 60
ECHO_RATE: Final = "--echo-tokens-per-s=100"


class Stage:
    """The cluster, a key for who abuses it, and one for those beside."""

    def __init__(self, cluster: Cluster, hostile_key: str, golden_key: str) -> None:
        self.cluster = cluster
        self.hostile_key = hostile_key
        self.golden_key = golden_key
        self.base_url = cluster.base_url
        address = urlsplit(self.base_url)
        assert address.hostname is not None
        assert address.port is not None
        self.host, self.port = address.hostname, address.port
        self.pids = cluster.pids()

    def document(self) -> Any:
        """What is served, as OpenAPI has it."""
        request = urllib.request.Request(
            f"{self.base_url}/openapi.json", headers={"x-api-key": self.hostile_key}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def problems(self) -> list[str]:
        """What the cluster says of itself that it would not say if nothing had happened."""
        found = []
        if (pids := self.cluster.pids()) != self.pids:
            found.append(f"the processes were {self.pids}, and are {pids}")
        report = self.cluster.report()
        if report.reason:
            found.append(report.reason)
        found += [
            f"{engine.name} was restarted {engine.restarts} times"
            for engine in self.cluster.reply().engines
            if engine.restarts
        ]
        found += [
            line[:500]
            for line in self.cluster.log.splitlines()
            if '"level": "error"' in line or '"level": "critical"' in line or "Traceback" in line
        ]
        return found


class Beside:
    """The same streams again and again, for as long as the abuse lasts."""

    def __init__(self, stage: Stage, *, seed: int) -> None:
        self._stage = stage
        mix = mixed_calls(GOLDEN_STREAMS, seed=seed, max_tokens=GOLDEN_TOKENS)
        self._calls = [call._replace(key=stage.golden_key) for call in mix]
        self._golden = self._run()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._again_and_again)
        self.num_streams = 0
        self.problems: list[str] = [one.problem for one in self._golden if one.problem]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> list[Outcome]:
        return run_calls(self._stage.base_url, self._calls)

    def _again_and_again(self) -> None:
        while True:
            compared = compare(self._golden, self._run())
            self.num_streams += compared.num_calls
            if not compared.is_golden or compared.num_joins:
                self.problems.append(
                    f"of {compared.num_calls} streams beside {compared.num_failed} failed, "
                    f"{compared.num_changed} changed, {compared.num_joins} were cut: "
                    f"{compared.problems}"
                )
            if self._is_over.is_set():
                return


@contextmanager
def on_stage(
    *flags: str, engine: str = "echo", environment: Mapping[str, str] | None = None
) -> Iterator[Stage]:
    """Two engines that serve whoever has one of two keys."""
    with ExitStack() as stack:
        key_file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "keys.json"
        keys = [_make_key(key_file, tenant) for tenant in ("hostile", "golden")]
        rate = (ECHO_RATE,) if engine == "echo" else ()
        parsers = ("--tool-call-parser=hermes", "--reasoning-parser=qwen3")
        cluster = stack.enter_context(
            running_cluster(
                f"--key-file={key_file}",
                *(*rate, *parsers, *flags),
                engine=engine,
                environment=environment,
            )
        )
        yield Stage(cluster, *keys)


def _make_key(key_file: Path, tenant: str) -> str:
    made = run_understudy("keys", "add", tenant, f"--key-file={key_file}")
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()
