"""The canary: one question for all, and an answer for each class of numerics."""

from __future__ import annotations

from understudy.protocol.codec import Envelope, decode, encode
from understudy.protocol.messages import Assign
from understudy.runtime.control.canary import CanaryAnswers, canary_request


def test_every_engine_is_asked_the_same_under_an_id_that_no_request_has() -> None:
    one, other = canary_request(1), canary_request(2)
    assert (one.prompt, one.params) == (other.prompt, other.params)
    assert one.params.temperature == 0.0
    assert 2**63 <= one.request_id < other.request_id < 2**64
    assert decode(encode(Envelope("a", 1, 1, 1), Assign(one, 1))).message == Assign(one, 1)


def test_the_first_answer_of_a_class_is_what_the_others_are_measured_by() -> None:
    answers = CanaryAnswers()
    assert not answers.is_known("exact")
    assert answers.check("exact", (1, 2))
    assert answers.is_known("exact")
    assert answers.check("exact", (1, 2))
    assert not answers.check("exact", (1, 3))
    assert answers.check("fast", (1, 3))
    assert answers.check("exact", (1, 2)), "a wrong answer changes nothing"
