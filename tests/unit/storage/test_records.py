from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.storage import records
from understudy.runtime.storage.records import Admit, Assign, CheckpointPayload, EndMark

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
IDS = st.integers(0, 2**63 - 1)
TOKENS = st.lists(U32, max_size=20).map(tuple)
TIMES = st.floats(allow_nan=False, allow_infinity=False)
PARAMS = st.builds(
    SamplingParams,
    seed=U64,
    max_tokens=st.integers(0, 2**31),
    temperature=st.floats(0, 2),
    logit_bias=st.lists(st.tuples(U32, st.floats(-100, 100)), max_size=3).map(tuple),
    stop_token_ids=TOKENS,
    logprobs=st.none() | st.integers(0, 20),
)
REQUESTS = st.builds(
    Request,
    request_id=IDS,
    group_id=IDS,
    prompt=TOKENS,
    params=PARAMS,
    priority=st.integers(-9, 9),
    traceparent=st.text(max_size=20),
)
ADMITS = st.builds(
    Admit,
    request=REQUESTS,
    gateway=st.text(max_size=20),
    admitted_at=TIMES,
    tenant=st.text(max_size=20),
    key_digest=st.binary(max_size=32),
    body_digest=st.binary(max_size=32),
)


@given(admit=ADMITS, serial=U32, before=st.binary(max_size=9), after=st.binary(max_size=9))
def test_an_admission_comes_back(admit: Admit, serial: int, before: bytes, after: bytes) -> None:
    packed = records.pack_admit(admit)
    payload = records.encode_admit(serial, admit.request.request_id, packed)
    start, stop = len(before), len(before) + len(payload)
    data = before + payload + after

    assert records.decode_admit_ids(data, start) == (serial, admit.request.request_id)
    assert records.unpack_admit(records.decode_admit(data, start, stop)) == admit


def test_an_admission_with_an_unknown_field_is_read_without_it() -> None:
    admit = Admit(Request(1, 2, (3,), SamplingParams(seed=4, max_tokens=5)), "gateway", 6.0)
    packed = records.pack_admit(admit)
    assert packed[0] == 0x80 | 6, "a map of six fields"
    newer = bytes([packed[0] + 1]) + packed[1:] + b"\xa5later\x07"

    assert records.unpack_admit(newer) == admit


def test_bytes_that_are_no_admission_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected"):
        records.unpack_admit(b"\x81\xa7request\x05")


@given(
    serial=U32,
    attempt=U32,
    epoch=U64,
    engine=st.text(max_size=30),
    before=st.binary(max_size=5),
    after=st.binary(max_size=5),
)
def test_an_assignment_comes_back(
    serial: int, attempt: int, epoch: int, engine: str, before: bytes, after: bytes
) -> None:
    payload = records.encode_assign(serial, Assign(0, attempt, engine, epoch))
    data = before + payload + after

    found = records.decode_assign(data, len(before), len(before) + len(payload))

    assert found == (serial, attempt, epoch, engine)


@given(
    mark=st.builds(EndMark, U32, st.integers(0, 255), U32, U32),
    code=st.text(max_size=20),
    message=st.text(max_size=20),
    before=st.binary(max_size=5),
)
def test_an_end_comes_back(mark: EndMark, code: str, message: str, before: bytes) -> None:
    data = before + records.encode_end(mark, code, message)

    assert records.decode_end(data, len(before), len(data)) == (mark, code, message)
    assert records.decode_end_mark(data, len(before)) == mark


@given(
    payload=st.builds(
        CheckpointPayload,
        serial=U32,
        request_id=U64,
        attempt=U32,
        epoch=U64,
        finish=st.integers(0, 4),
        length=U32,
        prefix_hash=U32,
        ended_at=TIMES,
        engine=st.none() | st.text(max_size=9),
        code=st.text(max_size=9),
        message=st.text(max_size=9),
        admit=st.binary(max_size=50),
        output=st.binary(max_size=50),
        logprobs=st.binary(max_size=50),
        num_cached_tokens=U32,
        vector=st.binary(max_size=50),
    ),
    before=st.binary(max_size=5),
    after=st.binary(max_size=5),
)
def test_a_checkpoint_comes_back(payload: CheckpointPayload, before: bytes, after: bytes) -> None:
    data = before + records.encode_checkpoint(payload) + after

    assert records.decode_checkpoint(data, len(before)) == payload
    assert records.decode_admit_ids(data, len(before)) == (payload.serial, payload.request_id)
    ended = (payload.finish, payload.length, payload.ended_at)
    assert records.decode_checkpoint_end(data, len(before)) == ended
