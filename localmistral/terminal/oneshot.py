"""`localmistral run`: one question, one answer, and out.

Knows nothing of how options are parsed or models are loaded.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from localmistral.answer import ChatItem, ChatResult
from localmistral.engine.specs import Choice, JsonSchema, Spec
from localmistral.errors import UsageError
from localmistral.terminal.render import AnswerView, describe_call, describe_result, print_note


class Answer(Protocol):
    """An answer on its way, from this process or from a server; its result comes last."""

    @property
    def result(self) -> ChatResult | None: ...

    def __iter__(self) -> Iterator[ChatItem]: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How the answer is shown; `show_thinking` None leaves it to whether there's a terminal."""

    show_thinking: bool | None = None
    stats: bool = False
    as_json: bool = False


def build_prompt(argument: str | None, files: list[Path]) -> str:
    """The prompt from the argument, then `files`, then standard input if it isn't a terminal."""
    parts = [argument or "", *(_read_file(path) for path in files)]
    if sys.stdin is not None and not sys.stdin.isatty():
        parts.append(_decode(sys.stdin.buffer.read(), "standard input"))
    prompt = "\n\n".join(part for part in parts if part.strip())
    if not prompt:
        raise UsageError("The prompt is empty.", 'Try: localmistral run "Why is the sky blue?"')
    return prompt


def _read_file(path: Path) -> str:
    return f"{path.name}:\n{_read_text(path)}"


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}.") from error
    return _decode(data, str(path))


def read_tools(paths: list[Path]) -> list[Any]:
    """The tools that JSON files declare: one tool, a list, or an object with `tools`.

    A bare function (name, description, parameters) is taken for a tool.
    """
    tools: list[Any] = []
    for path in paths:
        found = _read_json(path)
        if isinstance(found, dict) and isinstance(found.get("tools"), list):
            found = found["tools"]
        tools += found if isinstance(found, list) else [found]
    return [_wrap_function(tool) for tool in tools]


def _wrap_function(tool: Any) -> Any:
    if not isinstance(tool, dict) or "name" not in tool or "function" in tool:
        return tool
    function = {key: value for key, value in tool.items() if key not in ("type", "input_schema")}
    if "input_schema" in tool:  # Anthropic's name for it
        function.setdefault("parameters", tool["input_schema"])
    return {"type": "function", "function": function}


def _read_json(path: Path) -> Any:
    text = _read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}."
        ) from error
    except (RecursionError, ValueError) as error:  # a number of 5,000 digits, say
        raise UsageError(f"{path} is nested too deeply, or its numbers are too long.") from error


def _unwrap_schema(found: Any) -> JsonSchema:
    """A schema, or OpenAI's wrappings of one: `json_schema` with `name`, `schema`, `strict`."""
    if isinstance(found, dict) and found.get("type") == "json_schema":
        found = found.get("json_schema", found)
    if isinstance(found, dict) and isinstance(found.get("schema"), dict):
        return JsonSchema(schema=found["schema"], strict=found.get("strict") is not False)
    return JsonSchema(schema=found)


def read_output(json_schema: Path | None, choices: list[str]) -> Spec | None:
    """What the answer has to look like, from the options of `run`."""
    if json_schema is not None and choices:
        raise UsageError("--json-schema and --choice were both given.", "Use one of them.")
    if json_schema is not None:
        return _unwrap_schema(_read_json(json_schema))
    if not all(choices):
        raise UsageError("A --choice is empty.", "Leave it out, or give it a text.")
    return Choice(options=tuple(choices)) if choices else None


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"Byte {error.start} of {source} is 0x{data[error.start]:02x}: it is not UTF-8 text.",
            "Convert it first, for example with: iconv -t utf-8",
        ) from error


def answer(stream: Answer, output: Output, *, model: str, context: int) -> None:
    """Show the answer of `model` to its end; Ctrl-C or a closed pipe cancels it."""
    with stream:
        if output.as_json:
            for _ in stream:
                continue
        else:
            view = AnswerView(show_thinking=output.show_thinking)
            try:
                for item in stream:
                    view.show(item)
            finally:
                view.end(stream.result)
    result = stream.result
    assert result is not None
    if output.as_json:
        json.dump(to_json(model, result), sys.stdout, ensure_ascii=False, indent=2)
        sys.stdout.write("\n")
    elif result.finish_reason == "length":
        print_note(explain_length(context, result))
    if output.stats:
        print_note(describe_result(result))


def explain_length(context: int, result: ChatResult) -> str:
    """Why an answer was cut, and what to do."""
    used = result.prompt_tokens + result.completion_tokens
    if used >= context:
        return f"(cut: the context of {context} tokens is full; a larger one: --context N)"
    return f"(cut after {result.completion_tokens} tokens, as --max-tokens says)"


def to_json(model: str, result: ChatResult) -> dict[str, Any]:
    """The document of `--json`; times in seconds, speeds in tokens per second."""
    return {
        "model": model,
        "answer": result.content,
        "reasoning": result.reasoning,
        "tool_calls": [{"id": call.id, **describe_call(call)} for call in result.tool_calls],
        "finish_reason": result.finish_reason,
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "cached_tokens": result.cached_tokens,
            "completion_tokens": result.completion_tokens,
            "reasoning_tokens": result.reasoning_tokens,
        },
        "timings": {
            "time_to_first_token_s": round(result.time_to_first_token_s, 4),
            "prefill_s": round(result.prefill_s, 4),
            "decode_s": round(result.decode_s, 4),
            "reasoning_s": round(result.reasoning_s, 4),
            "prefill_tokens_per_second": round(result.prefill_speed, 2),
            "decode_tokens_per_second": round(result.decode_speed, 2),
        },
        "seed": result.seed,
    }
