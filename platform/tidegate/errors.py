"""Every error that Tidegate raises on purpose, and the one table that turns them into HTTP.

TidegateError
├── InvalidRequest            400  a field of the request is wrong; names it
├── AuthenticationFailed      401
├── ModelNotFound             404  names the models that exist
├── NotFound                  404  of the control API: names what there is
├── ScopeMissing              403  the key may not do this; names the scope that may
├── Conflict                  409  of the control API: it was changed meanwhile, or cannot be done now
├── HostRefused               403  without keys: a name that is not this machine's
├── RequestTimeout            408  a head or body that does not come
├── RequestTooLarge           413
├── UnsupportedMedia          415  a content type or encoding that is not taken
├── HeadTooLarge              431
├── QueueFull                 429  with Retry-After
│   └── BodiesFull                 too many bytes are on their way into the gateway
├── TooManyFailures           429  sign-ins from this address failed too often
├── ModelUnavailable          503  with the model's own sentence
├── HostUnavailable           503  of the control API: what it asks does not answer
├── QueueUnavailable          503  Redis is away; the client is not told how
│   ├── QueueOutOfMemory           Redis refuses what makes it larger
│   ├── QueueReadOnly              Redis refuses every write
│   └── QueueRefused               Redis refuses us; it does not pass by itself
├── GatewayStopping           503
├── TooManyConnections        503
├── GenerationFailed          500  the engine failed on an accepted request
├── RequestExpired            504  waited past its deadline
├── ConfigError                    a setting or resource is wrong: stops the start or is refused
└── SourceError                    a model source cannot be resolved; carries a CamelCase reason
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

MAX_RETRY_AFTER_SECONDS = 120  # SDKs stop honouring the header above about this
# Codes with which a replica ends a request that cannot be, and what clients are told (400). Every other error
# of a replica is ours (500 or more).
PROMPT_REFUSALS = {
    "ContextLengthExceeded": "context_length_exceeded",
    "GrammarFailed": "grammar_failed",
    "InvalidPrompt": "invalid_prompt",
    "NoTokenAllowed": "no_token_allowed",
    "PromptTooCostly": "prompt_too_costly",
    "TooManyDimensions": "too_many_dimensions",
    "TruncatedTooFar": "truncated_too_far",
    "UnknownPromptName": "unknown_prompt_name",
    "WrongTask": "wrong_task",
}
# What a code is about, where that is another field than the prompt's.
REFUSED_FIELDS = {
    "NoTokenAllowed": "allowed_token_ids",
    "TooManyDimensions": "dimensions",
    "TruncatedTooFar": "truncate_prompt_tokens",
    "UnknownPromptName": "prompt_name",
    "WrongTask": "model",
}
MOST_CHARACTERS = 2000  # of a message to a client
MOST_PARAM_CHARACTERS = 200


class TidegateError(Exception):
    """Base. `reason` is stable and CamelCase, `message` is a sentence for a person."""

    reason: ClassVar[str] = "InternalError"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(TidegateError):
    """An error that a client of the API sees. Class attributes are its row of the HTTP table."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(shortened(message, MOST_CHARACTERS))
        self.param = None if param is None else shortened(param, MOST_PARAM_CHARACTERS)
        self.error_code = code or self.code
        self.retry_after_seconds = retry_after_seconds

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.error_code,
            }
        }

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, 1 to 120, where waiting helps."""
        if self.retry_after_seconds is None:
            return {}
        seconds = min(MAX_RETRY_AFTER_SECONDS, max(1, round(self.retry_after_seconds)))
        return {"retry-after": str(seconds)}


class InvalidRequest(RequestError):
    reason, status, type, code = "InvalidRequest", 400, "invalid_request_error", None


class AuthenticationFailed(RequestError):
    reason, status, type, code = "AuthenticationFailed", 401, "invalid_request_error", "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class ModelNotFound(RequestError):
    reason, status, type, code = "ModelNotFound", 404, "invalid_request_error", "model_not_found"


class NotFound(RequestError):
    reason, status, type, code = "NotFound", 404, "invalid_request_error", "not_found"


class ScopeMissing(RequestError):
    reason, status, type, code = "ScopeMissing", 403, "permission_error", "scope_missing"


class Conflict(RequestError):
    reason, status, type, code = "Conflict", 409, "invalid_request_error", "conflict"


class HostRefused(RequestError):
    reason, status, type, code = "HostRefused", 403, "permission_error", "host_refused"


class RequestTimeout(RequestError):
    reason, status, type, code = "RequestTimeout", 408, "invalid_request_error", "request_timeout"


class UnsupportedMedia(RequestError):
    reason, status, type, code = "UnsupportedMedia", 415, "invalid_request_error", "unsupported_media"

    def headers(self) -> dict[str, str]:
        return {"accept-encoding": "gzip"} if self.param == "content-encoding" else {}


class HeadTooLarge(RequestError):
    reason, status, type, code = "HeadTooLarge", 431, "invalid_request_error", "head_too_large"


class RequestTooLarge(RequestError):
    reason, status, type, code = "RequestTooLarge", 413, "invalid_request_error", "request_too_large"


class QueueFull(RequestError):
    reason, status, type, code = "QueueFull", 429, "rate_limit_error", "queue_full"


class BodiesFull(QueueFull):
    code = "too_many_bytes"


class TooManyFailures(RequestError):
    reason, status, type, code = "TooManyFailures", 429, "rate_limit_error", "too_many_failures"


class HostUnavailable(RequestError):
    reason, status, type, code = "HostUnavailable", 503, "server_error", "host_unavailable"


class ModelUnavailable(RequestError):
    reason, status, type, code = "ModelUnavailable", 503, "server_error", "model_unavailable"


class QueueUnavailable(RequestError):
    """`message` says what Redis said, for the log. A client is not told."""

    reason, status, type, code = "QueueUnavailable", 503, "server_error", "queue_unavailable"
    SHOWN: ClassVar[str] = "The queue cannot be used now. Send the request again in a moment."

    def body(self) -> dict[str, Any]:
        body = super().body()
        body["error"]["message"] = self.SHOWN
        return body


class QueueOutOfMemory(QueueUnavailable):
    SHOWN = "The queue has no memory left. Send the request again in some seconds."


class QueueReadOnly(QueueUnavailable):
    pass


class QueueRefused(QueueUnavailable):
    """Redis is there and will not serve us: a wrong password, a server that Tidegate cannot use. It does not
    pass by itself. To a client it is the same."""


class GatewayStopping(RequestError):
    reason, status, type, code = "GatewayStopping", 503, "server_error", "queue_unavailable"


class TooManyConnections(RequestError):
    reason, status, type, code = "TooManyConnections", 503, "server_error", "too_many_connections"


class GenerationFailed(RequestError):
    reason, status, type, code = "GenerationFailed", 500, "server_error", "generation_failed"


class RequestExpired(RequestError):
    reason, status, type, code = "RequestExpired", 504, "server_error", "deadline_exceeded"


def shortened(text: str, most: int) -> str:
    """At most about `most` characters: where it is longer, its middle is left out."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


@dataclass
class FieldProblem:
    """One wrong field of a setting or resource: where, what was found, what to do."""

    field: str
    value: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.value}: {self.remedy}"


class ConfigError(TidegateError):
    """A setting or resource is wrong. The message names field, value and remedy."""

    reason = "InvalidConfig"

    def __init__(self, message: str, problems: list[FieldProblem] | None = None) -> None:
        super().__init__(message)
        self.problems = problems or []


class SourceError(TidegateError):
    """A model source cannot be resolved. `source_reason`: SourceNotFound, SourceFormat, UnsupportedModel,
    NoSpace, Offline, Unauthorized, ChecksumMismatch, SourceUnavailable."""

    reason = "SourceError"

    def __init__(self, source_reason: str, message: str) -> None:
        super().__init__(message)
        self.source_reason = source_reason
