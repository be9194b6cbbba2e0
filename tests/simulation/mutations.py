"""Planted bugs: does anybody notice? ``python -m tests.simulation.mutations [NAME …]``.

Each mutation changes one place of the product, in a copy of the tree. First the random histories
are played until one fails; if none does, the unit tests of the room are run. A mutation that
survives both is a hole in what we look at.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
SEEDS: Final = 80
_FOLDERS: Final = ("protocol", "runtime", "actors", "tools", "tests", "deploy")
_TIMEOUT_S: Final = 300.0

_LEDGER: Final = "runtime/control/ledger.py"
_DISPATCHER: Final = "runtime/control/dispatcher.py"
_SUPERVISOR: Final = "actors/supervisor.py"
_GATEWAY: Final = "actors/gateway.py"
_ENGINE: Final = "actors/engine.py"
_SESSION: Final = "runtime/kit/session.py"
_REGISTRY: Final = "runtime/control/registry.py"
_SCHEDULER: Final = "runtime/scheduling/scheduler.py"


class Mutation(NamedTuple):
    """A bug: in this file, this text becomes that."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """The unit tests of the room, for what no history shows."""


_CONTROL: Final = "tests/unit/control"
_ACTORS: Final = (
    "tests/unit/actors/test_supervisor.py tests/unit/actors/test_supervisor_recovery.py"
    " tests/unit/actors/test_supervisor_sessions.py"
    " tests/unit/actors/test_gateway.py"
)
_ENGINES: Final = "tests/unit/actors/test_engine.py"

MUTATIONS: Final = (
    Mutation(
        "drop the fence",
        _LEDGER,
        "if entry is None or entry.engine != engine or entry.epoch != epoch:",
        "if entry is None:",
        _CONTROL,
    ),
    Mutation(
        "forget which attempt it is",
        _LEDGER,
        "        if entry.attempt != row.attempt:\n            return Verdict.STALE\n",
        "",
        _CONTROL,
    ),
    Mutation(
        "take rows at any position",
        _LEDGER,
        "        if row.position != len(entry.output):\n            return Verdict.BROKEN\n",
        "",
        _CONTROL,
    ),
    Mutation(
        "do not check the prefix hash",
        _LEDGER,
        "        if prefix_hash != row.prefix_hash:\n            return Verdict.BROKEN\n",
        "",
        _CONTROL,
    ),
    Mutation(
        "adopt from any attempt",
        _LEDGER,
        "if entry is None or entry.attempt != row.attempt or entry.engine not in {None, engine}:",
        "if entry is None:",
        _CONTROL,
    ),
    Mutation(
        "forget ended requests at once",
        _LEDGER,
        "is_old = now >= oldest.ended_at + RETENTION_S",
        "is_old = True",
        _CONTROL,
    ),
    Mutation(
        "send before the journal is written",
        _SUPERVISOR,
        "        self._journal.append(self._dispatcher.take_records())\n"
        "        self._journal.commit(now)\n",
        "        self._journal.commit(now)\n"
        "        self._journal.append(self._dispatcher.take_records())\n",
        _ACTORS,
    ),
    Mutation(
        "journal no ends",
        _DISPATCHER,
        "        self._records.append(records.End(entry.request_id, finish, code, message))\n",
        "",
        _ACTORS,
    ),
    Mutation(
        "journal no tokens that an inventory brought",
        _DISPATCHER,
        "                self._records.append(records.Step((rest,)))\n",
        "",
        _ACTORS,
    ),
    Mutation(
        "resume off by one",
        _DISPATCHER,
        "        output = tuple(entry.output)\n",
        "        output = tuple(entry.output[:-1])\n",
        _ACTORS,
    ),
    Mutation(
        "resume without the output",
        _ENGINE,
        "Sequence(assign.request, attempt=assign.attempt, output=assign.output)",
        "Sequence(assign.request, attempt=assign.attempt, output=())",
        _ENGINES,
    ),
    Mutation(
        "leave orphans where they are",
        _DISPATCHER,
        "        self.totals.resumed += 1\n        self._enqueue(entry, now)\n",
        "        self.totals.resumed += 1\n",
        _ACTORS,
    ),
    Mutation(
        "take nothing back after an inventory",
        _DISPATCHER,
        "sorted(engine.unclaimed & self._with_engine[engine.identity])",
        "sorted(set[int]())",
        _ACTORS,
    ),
    Mutation(
        "do not stop engines at what has ended",
        _DISPATCHER,
        "        if entry.engine is not None:\n"
        "            self._outbox.send(entry.engine, Cancel(entry.request_id))\n",
        "",
        _ACTORS,
    ),
    Mutation(
        "run a cancelled request",
        _DISPATCHER,
        "        self._queue.remove(request_id)\n        if entry.engine is not None:\n",
        "        if entry.engine is not None:\n",
        _ACTORS,
    ),
    Mutation(
        "cancel the new attempt with the old",
        _DISPATCHER,
        "if not row.finish and not is_anew:",
        "if not row.finish:",
        _ACTORS,
    ),
    Mutation(
        "tell who joins nothing of what was",
        _DISPATCHER,
        "        if position < len(entry.output) or entry.finish:\n",
        "        if entry.finish:\n",
        _ACTORS,
    ),
    Mutation(
        "cancel what a dead gateway had at once",
        _DISPATCHER,
        "                self.audience.miss(entry, now)\n",
        "                self._end(entry, FinishReason.CANCELLED, now)\n",
        _ACTORS,
    ),
    Mutation(
        "queue what its engine still has",
        _DISPATCHER,
        "            self._with_engine[entry.engine].add(entry.request_id)\n\n",
        "            self._enqueue(entry, now)\n\n",
        _ACTORS,
    ),
    Mutation(
        "give an epoch twice",
        _REGISTRY,
        "        self._next_epoch += 1\n",
        "",
        _CONTROL,
    ),
    Mutation(
        "keep the epoch after a loss",
        _REGISTRY,
        "        member.epoch = self._take_epoch()\n        return Greeting(member, True, None)\n",
        "        return Greeting(member, True, None)\n",
        _CONTROL,
    ),
    Mutation(
        "let an old incarnation take the name",
        _REGISTRY,
        "            if _incarnation(identity) < _incarnation(present.identity):\n"
        "                return None\n",
        "",
        _CONTROL,
    ),
    Mutation(
        "deliver what was delivered",
        _GATEWAY,
        "        known = self.position - row.position\n",
        "        known = 0\n",
        _ACTORS,
    ),
    Mutation(
        "reclaim nothing",
        _GATEWAY,
        "        self.outbox.send(SUPERVISOR, Reclaim(tuple(held)))\n",
        "",
        _ACTORS,
    ),
    Mutation(
        "reclaim one too far",
        _GATEWAY,
        "HeldRequest(number, one.next_position)",
        "HeldRequest(number, one.next_position + 1)",
        _ACTORS,
    ),
    Mutation(
        "submit once only",
        _GATEWAY,
        "            if opened.request is not None:\n"
        "                late = hastened(opened.request, now - opened.submitted_at)\n"
        "                self.outbox.send(SUPERVISOR, Submit(late))\n",
        "            pass\n",
        _ACTORS,
    ),
    Mutation(
        "hear stale frames",
        _SESSION,
        "if session is None or envelope.epoch != session.epoch:",
        "if session is None:",
        "tests/unit/kit/test_session.py",
    ),
    Mutation(
        "deliver duplicates",
        _SESSION,
        "        if seq <= self._received:\n            return []\n",
        "        if seq <= self._received:\n            return [message]\n",
        "tests/unit/kit/test_session.py",
    ),
    Mutation(
        "never send again",
        _SESSION,
        "            frames += again\n",
        "",
        "tests/unit/kit/test_session.py",
    ),
    Mutation(
        "report what was cancelled",
        _ENGINE,
        "        return output is not None and output.sequence.attempt == row.attempt\n",
        "        return output is not None\n",
        _ENGINES,
    ),
    Mutation(
        "keep an inventory to oneself",
        _ENGINE,
        "                self._tell_inventory()\n",
        "                pass\n",
        _ENGINES,
    ),
    Mutation(
        "forget ends while nobody listens",
        _ENGINE,
        "                self._ended[row.request_id] = _Ended(output, self._clock.now())\n",
        "",
        _ENGINES,
    ),
    Mutation(
        "keep the blocks of what has ended",
        _SCHEDULER,
        "            self._kv_cache_manager.free(sequence)\n        else:\n",
        "        else:\n",
        "tests/unit/scheduling",
    ),
    Mutation(
        "stop before the least number of tokens",
        "runtime/scheduling/sequence.py",
        "num_tokens - self.num_prompt_tokens - len(self.params.echoed) > self.params.min_tokens",
        "num_tokens > self.num_prompt_tokens",
        "tests/unit/scheduling",
    ),
    Mutation(
        "preempt and believe it computed",
        "runtime/scheduling/preemption.py",
        "    victim.num_computed_tokens = 0\n",
        "",
        "tests/unit/scheduling",
    ),
    Mutation(
        "never give up the silent",
        "runtime/control/health.py",
        "SILENT_AFTER_S: Final = 1.5",
        "SILENT_AFTER_S: Final = 1e9",
        _CONTROL,
    ),
    Mutation(
        "deliver a vector without writing it down",
        "runtime/storage/records.py",
        "    if row.vector:\n",
        "    if row.vector and not row.finish:\n",
        "tests/unit/actors/test_pooled_requests.py",
    ),
    Mutation(
        "tell a late joiner the end and not the vector",
        _LEDGER,
        "                    vector=self.vector,\n",
        "",
        "tests/unit/actors/test_pooled_requests.py",
    ),
    Mutation(
        "leave the vector out of an inventory",
        _ENGINE,
        "            vector=self.vector,\n",
        "",
        "tests/unit/actors/test_pooled_requests.py",
    ),
)


def problem_with(mutation: Mutation) -> str:
    """Why a mutation cannot be planted any more; empty if it can."""
    count = (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)
    return "" if count == 1 else f"{mutation.name}: found {count} times in {mutation.file}"


@contextmanager
def planted(mutation: Mutation) -> Iterator[Path]:
    """A copy of the tree with the bug in it."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for folder in _FOLDERS:
            shutil.copytree(
                ROOT / folder,
                root / folder,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"),
            )
        shutil.copy(ROOT / "pyproject.toml", root)
        file = root / mutation.file
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        yield root


def found_by(mutation: Mutation) -> str:
    """What notices the bug: ``simulation``, ``unit tests``, or nothing."""
    with planted(mutation) as root:
        if _fails(root, "-m", "tests.simulation.mutations", "--until-failure", str(SEEDS)):
            return "simulation"
        arguments = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests.split())
        return "unit tests" if _fails(root, *arguments) else ""


def _fails(root: Path, *arguments: str) -> bool:
    environment = os.environ | {"PYTHONPATH": str(root / "deploy/editable"), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=root,
            env=environment,
            check=False,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return True  # a history that never ends is noticed, too
    return done.returncode != 0


def _play_until_failure(count: int) -> int:
    from tests.simulation.chaos import SeedFailed, play

    for seed in range(count):
        try:
            play(seed)
        except SeedFailed:
            return 1
    return 0


def main(words: list[str]) -> int:
    """Plant each bug and print who found it; 1 if nobody found one."""
    if words[:1] == ["--until-failure"]:
        return _play_until_failure(int(words[1]))
    chosen = [mutation for mutation in MUTATIONS if not words or mutation.name in words]
    results = []
    for mutation in chosen:
        started_at = time.monotonic()
        results.append(found_by(mutation))
        took_s = time.monotonic() - started_at
        print(f"{mutation.name:45} {results[-1] or 'NOT FOUND':12} {took_s:4.0f} s", flush=True)
    found = len(results) - results.count("")
    by_simulation = results.count("simulation")
    print(f"{found} of {len(results)} found, {by_simulation} of them by the simulation")
    return 0 if found == len(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
