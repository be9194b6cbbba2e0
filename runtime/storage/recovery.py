"""Recovery: from the files of a journal to the requests in them. Reads, and changes nothing.

What is torn at the very end was never acknowledged, and is left out. What is damaged anywhere else
is refused, named, and never guessed at: the requests that it may concern are told, so that they
fail loudly, and all others go on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final, NamedTuple

from understudy.protocol.request import FinishReason
from understudy.runtime.storage.disk import Disk
from understudy.runtime.storage.image import HeldRequest, Image, Retention, describe
from understudy.runtime.storage.records import Usage
from understudy.runtime.storage.replay import Cause, Doubt, Replay
from understudy.runtime.storage.segments import segment_name
from understudy.runtime.storage.survey import Part, Survey, survey

DAMAGE_CODE: Final = "journal_damaged"
"""The ``code`` with which requests end that damage has made uncertain."""
DAMAGE_MESSAGE: Final = "the journal was damaged, and it cannot be proven how far the answer got"


@dataclass(frozen=True, slots=True)
class Damage:
    """One place where the journal could not be believed."""

    segment: str
    """The file's name."""
    offset: int
    """What comes after this byte of the file was refused."""
    reason: str
    affected: tuple[int, ...]
    """The ids of the requests that may have lost something here: they are to fail."""


@dataclass(frozen=True, slots=True)
class RecoveryStatistics:
    """How much was read."""

    segments: int
    num_bytes: int
    records: int
    torn_bytes: int
    """Cut off the end: a write that the process did not live to finish."""
    gaps: int
    """How often the writer went on after the disk had not taken records."""
    behind: int
    """Living requests whose latest tokens fell into such a gap; they go on from before it."""
    lost_admissions: int
    """Requests that were admitted and of which nothing can be read any more."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a journal says."""

    live: tuple[HeldRequest, ...]
    """Requests that go on, in the order of their admission."""
    affected: tuple[HeldRequest, ...]
    """Requests that have to fail; ``output`` is the part that is certain."""
    ended: tuple[int, ...]
    """The ids of those that ended lately; ``Journal.held`` gives the whole of each."""
    epoch: int
    """The highest epoch that may have been given out."""
    damage: tuple[Damage, ...]
    statistics: RecoveryStatistics
    usage: tuple[Usage, ...] = ()


class Recovered(NamedTuple):
    """A recovery, and what a writer needs to go on."""

    recovery: Recovery
    image: Image
    survey: Survey


def recover(disk: Disk, retention: Retention, now: float) -> Recovered:
    """Read a journal.

    Raises:
        ConfigurationError: it has a format that this version does not know.
        OSError: the directory cannot be read.
    """
    found = survey(disk, retention, now)
    image = Image(retention)
    replay = Replay(image, found.kept)
    for part in found.parts:
        if part.number >= found.start:
            _replay_part(disk, replay, part)
    doubts = replay.settle()
    behind_s = min(0.0, now - image.clock)
    _finish(image, found, now)
    recovery = _describe(image, found, doubts, now, behind_s)
    return Recovered(recovery, image, found)


def _replay_part(disk: Disk, replay: Replay, part: Part) -> None:
    data = b""
    if part.num_bytes:
        try:
            data = disk.read(part.name)
        except OSError as error:
            part.damage, part.scan = f"the file cannot be read: {error.strerror}", None
    if part.scan is not None and data:
        problem = replay.segment(part.number, part.scan, data)
        part.damage = part.damage or problem
    if part.damage is not None:
        replay.doubt_all(Cause.DAMAGE, part.number)
        if data:
            replay.rest(part.number, part.rest, data)
            replay.doubt_all(Cause.DAMAGE, part.number)


def _finish(image: Image, found: Survey, now: float) -> None:
    """Make the image ready to be written on."""
    for held in image.live.values():
        held.output = list(held.output)
    image.by_serial = {held.serial: held for held in image.live.values()}
    image.next_serial = found.next_serial
    image.epoch = max(image.epoch, found.epoch)
    image.set_clock(now)
    image.sort()
    image.expire(now)


def _describe(
    image: Image, found: Survey, doubts: list[Doubt], now: float, behind_s: float
) -> Recovery:
    """``behind_s``: by how much the clock went back, if the machine started anew."""
    concerned = [doubt for doubt in doubts if doubt.cause is Cause.DAMAGE]
    affected_serials = {doubt.held.serial for doubt in concerned}
    live = [held for held in image.live.values() if held.serial not in affected_serials]
    for doubt in concerned:
        if doubt.held.finish:
            # It ended, and its stream cannot be joined again: what it was is not certain.
            doubt.held.finish = FinishReason.ERROR
            doubt.held.code, doubt.held.message = DAMAGE_CODE, DAMAGE_MESSAGE
    scans = [part.scan for part in found.parts if part.scan is not None]
    statistics = RecoveryStatistics(
        segments=len(found.parts),
        num_bytes=sum(part.num_bytes for part in found.parts),
        records=found.records,
        torn_bytes=found.torn_bytes,
        gaps=sum(scan.header is not None and scan.header.has_gap for scan in scans),
        behind=len(doubts) - len(concerned),
        lost_admissions=found.lost_admissions,
    )
    return Recovery(
        live=tuple(_clamped(describe(held), now, behind_s) for held in live),
        affected=tuple(_clamped(describe(doubt.held), now, behind_s) for doubt in concerned),
        ended=tuple(image.ended),
        epoch=image.epoch,
        damage=tuple(_list_damage(found, concerned)),
        statistics=statistics,
        usage=tuple(usage for days in image.usage.values() for usage in days.values()),
    )


def _list_damage(found: Survey, concerned: list[Doubt]) -> list[Damage]:
    by_segment: dict[int, list[int]] = {
        part.number: [] for part in found.parts if part.damage is not None
    }
    for doubt in concerned:
        by_segment.setdefault(doubt.segment, []).append(doubt.held.request_id)
    parts = {part.number: part for part in found.parts}
    listed = []
    for number, affected in sorted(by_segment.items()):
        part = parts.get(number)
        reason = part.damage if part is not None else None
        listed.append(
            Damage(
                segment=segment_name(number),
                offset=part.offset if part is not None and reason is not None else 0,
                reason=reason or "what it says of a request does not fit its own proof",
                affected=tuple(affected),
            )
        )
    return listed


def _clamped(request: HeldRequest, now: float, behind_s: float) -> HeldRequest:
    """A request as the clock has it that began anew with the machine: as old as it was.

    So what is left until its deadline is what was left when the journal was last written.
    """
    admitted_at = min(request.admit.admitted_at + behind_s, now)
    if admitted_at == request.admit.admitted_at:
        return request
    admit = dataclasses.replace(request.admit, admitted_at=admitted_at)
    return dataclasses.replace(request, admit=admit)
