"""Every error that a client can be told, and how each looks over HTTP.

The tree::

    RequestError                 something about one request; always told to its client
    ├── InvalidRequest     400   the client's input is wrong; a retry cannot help
    │   └── ContextLengthExceeded 400
    ├── InvalidApiKey      401   no key, or none that is known
    ├── ModelNotFound      404
    ├── NotFound           404   no such path or object
    ├── MethodNotAllowed   405
    ├── PayloadTooLarge    413
    ├── IdempotencyMismatch 422  the same Idempotency-Key came with another body
    ├── RateLimited        429   the caller's own limit; retry after the time given
    ├── DeadlineExceeded   504   the answer cannot be, or was not, ready in time
    ├── Overloaded         503   the queue is full; retry after the time given
    ├── Unavailable        503   loading or draining
    ├── AlreadySubmitted        never told: the call joins the one that came before it
    ├── Quarantined        500   engines died of this request; a retry cannot help
    └── InternalError      500   our own fault

    ConfigurationError           the operator's input is wrong: exit status 78, all problems at once
    ProtocolError                bytes on the bus that are no message; the frame is dropped, counted

Recoverable for a client by itself: ``RateLimited``, ``Overloaded`` and ``Unavailable``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final

MESSAGE_LENGTH_MAX: Final = 400
"""In characters: an error may quote what is wrong, and is no echo of it."""


class RequestError(Exception):
    """An error that ends one request and is told to its client."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "api_error"
    code: str | None = None
    should_retry: ClassVar[bool] = True
    """Whether a client may try the same again; what is wrong with its status says more."""

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = _shortened(message)
        self.param = None if param is None else _shortened(param)
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


class InvalidRequest(RequestError):
    """The client's input is wrong; ``param`` names the field."""

    status = 400
    kind = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer do not fit the model's context."""

    code = "context_length_exceeded"


class InvalidApiKey(InvalidRequest):
    """The call has no key, or none that is known."""

    status = 401
    code = "invalid_api_key"


class NotFound(InvalidRequest):
    """No such path or object."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """The named model is not served here."""

    code = "model_not_found"


class MethodNotAllowed(InvalidRequest):
    """The path exists and does not take this method."""

    status = 405
    code = "method_not_allowed"


class PayloadTooLarge(InvalidRequest):
    """The body is larger than the gateway reads."""

    status = 413
    code = "payload_too_large"


class IdempotencyMismatch(InvalidRequest):
    """The same ``Idempotency-Key`` came with another body."""

    status = 422
    code = "idempotency_mismatch"


class AlreadySubmitted(RequestError):
    """The call came before, under this idempotency key. Never told to a client: it joins."""

    status = 409
    code = "already_submitted"

    def __init__(self, original_group_id: int) -> None:
        super().__init__("the call was submitted before")
        self.original_group_id = original_group_id


class Quarantined(RequestError):
    """Engines died of this request. The same request will fare no better."""

    code = "request_quarantined"
    should_retry = False


class RateLimited(RequestError):
    """The caller has reached a limit of its own; ``retry_after_s`` says when there is room."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class DeadlineExceeded(RequestError):
    """The answer would not be, or was not, ready by the client's deadline."""

    status = 504
    kind = "deadline_error"
    code = "deadline_exceeded"
    should_retry = False


class Overloaded(RequestError):
    """The queue is full; ``retry_after_s`` says when to come back."""

    status = 503
    kind = "overloaded_error"
    code = "overloaded"


class Unavailable(RequestError):
    """Not serving at the moment: loading, draining, or cut off."""

    status = 503
    kind = "service_unavailable_error"
    code = "unavailable"


class InternalError(RequestError):
    """Our own fault."""

    code = "internal_error"


_BY_CODE: Mapping[str, type[RequestError]] = MappingProxyType(
    {
        kind.code: kind
        for kind in (
            ContextLengthExceeded,
            DeadlineExceeded,
            IdempotencyMismatch,
            InternalError,
            NotFound,
            Overloaded,
            Quarantined,
            RateLimited,
            Unavailable,
        )
        if kind.code is not None
    }
)


def _shortened(text: str) -> str:
    return text if len(text) <= MESSAGE_LENGTH_MAX else f"{text[: MESSAGE_LENGTH_MAX - 2]} …"


def from_code(code: str, message: str, *, retry_after_s: float | None = None) -> RequestError:
    """Make the error that another actor named by its code; an unknown code is internal."""
    return _BY_CODE.get(code, InternalError)(message, retry_after_s=retry_after_s)


class ConfigurationError(Exception):
    """The operator's input is wrong. Carries every problem found, one line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ProtocolError(Exception):
    """Bytes that are no message of this protocol."""
