"""The fakes beside ``runtime.kit.stage``, ``runtime.kit.probe`` and the journal.

Everything that a supervisor asks of its machine, kept in memory: step cards, process states, what
was killed, and what was written down, so that the next supervisor can read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from understudy.protocol.request import Request
from understudy.runtime.control.health import ProcessState
from understudy.runtime.control.ledger import Entry
from understudy.runtime.storage.journal import Degraded
from understudy.runtime.storage.records import Admit, Assign, End, Record, Step


class VirtualCard:
    """An engine's step card."""

    def __init__(self) -> None:
        self.request_ids: list[int] = []

    def enter(self, request_ids: list[int]) -> None:
        """See ``FileStepCard``."""
        self.request_ids = request_ids

    def leave(self) -> None:
        """See ``FileStepCard``."""
        self.request_ids = []


class VirtualStage:
    """The machine: its processes by pid, and the cards of its engines by identity."""

    def __init__(self) -> None:
        self.cards: dict[str, VirtualCard] = {}
        self.killed: list[int] = []
        self.states: dict[int, ProcessState] = {}
        self.on_kill: Callable[[int], None] = lambda _pid: None
        self.convicts: list[Request] = []

    def fatal_step(self, name: str, identity: str) -> frozenset[int]:
        """See ``NodeStage``."""
        card = self.cards.get(identity)
        return frozenset() if card is None else frozenset(card.request_ids)

    def kill(self, pid: int, start_time: int) -> None:
        """See ``NodeStage``."""
        self.killed.append(pid)
        self.states[pid] = ProcessState.ENDING
        self.on_kill(pid)

    def keep_convict(self, request: Request) -> None:
        """See ``NodeStage``."""
        self.convicts.append(request)

    def state(self, pid: int, start_time: int) -> ProcessState:
        """See ``ProcProbe``."""
        return self.states.get(pid, ProcessState.UNKNOWN)


class MemoryStore:
    """A journal that outlives its supervisor, and no machine."""

    wake_at: float | None = None
    degraded: Degraded | None = None

    def __init__(self) -> None:
        self._pending: list[Record] = []
        self._written: list[Record] = []

    def append(self, added: Sequence[Record]) -> None:
        """See ``Journal``."""
        self._pending += added

    def commit(self, now: float) -> None:
        """See ``Journal``."""
        self._written += self._pending
        self._pending = []

    def recover(self) -> list[Entry]:
        """What was written: every request, as the ledger knew it. What was not is lost."""
        self._pending = []
        entries: dict[int, Entry] = {}
        for record in self._written:
            match record:
                case Admit(request, _, admitted_at):
                    entries[request.request_id] = Entry(request, admitted_at)
                case Assign(request_id, attempt, engine, epoch):
                    entry = entries[request_id]
                    entry.attempt, entry.engine, entry.epoch = attempt, engine, epoch
                case Step(rows):
                    for row in rows:
                        entry = entries[row.request_id]
                        assert row.position == len(entry.output)
                        entry.output += row.tokens
                        entry.logprobs += row.logprobs
                        entry.prefix_hash = row.prefix_hash
                        if row.finish:
                            entry.finish, entry.engine = row.finish, None
                case End(request_id, reason, code, message):
                    entry = entries[request_id]
                    entry.finish, entry.engine = int(reason), None
                    entry.error_code, entry.error_message = code, message
                case _:
                    pass
        return list(entries.values())
