"""The replay: the second look at a journal, which builds the image record by record. Pure.

Nothing is believed beyond what is proven. Where records may be missing, every request that lived
is in *doubt*: what comes later is still put together, tentatively, and a later anchor, end or
checkpoint that fits in length and prefix hash proves that nothing of this request was missing.
What stays in doubt is cut back to what was certain.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from understudy.protocol.packed_logprobs import split_logprobs
from understudy.protocol.request import extend_prefix_hash
from understudy.runtime.storage import records
from understudy.runtime.storage.image import RUN_STEPS_MAX, Held, Image
from understudy.runtime.storage.records import HEADER, RECORD_HEAD_BYTES, STEP, EndMark
from understudy.runtime.storage.segments import LENGTH_AND_KIND, Header, RawRecord, Scan
from understudy.runtime.storage.steps import PLAIN_HEAD, StepPayload, deal_out, read_ends, read_step

_MALFORMED: Final = (struct.error, ValueError, IndexError, KeyError, UnicodeDecodeError)


class Cause(Enum):
    """Why a request is in doubt."""

    DAMAGE = "damage"
    """Records that were written are damaged or gone."""
    GAP = "gap"
    """The disk did not take records, and the writer knew."""


@dataclass(slots=True)
class Doubt:
    """A request of which records may be missing."""

    held: Held
    cause: Cause
    segment: int
    """Where the doubt began."""
    length: int
    """How much of the output is certain."""


class Replay:
    """Builds an image from the records of one segment after the other."""

    def __init__(self, image: Image, kept: frozenset[int]) -> None:
        self.image = image
        self.doubts: dict[int, Doubt] = {}
        """By serial."""
        self._kept = kept
        self._proofs: dict[int, EndMark] = {}
        """The latest anchor of each request, by serial; checked when all is read."""

    def segment(self, number: int, scan: Scan, data: bytes) -> str | None:
        """Take in a segment; gives what is wrong with it if its records do not fit together."""
        self.image.part_all()
        by_serial, unpack = self.image.by_serial, PLAIN_HEAD.unpack_from
        step_over, head = LENGTH_AND_KIND.unpack_from, RECORD_HEAD_BYTES
        position = 0
        try:
            while position < scan.valid_length:
                length, kind = step_over(data, position)
                start = position + head
                position = stop = start + length
                if kind == STEP and not data[start]:
                    # Nearly all records are like this one.
                    _, first = unpack(data, start)
                    start += PLAIN_HEAD.size
                    batch = by_serial[first].batch
                    if batch is None or stop - start != batch.step_bytes:
                        raise ValueError(first)
                    if batch.is_wanted:
                        batch.steps.append(array("I", data[start:stop]).tolist())
                        if len(batch.steps) >= RUN_STEPS_MAX:
                            batch.flush()
                elif kind == HEADER:
                    assert scan.header is not None
                    self._header(scan.header)
                else:
                    self._take(kind, data, start, stop, number)
        except _MALFORMED:
            return f"its record before byte {position} does not fit what came before"
        return None

    def rest(self, number: int, rest: Iterable[RawRecord], data: bytes) -> None:
        """Take in what lies behind damage in a segment: who came and went, but no tokens.

        A request that ended there has ended, and its stream cannot be joined again.
        """
        for _, kind, start, stop in rest:
            with contextlib.suppress(*_MALFORMED):
                if kind in {records.END, records.FINAL_STEP}:
                    marks = (
                        read_ends(data, start)
                        if kind == records.FINAL_STEP
                        else (records.decode_end_mark(data, start),)
                    )
                    for mark in marks:
                        self._forget(mark.serial)
                else:
                    self._take(kind, data, start, stop, number)

    def doubt_all(self, cause: Cause, segment: int) -> None:
        """Records may be missing here: everyone who lives is in doubt from now on."""
        self.image.part_all()
        for held in self.image.live.values():
            if held.serial not in self.doubts:
                self._doubt(held, cause, segment)

    def settle(self) -> list[Doubt]:
        """Check what was put together against its proofs; gives what is wrong or stays in doubt.

        Outputs in doubt are cut back to what is certain.
        """
        self.image.part_all()
        for held in [*self.image.live.values(), *self.image.ended.values()]:
            if held.serial not in self.doubts:
                self._check(held)
        for doubt in self.doubts.values():
            held = doubt.held
            if held.finish:
                self.image.forget(held)
            del held.output[doubt.length :]
            certain = split_logprobs(bytes(held.logprobs))[: doubt.length]
            held.logprobs = bytearray(b"".join(certain))
            held.prefix_hash = extend_prefix_hash(0, list(held.output))
            if held.finish:
                self.image.keep_ended(held)
        return list(self.doubts.values())

    def _take(self, kind: int, data: bytes, start: int, stop: int, number: int) -> None:
        if kind in {records.STEP, records.FINAL_STEP}:
            self._step(read_step(data, start, stop))
        elif kind == records.ADMIT:
            self._admit(data, start, stop, number)
        elif kind == records.ASSIGN:
            serial, attempt, epoch, engine = records.decode_assign(data, start, stop)
            held = self._held(serial)
            held.attempt, held.epoch, held.engine = attempt, epoch, engine
        elif kind == records.CACHE_HIT:
            serial, num_tokens = records.decode_cache_hit(data, start)
            self._held(serial).num_cached_tokens = num_tokens
        elif kind == records.VECTOR:
            serial, vector = records.decode_vector(data, start, stop)
            self._held(serial).vector = vector
        elif kind == records.USAGE:
            self.image.note_usage(records.decode_usage(data, start, stop))
        elif kind == records.END:
            mark, code, message = records.decode_end(data, start, stop)
            self._end(mark, code, message)
        elif kind == records.CHECKPOINT:
            self._restore(records.decode_checkpoint(data, start), number)
        elif kind == records.CLOCK:
            self.image.set_clock(records.decode_clock(data, start))
        elif kind == records.EPOCH:
            self.image.epoch = max(self.image.epoch, records.decode_epoch(data, start))
        elif kind == records.FORGET:
            self._forget_ended(records.decode_epoch(data, start))
        elif kind != records.RETIRE:
            raise ValueError(kind)

    def _forget_ended(self, request_id: int) -> None:
        held = self.image.ended.get(request_id)
        if held is not None:
            self.doubts.pop(held.serial, None)
            self.image.forget(held)

    def _header(self, header: Header) -> None:
        if header.has_gap:
            self.doubt_all(Cause.GAP, header.number)
        self.image.set_clock(header.clock)
        self.image.epoch = max(self.image.epoch, header.epoch)

    def _held(self, serial: int) -> Held:
        """A living request, or a stranger's placeholder.

        Strangers are requests that nobody asks for any more, and requests whose admission is in
        a segment that was retired, before their checkpoint comes.
        """
        held = self.image.by_serial.get(serial)
        if held is None:
            held = self.image.by_serial[serial] = Held(serial)
        return held

    def _admit(self, data: bytes, start: int, stop: int, number: int) -> None:
        serial, request_id = records.decode_admit_ids(data, start)
        held = self.image.by_serial[serial] = Held(serial)
        if serial in self._kept:
            held.request_id = request_id
            held.admit = records.decode_admit(data, start, stop)
            held.base = number
            held.is_kept = True
            self._enter(held)

    def _enter(self, held: Held) -> None:
        known = self.image.live.get(held.request_id)
        if known is not None:
            # Its end is among what is missing, or else it could not come again.
            self.doubts.pop(known.serial, None)
            self.image.forget(known)
        self.image.enter(held)

    def _step(self, step: StepPayload) -> None:
        if step.members is not None:
            batch = self.image.form_batch((), [self._held(serial) for serial in step.members])
        else:
            known = self.image.by_serial[step.first].batch
            if known is None:
                raise ValueError(step.first)
            batch = known
            if step.joined:
                batch.join((), [self._held(serial) for serial in step.joined])
        if len(batch.members) != step.num_rows:
            raise ValueError(step.first)
        if batch.is_wanted:
            if step.counts is None:
                batch.steps.append(array("I", step.tokens).tolist())
            else:
                deal_out(batch, step.counts, memoryview(step.tokens).cast("I"))
            for held, logprobs in zip(batch.members, step.logprobs, strict=False):
                if held.is_kept:
                    held.logprobs += logprobs
            if step.lengths:
                batch.flush()
                rows = zip(batch.members, step.lengths, step.prefix_hashes, strict=True)
                for held, length, prefix_hash in rows:
                    self._prove(held, EndMark(held.serial, 0, length, prefix_hash))
        for mark in step.ends:
            self._end(mark, "", "")

    def _end(self, mark: EndMark, code: str, message: str) -> None:
        held = self.image.by_serial.get(mark.serial)
        if held is None:
            return
        if held.batch is not None:
            held.batch.leave(held)
        if not held.is_kept:
            del self.image.by_serial[mark.serial]
            return
        self._prove(held, mark)
        if mark.serial not in self.doubts:
            self.image.end(held, mark.finish, self.image.clock, code, message)

    def _forget(self, serial: int) -> None:
        held = self.image.by_serial.get(serial)
        if held is not None and held.is_kept:
            self.doubts.pop(serial, None)
            self.image.forget(held)

    def _prove(self, held: Held, mark: EndMark) -> None:
        """A record says how long a request's output is, and what its hash is."""
        if not held.is_kept:
            return
        serial = held.serial
        fits = mark.length == len(held.output)
        if serial in self.doubts:
            output = list(held.output)
            if fits and extend_prefix_hash(0, output) == mark.prefix_hash:
                del self.doubts[serial]
                self._proofs[serial] = mark
        elif fits:
            self._proofs[serial] = mark
        else:
            proof = self._proofs.get(serial)
            held.update()
            doubt = Doubt(held, Cause.DAMAGE, held.base, 0 if proof is None else proof.length)
            self.doubts[serial] = doubt

    def _restore(self, payload: records.CheckpointPayload, number: int) -> None:
        serial = payload.serial
        if serial not in self._kept:
            return
        self.doubts.pop(serial, None)
        held = self.image.by_serial.get(serial)
        ended = self.image.ended.get(payload.request_id)
        if held is None and ended is not None and ended.serial == serial:
            self.image.forget(ended)
        held = self._held(serial)
        was_live = held.is_kept
        held.restore(payload, number)
        held.is_kept = True
        if held.batch is not None:
            held.batch.is_wanted = True
        self._proofs[serial] = EndMark(serial, 0, payload.length, payload.prefix_hash)
        if not payload.finish:
            if not was_live:
                self._enter(held)
            return
        if held.batch is not None:
            held.batch.leave(held)
        del self.image.by_serial[serial]
        if was_live:
            del self.image.live[held.request_id]
        self.image.keep_ended(held)

    def _doubt(self, held: Held, cause: Cause, segment: int) -> None:
        self.doubts[held.serial] = Doubt(held, cause, segment, len(held.output))

    def _check(self, held: Held) -> None:
        """Compare an output with the latest proof of it, and complete its hash."""
        output = list(held.output)
        proof = self._proofs.get(held.serial)
        proven = proof.length if proof is not None else 0
        prefix_hash = extend_prefix_hash(0, output[:proven])
        if proof is not None and prefix_hash != proof.prefix_hash:
            self.doubts[held.serial] = Doubt(held, Cause.DAMAGE, held.base, 0)
            return
        held.prefix_hash = extend_prefix_hash(prefix_hash, output[proven:])
