"""JSON schemas of what the routes answer, for /openapi.json.

Fields that are not named may be there too. Knows no route by name.
"""

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
ANYTHING: Schema = {}


def make_object(**properties: Schema) -> Schema:
    """An object with these properties, all of them always there."""
    return {"type": "object", "required": list(properties), "properties": properties}


def make_list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def one_of(*values: str | None) -> Schema:
    return {"enum": list(values)}


def allow_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def add_optional(schema: Schema, **properties: Schema) -> Schema:
    """The object with further properties, which may be missing."""
    return {**schema, "properties": {**schema["properties"], **properties}}


ERROR = make_object(
    error=make_object(message=STRING, type=STRING, param=TEXT_OR_NULL, code=TEXT_OR_NULL)
)
ANTHROPIC_ERROR = make_object(
    type=one_of("error"), error=make_object(type=STRING, message=STRING), request_id=STRING
)

_FINISH = one_of("stop", "length", "tool_calls")
_USAGE = add_optional(
    make_object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT),
    prompt_tokens_details=make_object(cached_tokens=COUNT),
    completion_tokens_details=make_object(reasoning_tokens=COUNT),
)
_LOGPROB = make_object(token=STRING, logprob=NUMBER, bytes=make_list(COUNT))
_LOGPROBS = allow_null(
    make_object(
        content=make_list(
            add_optional(make_object(**_LOGPROB["properties"]), top_logprobs=make_list(_LOGPROB))
        )
    )
)
_CHUNK_OF_THINKING = make_object(
    type=one_of("thinking"), thinking=make_list(make_object(type=one_of("text"), text=STRING))
)
_CONTENT: Schema = {
    "anyOf": [
        TEXT_OR_NULL,
        make_list({"anyOf": [_CHUNK_OF_THINKING, make_object(type=one_of("text"), text=STRING)]}),
    ]
}
_CALL = make_object(
    id=STRING, type=one_of("function"), function=make_object(name=STRING, arguments=STRING)
)
_THINKING = {"reasoning_content": STRING, "reasoning": STRING}


def _chat(kind: str, choice: Schema) -> Schema:
    return make_object(
        id=STRING, object=one_of(kind), created=COUNT, model=STRING, choices=make_list(choice)
    )


CHAT = add_optional(
    _chat(
        "chat.completion",
        make_object(
            index=COUNT,
            message=add_optional(
                make_object(role=one_of("assistant"), content=_CONTENT),
                tool_calls=make_list(_CALL),
                **_THINKING,
            ),
            logprobs=_LOGPROBS,
            finish_reason=_FINISH,
        ),
    ),
    usage=_USAGE,
)
_CALL_DELTA = add_optional(
    make_object(index=COUNT, function=add_optional(make_object(arguments=STRING), name=STRING)),
    id=STRING,
    type=one_of("function"),
)
CHAT_CHUNK = add_optional(
    _chat(
        "chat.completion.chunk",
        make_object(
            index=COUNT,
            delta=add_optional(
                make_object(),
                role=one_of("assistant"),
                content=_CONTENT,
                tool_calls=make_list(_CALL_DELTA),
                **_THINKING,
            ),
            logprobs=_LOGPROBS,
            finish_reason=allow_null(_FINISH),
        ),
    ),
    usage=_USAGE,
)
COMPLETION = add_optional(
    _chat(
        "text_completion",
        make_object(
            index=COUNT,
            text=STRING,
            logprobs=allow_null(
                make_object(
                    tokens=make_list(STRING),
                    token_logprobs=make_list(NUMBER),
                    top_logprobs=make_list({"type": "object"}),
                    text_offset=make_list(COUNT),
                )
            ),
            finish_reason=allow_null(_FINISH),
        ),
    ),
    usage=_USAGE,
)

_ANTHROPIC_USAGE = add_optional(
    make_object(input_tokens=COUNT, output_tokens=COUNT),
    cache_read_input_tokens=COUNT,
    cache_creation_input_tokens=COUNT,
)
_BLOCK: Schema = {
    "anyOf": [
        make_object(type=one_of("text"), text=STRING),
        make_object(type=one_of("thinking"), thinking=STRING, signature=STRING),
        make_object(type=one_of("tool_use"), id=STRING, name=STRING, input={"type": "object"}),
    ]
}
MESSAGE = make_object(
    id=STRING,
    type=one_of("message"),
    role=one_of("assistant"),
    model=STRING,
    content=make_list(_BLOCK),
    stop_reason=one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
    stop_sequence=TEXT_OR_NULL,
    usage=_ANTHROPIC_USAGE,
)
MESSAGE_EVENT = make_object(
    type=one_of(
        "message_start", "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop", "ping", "error",
    )
)  # fmt: skip
TOKEN_COUNT = make_object(input_tokens=COUNT)

_ITEM: Schema = {
    "anyOf": [
        make_object(
            id=STRING, type=one_of("message", "reasoning"), status=STRING,
            content=make_list(make_object(type=STRING, text=STRING)),
        ),
        make_object(
            id=STRING, type=one_of("function_call"), status=STRING,
            call_id=STRING, name=STRING, arguments=STRING,
        ),
    ]
}  # fmt: skip
RESPONSE = make_object(
    id=STRING,
    object=one_of("response"),
    created_at=COUNT,
    status=one_of("completed", "incomplete", "in_progress", "failed"),
    error=allow_null(make_object(code=STRING, message=STRING)),
    incomplete_details=allow_null(make_object(reason=STRING)),
    model=STRING,
    output=make_list(_ITEM),
    previous_response_id=TEXT_OR_NULL,
    usage=allow_null(
        make_object(
            input_tokens=COUNT,
            input_tokens_details=make_object(cached_tokens=COUNT),
            output_tokens=COUNT,
            output_tokens_details=make_object(reasoning_tokens=COUNT),
            total_tokens=COUNT,
        )
    ),
)
RESPONSE_EVENT = make_object(type=STRING, sequence_number=COUNT)
INPUT_ITEMS = make_object(
    object=one_of("list"),
    data=make_list(make_object(id=STRING, type=STRING)),
    first_id=TEXT_OR_NULL,
    last_id=TEXT_OR_NULL,
    has_more=FLAG,
)
INPUT_TOKENS = make_object(object=one_of("response.input_tokens"), input_tokens=COUNT)
DELETED = make_object(id=STRING, object=one_of("response"), deleted=FLAG)

EMBEDDINGS = make_object(
    object=one_of("list"),
    data=make_list(
        make_object(
            object=one_of("embedding"),
            index=COUNT,
            embedding={"anyOf": [make_list(NUMBER), {"type": "string", "format": "byte"}]},
        )
    ),
    model=STRING,
    usage=make_object(prompt_tokens=COUNT, total_tokens=COUNT),
)
MODEL = make_object(
    id=STRING,
    object=one_of("model"),
    created=COUNT,
    owned_by=STRING,
    type=one_of("base"),
    capabilities={"type": "object", "additionalProperties": FLAG},
    name=STRING,
    aliases=make_list(STRING),
    max_context_length=COUNT,
    max_model_len=COUNT,
    parallel=COUNT,
    quant=TEXT_OR_NULL,
    plan=allow_null({"type": "object"}),
)
MODELS = make_object(object=one_of("list"), data=make_list(MODEL))
_PIECE = make_object(id=COUNT, piece={"anyOf": [STRING, make_list(COUNT)]})
TOKENS = add_optional(
    make_object(
        tokens={"anyOf": [make_list(COUNT), make_list(_PIECE)]}, count=COUNT, max_model_len=COUNT
    ),
    token_strs=make_list(STRING),
)
DETOKENIZED = make_object(prompt=STRING, content=STRING)
HEALTH = make_object(status=one_of("ok"))
UNHEALTHY = add_optional(
    make_object(status=one_of("loading", "draining", "error")), message=STRING, progress=NUMBER
)
