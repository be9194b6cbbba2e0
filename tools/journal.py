"""``understudy journal``: look into a supervisor's journal without changing anything.

Shows ids and counts; what was said only when asked for. Takes no lock, so it may run beside the
supervisor, and then sees a journal that changes under its eyes: an end may look torn.
"""

from __future__ import annotations

import argparse
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import FinishReason
from understudy.runtime.exit_status import ExitStatus
from understudy.runtime.storage import records
from understudy.runtime.storage.disk import OsDisk
from understudy.runtime.storage.image import Retention
from understudy.runtime.storage.recovery import Recovery, recover
from understudy.runtime.storage.segments import Header, RawRecord, scan, segment_number
from understudy.runtime.storage.steps import StepPayload, read_step

_EVERYTHING: Final = Retention(seconds=float("inf"), bytes_max=1 << 62)


class Event(NamedTuple):
    """One record, for people."""

    lsn: int
    text: str
    requests: tuple[int, ...]
    """The ids of the requests that it concerns, as far as they are known."""


def verify(directory: Path) -> Recovery:
    """Read everything, and check every output against its proofs.

    Raises:
        ConfigurationError: there is no journal, or it has a format that this version does not know.
    """
    _segments_of(directory)
    return recover(OsDisk(directory), _EVERYTHING, 0.0).recovery


def show(
    directory: Path, request_id: int | None = None, *, with_tokens: bool = False
) -> Iterator[str]:
    """A line for each record; of one request only, if one is named.

    Raises:
        ConfigurationError: there is no journal, or it has a format that this version does not know.
    """
    reader = _Reader(with_tokens=with_tokens)
    for path in _segments_of(directory):
        for event in reader.events(path.read_bytes()):
            if request_id is None or request_id in event.requests:
                yield f"{path.stem} {event.lsn:>12}  {event.text}"
        if reader.complaint is not None:
            yield f"{path.stem} {'':>12}  {reader.complaint}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of ``understudy journal``."""
    parser.description = "Look into a supervisor's journal without changing anything."
    actions = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True, dest="journal_action"
    )
    check = actions.add_parser("verify", help="read everything and name all damage")
    listing = actions.add_parser("show", help="a line for each record")
    listing.add_argument("--request", type=int, metavar="ID", help="of this request only")
    listing.add_argument("--tokens", action="store_true", help="show token ids, too")
    for action in (check, listing):
        action.add_argument("directory", type=Path, help="the journal's directory")
        action.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run an action; status 1 if the journal is damaged."""
    if arguments.journal_action == "show":
        for line in show(arguments.directory, arguments.request, with_tokens=arguments.tokens):
            print(line)
        return ExitStatus.DONE
    recovery = verify(arguments.directory)
    for line in _report(recovery):
        print(line)
    for damage in recovery.damage:
        affected = ", ".join(map(str, damage.affected)) or "none that is known"
        print(
            f"understudy: {damage.segment}: after byte {damage.offset}: {damage.reason};"
            f" requests that this fails: {affected}",
            file=sys.stderr,
        )
    return ExitStatus.FAILED if recovery.damage else ExitStatus.DONE


def _report(recovery: Recovery) -> Iterator[str]:
    statistics = recovery.statistics
    yield f"segments         {statistics.segments}"
    yield f"bytes            {statistics.num_bytes}"
    yield f"records          {statistics.records}"
    yield f"living requests  {len(recovery.live)}"
    yield f"ended requests   {len(recovery.ended)}"
    yield f"torn bytes       {statistics.torn_bytes}"
    yield f"gaps             {statistics.gaps}"
    yield f"lost admissions  {statistics.lost_admissions}"
    yield f"damaged places   {len(recovery.damage)}"


def _segments_of(directory: Path) -> list[Path]:
    try:
        paths = sorted(path for path in directory.iterdir() if segment_number(path.name))
    except OSError as error:
        raise ConfigurationError(f"{directory}: {error.strerror}") from error
    if not paths:
        raise ConfigurationError(f"{directory}: there is no journal here")
    return paths


class _Reader:
    """Reads segments one after the other, and knows requests by their serials."""

    def __init__(self, *, with_tokens: bool) -> None:
        self.complaint: str | None = None
        """What is wrong with the segment that was read last."""
        self._with_tokens = with_tokens
        self._ids: dict[int, int] = {}
        self._batches: dict[int, list[int]] = {}
        """The serials that come together, by each of them."""

    def events(self, data: bytes) -> Iterator[Event]:
        """What the records of a segment say."""
        found = scan(data)
        self._batches = {}
        self.complaint = found.damage
        if found.torn_bytes:
            self.complaint = f"{found.torn_bytes} bytes are torn, or just being written"
        for record in found.records(data):
            if record.kind == records.HEADER and found.header is not None:
                yield Event(record.lsn, _describe_header(found.header), ())
            else:
                yield self._event(record, data)

    def _event(self, record: RawRecord, data: bytes) -> Event:
        lsn, kind, start, stop = record
        match kind:
            case records.ADMIT | records.CHECKPOINT:
                serial, request_id = records.decode_admit_ids(data, start)
                self._ids[serial] = request_id
                describe = self._admit if kind == records.ADMIT else self._checkpoint
                return Event(lsn, describe(data, start, stop), (request_id,))
            case records.ASSIGN:
                assign = records.decode_assign(data, start, stop)
                text = f"to {assign.engine}, epoch {assign.epoch}, attempt {assign.attempt}"
                return self._about(lsn, f"assign {text}", [assign.serial])
            case records.CACHE_HIT:
                serial, num_tokens = records.decode_cache_hit(data, start)
                return self._about(lsn, f"{num_tokens} prompt tokens in the cache", [serial])
            case records.STEP | records.FINAL_STEP:
                return self._step(lsn, read_step(data, start, stop))
            case records.END:
                mark, code, message = records.decode_end(data, start, stop)
                reason = FinishReason(mark.finish).name.lower()
                why = f": {code} {message}" if code or message else ""
                text = f"end {reason} after {mark.length} tokens{why}"
                return self._about(lsn, text, [mark.serial])
            case records.FORGET:
                request_id = records.decode_epoch(data, start)
                return Event(lsn, f"forget {request_id}", (request_id,))
            case records.USAGE:
                used = records.decode_usage(data, start, stop)
                counts = used.usage
                text = f"{counts.prompt_tokens} + {counts.output_tokens} tokens"
                return Event(lsn, f"usage of {used.tenant or '-'} on day {counts.day}: {text}", ())
            case records.CLOCK:
                return Event(lsn, f"clock {records.decode_clock(data, start):.3f} s", ())
            case _:
                number = records.decode_epoch(data, start)
                return Event(lsn, f"{records.KIND_NAMES.get(kind, kind)} {number}", ())

    def _admit(self, data: bytes, start: int, stop: int) -> str:
        admit = records.unpack_admit(records.decode_admit(data, start, stop))
        request = admit.request
        prompt = f": {list(request.prompt)}" if self._with_tokens else ""
        return (
            f"admit {request.request_id} from {admit.gateway}, {len(request.prompt)} prompt"
            f" tokens, at most {request.params.max_tokens}{prompt}"
        )

    def _checkpoint(self, data: bytes, start: int, _stop: int) -> str:
        payload = records.decode_checkpoint(data, start)
        state = FinishReason(payload.finish).name.lower() if payload.finish else "living"
        output = f": {_tokens(payload.output)}" if self._with_tokens else ""
        return f"checkpoint {payload.request_id}, {state}, {payload.length} tokens{output}"

    def _step(self, lsn: int, step: StepPayload) -> Event:
        """Follow who is in the batch, as a recovery does."""
        if step.members is not None:
            batch = list(step.members)
        else:
            batch = [*self._batches.get(step.first, []), *step.joined]
        rows = tuple(batch)
        num_tokens = len(step.tokens) // 4
        text = f"step {len(rows)} requests, {num_tokens} tokens"
        if step.ends:
            text += f", {len(step.ends)} ended"
        if self._with_tokens:
            text += f": {_tokens(step.tokens)}"
        ended = {mark.serial for mark in step.ends}
        staying = [serial for serial in batch if serial not in ended]
        self._batches |= dict.fromkeys(staying, staying)
        return self._about(lsn, text, rows)

    def _about(self, lsn: int, text: str, serials: Sequence[int]) -> Event:
        ids = tuple(self._ids[serial] for serial in serials if serial in self._ids)
        if len(serials) == 1 and not text.startswith("step"):
            text = f"{text} ({ids[0] if ids else f'unknown, serial {serials[0]}'})"
        return Event(lsn, text, ids)


def _describe_header(header: Header) -> str:
    gap = ", after a gap" if header.has_gap else ""
    return f"segment {header.number}, needs {header.oldest_needed} and later{gap}"


def _tokens(data: bytes) -> list[int]:
    return array("I", data).tolist()
