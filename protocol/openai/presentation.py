"""How a gateway turns a request's output into an answer, in a form that outlives the gateway.

The gateway that submits a request says it here; whichever gateway joins the stream later reads it
and answers in the same words. It travels in ``Request.presentation`` and comes back from the
journal, so it is decoded as carefully as anything from the wire.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from understudy.protocol.errors import InternalError, InvalidRequest
from understudy.protocol.openai.sampling import (
    CHOICES_EACH_MAX,
    CHOICES_MAX,
    STOP_BYTES_MAX,
    STOP_STRINGS_MAX,
)

VERSION: Final = 1
VERSION_WITH_MEANING: Final = 2
"""Of presentations that a reader of version 1 would take for plain text."""
PRESENTATION_BYTES_MAX: Final = 512 << 10
"""Nearly all have some 50 bytes; only an echo that decoding does not give back takes more."""

StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=STOP_BYTES_MAX)]
StopStrings = Annotated[tuple[StopString, ...], msgspec.Meta(max_length=STOP_STRINGS_MAX)]
EndpointName = Literal["chat", "completions", "messages", "responses"]
ToolParserName = Literal["", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder"]
ReasoningParserName = Literal["", "deepseek_r1", "mistral", "qwen3"]
Index = Annotated[int, msgspec.Meta(ge=0, lt=CHOICES_MAX)]


class Presentation(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How the output of one request becomes one choice of an answer.

    Fields may be appended, with a default; ``version`` changes when an old reader would go wrong.
    What ``SamplingParams`` says, such as ``min_tokens`` and ``logprobs``, is not said again.
    """

    version: Literal[1, 2] = VERSION
    endpoint: EndpointName
    created: Annotated[int, msgspec.Meta(ge=0)]
    """Seconds since 1970."""
    model: str
    index: Index
    """The choice's number among those of its call."""
    num_choices: Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)]
    n: Annotated[int, msgspec.Meta(ge=1, le=CHOICES_EACH_MAX)]
    """How many of the call's choices, one after another, answer the same prompt."""
    stop: StopStrings = ()
    include_stop: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    is_resumable: bool = False
    """Whether the request goes on when its client goes away."""
    echoes_prompt: bool = False
    """Whether the text begins with the prompt: with ``echo``, or else with what its tokens spell.
    """
    echo: str | None = None
    """Only with the first of the choices that answer one prompt."""
    system_fingerprint: str = ""
    """Of the cluster when the call was made, so that all events of its stream say the same."""
    tool_parser: ToolParserName = ""
    """The format in which calls of tools are looked for; empty: they are not."""
    tools: dict[str, dict[str, str]] = {}
    """The tools by name, where the format needs them, and the types of their parameters."""
    calls_max: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Calls after which the answer ends; 0: as many as there are."""
    reasoning_parser: ReasoningParserName = ""
    """The format of thoughts; empty: they are not told apart."""
    begins_in_reasoning: bool = False
    """Whether the prompt has opened the thoughts."""
    repeated: bytes = b""
    """What the endpoint says again of the request, in its own JSON."""

    @property
    def is_parsed(self) -> bool:
        """Whether the text is taken apart into what it means."""
        is_plain = self.endpoint == "completions" or self.endpoint == "chat"
        return not is_plain or bool(self.tool_parser or self.reasoning_parser)


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Presentation)


def encode_presentation(presentation: Presentation) -> bytes:
    """Pack a presentation.

    Raises:
        InvalidRequest: it echoes a prompt that is too long to be kept.
    """
    if presentation.tool_parser or presentation.reasoning_parser or presentation.repeated:
        presentation = msgspec.structs.replace(presentation, version=VERSION_WITH_MEANING)
    packed = _ENCODER.encode(presentation)
    if len(packed) > PRESENTATION_BYTES_MAX:
        if presentation.echo is None:
            raise InvalidRequest("the conversation is too long to be kept", param="store")
        raise InvalidRequest("the prompt is too long for an echo", param="echo")
    return packed


def decode_presentation(packed: bytes) -> Presentation:
    """Read what an earlier gateway, perhaps of another version, has packed.

    Raises:
        InternalError: it cannot be read, or contradicts itself.
    """
    try:
        presentation = _DECODER.decode(packed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InternalError(f"the stream's presentation cannot be read: {error}") from None
    if presentation.index >= presentation.num_choices or presentation.num_choices % presentation.n:
        raise InternalError("the stream's presentation contradicts itself")
    return presentation
