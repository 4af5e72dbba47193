"""The one map from this program's errors to HTTP: a status, and OpenAI's or Anthropic's body.

Chooses by class, never by message text. Knows nothing of routes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localmistral.errors import (
    BadRequestError,
    BusyError,
    ContextOverflowError,
    EngineError,
    LocalMistralError,
    ModelNotFoundError,
    TemplateError,
    UsageError,
)

RETRY_AFTER_S = 2

_STATUSES: tuple[tuple[type[LocalMistralError], int, str, str | None], ...] = (
    (ContextOverflowError, 400, "invalid_request_error", "context_length_exceeded"),
    (BadRequestError, 400, "invalid_request_error", None),
    (TemplateError, 400, "invalid_request_error", "template_error"),
    (UsageError, 400, "invalid_request_error", None),
    (ModelNotFoundError, 404, "not_found_error", "model_not_found"),
    (BusyError, 503, "overloaded_error", "server_busy"),
    (EngineError, 500, "server_error", "engine_error"),
)
"""Exception, HTTP status, OpenAI's `type`, OpenAI's `code`; the first that fits counts."""

_TYPES_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    503: "overloaded_error",
}
"""Both APIs' words for a status; Anthropic says `api_error` for the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error on its way out: status, and what both kinds of body are made of."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_openai(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def to_anthropic(self, request_id: str) -> dict[str, Any]:
        kind = _TYPES_BY_STATUS.get(self.status, "api_error")
        error = {"type": kind, "message": self.message}
        return {"type": "error", "error": error, "request_id": request_id}

    def to_body(self, path: str, request_id: str) -> dict[str, Any]:
        """The body that clients of `path` expect."""
        return self.to_anthropic(request_id) if is_anthropic(path) else self.to_openai()


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path.startswith("/v1/messages")


def describe(error: Exception) -> Failure:
    """An exception as a failure; whatever isn't known says nothing about the inside."""
    if not isinstance(error, LocalMistralError):
        return Failure(
            status=500,
            message="The server met an unexpected error; its log has the details.",
            type="server_error",
            code="internal_error",
        )
    status, kind, code = next(
        ((s, k, c) for cls, s, k, c in _STATUSES if isinstance(error, cls)),
        (500, "server_error", None),
    )
    message = f"{error.message} {error.hint}".strip() if status < 500 else error.message
    param = (error.param or None) if isinstance(error, BadRequestError) else None
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
    return Failure(
        status=status, message=message, type=kind, param=param, code=code, headers=headers
    )


def describe_status(status: int, message: str, *, code: str | None = None) -> Failure:
    """A failure of HTTP itself: a wrong path, method, key or body."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
    if status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    kind = _TYPES_BY_STATUS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return Failure(status=status, message=message, type=kind, code=code, headers=headers)


def describe_validation(errors: Sequence[Mapping[str, Any]]) -> Failure:
    """What the request's model objects to, as one sentence naming the first place."""
    first: Mapping[str, Any] = errors[0] if errors else {"msg": "is malformed"}
    if first.get("type") == "json_invalid":
        place = first.get("loc", ("body", 0))[-1]
        reason = first.get("ctx", {}).get("error", "malformed")
        message = f"The body is no valid JSON: {reason} (character {place})."
        return Failure(status=400, message=message, type="invalid_request_error")
    place = ""
    for part in first.get("loc", ())[1:]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not _is_type_name(part):
            place += f".{part}" if place else str(part)
    if first.get("type") == "missing":
        message = f"{place or 'The body'} is missing."
        return Failure(
            status=400, message=message, type="invalid_request_error", param=place or None
        )
    reason = str(first.get("msg", "")).removeprefix("Input ").removeprefix("Value error, ")
    message = f"{place or 'The body'} {reason[:1].lower()}{reason[1:]}."
    return Failure(status=400, message=message, type="invalid_request_error", param=place or None)


def _is_type_name(part: Any) -> bool:
    """Pydantic names the branch of a union in an error's place; clients know no such field."""
    return not str(part).replace("_", "").isalnum() or str(part) in {"str", "int", "float", "bool"}
