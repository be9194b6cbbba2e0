"""The catalogue of messages: tags, defaults, and which of them keep an order."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from tests.unit.protocol.examples import EXAMPLES
from tests.unit.protocol.wire import hints_of
from understudy.protocol.messages import (
    MESSAGE_TYPES,
    Cancel,
    Message,
    is_datagram,
    message,
    tag_of,
)

TAGS = {
    "Hello": 1,
    "Welcome": 2,
    "Fenced": 3,
    "Pulse": 4,
    "Heartbeat": 5,
    "Dying": 6,
    "ProcessExited": 7,
    "ClusterState": 8,
    "Resend": 9,
    "Submit": 16,
    "Accepted": 17,
    "Rejected": 18,
    "Deliver": 19,
    "Failed": 20,
    "Cancel": 21,
    "Attach": 22,
    "Reclaim": 23,
    "Lookup": 24,
    "Found": 25,
    "Duplicate": 26,
    "Assign": 32,
    "StepOutput": 33,
    "Refused": 34,
    "ResetPrefixCache": 36,
    "UsageRequest": 45,
    "UsageReply": 46,
    "Inventory": 35,
    "EndGroup": 40,
    "TimelineRequest": 41,
    "Timelines": 42,
    "StatusRequest": 48,
    "StatusReply": 49,
    "DrainRequest": 50,
    "DrainReply": 51,
    "ReleaseRequest": 52,
    "ReleaseReply": 53,
}
DATAGRAMS = {
    "Hello",
    "Welcome",
    "Fenced",
    "Pulse",
    "Resend",
    "Heartbeat",
    "Dying",
    "ProcessExited",
    "StatusRequest",
    "StatusReply",
    "DrainRequest",
    "DrainReply",
    "ReleaseRequest",
    "ReleaseReply",
}


def test_tags_are_what_they_always_were() -> None:
    assert {kind.__name__: tag for tag, kind in MESSAGE_TYPES.items()} == TAGS
    assert all(tag_of(kind) == tag for tag, kind in MESSAGE_TYPES.items())


def test_the_union_that_handlers_match_over_holds_every_message() -> None:
    assert set(typing.get_args(Message)) == set(MESSAGE_TYPES.values())


def test_only_what_can_be_repeated_travels_outside_the_order() -> None:
    names = {kind.__name__ for kind in MESSAGE_TYPES.values() if is_datagram(kind)}
    assert names == DATAGRAMS


def test_there_is_an_example_of_every_message() -> None:
    assert {type(example) for example in EXAMPLES} == set(MESSAGE_TYPES.values())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_a_message_cannot_be_changed_and_takes_no_other_attribute(example: Message) -> None:
    for name in hints_of(type(example)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(example, name, None)
    assert not hasattr(example, "__dict__")


@pytest.mark.parametrize("kind", MESSAGE_TYPES.values(), ids=lambda kind: str(kind.__name__))
def test_optional_fields_come_after_the_required_ones(kind: type) -> None:
    fields = dataclasses.fields(kind)
    has_default = [field.default is not dataclasses.MISSING for field in fields]
    assert has_default == sorted(has_default)
    assert all(field.default_factory is dataclasses.MISSING for field in fields)


def test_a_tag_cannot_be_taken_twice() -> None:
    with pytest.raises(AssertionError, match="tag 21 is taken by Cancel"):

        @message(tag_of(Cancel))
        class Second:
            """Wants a tag that is taken."""
