"""What /openapi.json says about answers: the usual one of a route, its stream, its refusals.

Knows no route by name.
"""

from typing import Any

from fastapi import FastAPI

from localmistral.server.answer_schemas import ANTHROPIC_ERROR, ERROR, Schema

Responses = dict[int | str, dict[str, Any]]

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
_NEVER = "422"
"""FastAPI's status for bodies that its models refuse; here that is a 400 like any other."""


def responses_of(
    schema: Schema, *, events: Schema | None = None, error: Schema = ERROR
) -> Responses:
    """The `responses` of a route that answers JSON of `schema`, or streams `events` where asked."""
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if events is not None:
        content["text/event-stream"] = {"itemSchema": _describe_event(events)}
    return {200: {"description": "Ok.", "content": content}, **_refusals(error)}


def _describe_event(data: Schema) -> Schema:
    """A server-sent event, in the words of OpenAPI 3.2."""
    return {
        "type": "object",
        "description": "With `stream`. An error after the first byte is an event too, in place of "
        "the rest.",
        "required": ["data"],
        "properties": {
            "event": {"type": "string"},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": data,
            },
        },
    }


def anthropic_responses_of(schema: Schema, *, events: Schema | None = None) -> Responses:
    """The same for a route of Anthropic's API, which has errors of its own form."""
    return responses_of(schema, events=events, error=ANTHROPIC_ERROR)


def text_responses() -> Responses:
    """The `responses` of a route that answers plain text."""
    content = {"text/plain": {"schema": {"type": "string"}}}
    return {200: {"description": "Ok.", "content": content}, **_refusals(ERROR)}


def health_responses(healthy: Schema, unhealthy: Schema) -> Responses:
    """The `responses` of a route that has a form of its own for not being ready."""
    not_ready = {
        "description": "Not ready: `status` says why.",
        "content": {"application/json": {"schema": unhealthy}},
    }
    return {**responses_of(healthy), 503: not_ready}


def _refusals(error: Schema) -> Responses:
    return {
        status: {"description": text, "content": {"application/json": {"schema": error}}}
        for status, text in _REASONS.items()
    }


class DocumentedApp(FastAPI):
    """FastAPI, without a word of the status that it would answer wrong bodies with."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop(_NEVER, None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document
