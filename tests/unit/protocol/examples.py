"""One message of each class, with every field set, and every kind of nesting somewhere."""

from __future__ import annotations

from understudy.protocol.messages import (
    Accepted,
    Assign,
    Attach,
    Cancel,
    Capacity,
    ClusterState,
    Deliver,
    DrainMode,
    DrainReply,
    DrainRequest,
    Duplicate,
    Dying,
    EndGroup,
    Failed,
    Fenced,
    Found,
    Heartbeat,
    HeldRequest,
    Hello,
    Inventory,
    Lookup,
    Message,
    ProcessExited,
    Pulse,
    Reclaim,
    Refused,
    Rejected,
    ReleaseReply,
    ReleaseRequest,
    Resend,
    ResetPrefixCache,
    Role,
    StatusReply,
    StatusRequest,
    StepOutput,
    Submit,
    TimelineRequest,
    Timelines,
    UsageReply,
    UsageRequest,
    Welcome,
)
from understudy.protocol.request import (
    FinishReason,
    Request,
    SamplingParams,
    Thinking,
    TokenLogprobs,
    TokenRow,
)
from understudy.protocol.status import EngineStatus, GatewayStatus
from understudy.protocol.timeline import RequestTimeline, TimelineEvent
from understudy.protocol.usage import DayUsage

PARAMS = SamplingParams(
    seed=2**64 - 1,
    max_tokens=128,
    min_tokens=2,
    temperature=0.5,
    top_k=40,
    top_p=0.75,
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    logit_bias=((7, -2.0), (8, 100.0)),
    stop_token_ids=(1, 2),
    logprobs=2,
    grammar="start: /a+/",
    thinking=Thinking(((5,), (6, 5)), ((7,),), is_open=True, budget=100, forced=(6, 7, 6)),
)
REQUEST = Request(
    request_id=2**63 - 1,
    group_id=2**62,
    prompt=(1, 300, 70_000),
    params=PARAMS,
    priority=-3,
    traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    tenant="key-1",
    presentation=b"\x01\x02",
    idempotency_key=b"\x03",
    body_digest=b"\x04",
    cache_salt="salt",
    deadline_s=2.5,
    first_token_s=0.5,
)
ROWS = (
    TokenRow(11, 1, 0, (5, 6), 0xDEADBEEF, 0, (), 3),
    TokenRow(
        12,
        2,
        9,
        (7,),
        0x01020304,
        FinishReason.STOP,
        (TokenLogprobs(-0.5, ((7, -0.5), (8, -1.25))),),
    ),
)
ENGINE = EngineStatus("engine-0", "serving", 41, 5, 1, 2, 3, 4, 100, 128, 999, 0.25, "exact", 6)
GATEWAY = GatewayStatus("gateway-0", 42, "127.0.0.1:8000", 6, 0.125)

EVENTS = (TimelineEvent(0.0, "queued"), TimelineEvent(0.5, "assigned", "engine-0.17"))
TIMELINE = RequestTimeline(11, 2**62, 3, 2, 1, 8, 5, 1, "overloaded", EVENTS)

EXAMPLES: tuple[Message, ...] = (
    Hello(
        Role.ENGINE, "engine-0", 4321, 7, "demo", "h:1", Capacity(8, 2048, 512, 16), 77, "exact", 2
    ),
    Welcome(2**40, 2),
    Fenced(2**40),
    Pulse(),
    Resend(1000, 64),
    Heartbeat(10, "step", 0.125, 500, 3, 1, 2),
    Dying("told to stop"),
    ProcessExited("engine-0", 4321, -9, 2, True),
    ClusterState(2, 3, 2048, True, ("exact",)),
    Submit(REQUEST),
    Accepted(11),
    Rejected(11, "overloaded", "full", 1.5),
    Deliver(ROWS, "engine-0"),
    Failed(11, "internal_error", "lost", 1.5),
    Cancel(11),
    Attach(11, 5),
    Reclaim((HeldRequest(11, 5), HeldRequest(12, 0))),
    Lookup(2**62, "key-1"),
    Found(2**62, "key-1", (REQUEST,), (5,), (2,)),
    Duplicate(11, 2**62),
    EndGroup(2**62, "key-1", True),
    TimelineRequest("key-1", 2**62, 16),
    Timelines("key-1", 2**62, 16, (TIMELINE,)),
    Assign(REQUEST, 2, (5, 6), True, 1.25),
    Inventory(ROWS, True),
    StepOutput(10, ROWS),
    Refused(11, 2, "internal_error", "no"),
    ResetPrefixCache(),
    UsageRequest("acme"),
    UsageReply("acme", (DayUsage(20_000, 1, 2, 3, 4, 0.5), DayUsage(20_001, 5, 6, 7, 8, 1.5))),
    StatusRequest(),
    StatusReply("demo", 60.5, (ENGINE,), (GATEWAY,), 1, 2, 3, 4, 5, 6, 7, 8, 9, "full", 10),
    DrainRequest("engine-0", DrainMode.MIGRATE),
    DrainReply("engine-0", True, 3),
    ReleaseRequest(b"\x05"),
    ReleaseReply(b"\x05", True),
)
