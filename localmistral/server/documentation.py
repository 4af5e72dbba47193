"""What /openapi.json says about answers that are not the usual one.

Knows no route by name.
"""

from typing import Any

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REASONS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The Host header isn't this server's.",
    404: "No such model or route.",
    405: "No such method here.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    500: "The engine failed.",
    503: "Loading, full or shutting down; see Retry-After.",
}


def responses_of(
    *media_types: str, schema: dict[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers JSON or one of `media_types`."""
    ok: dict[str, Any] = {"application/json": {"schema": schema or {"type": "object"}}}
    ok |= {kind: {"schema": {"type": "string"}} for kind in media_types}
    errors: dict[int | str, dict[str, Any]] = {
        status: {
            "description": text,
            "content": {"application/json": {"schema": _ERROR_SCHEMA}},
        }
        for status, text in _REASONS.items()
    }
    return {200: {"description": "Ok.", "content": ok}, **errors}
