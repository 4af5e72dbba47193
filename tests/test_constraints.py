"""Constraints: what is refused before it costs anything, and that answers are as asked for."""

from __future__ import annotations

import datetime
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest
from gguf_writer import Gguf
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from make_header_gguf import SMALL_4, vocabulary, write_files

from localmistral.engine import Engine, EngineSettings, Request, Sampling
from localmistral.engine.constraints import (
    MAX_OPTIONS,
    Choice,
    ConstraintCompiler,
    Gbnf,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
    Spec,
    Thinking,
)
from localmistral.engine.library import llama
from localmistral.engine.settings import Constraint
from localmistral.engine.tokenizer import Tokenizer
from localmistral.errors import BadRequestError, EngineError

BYTE_TOKENS = 1_257
TOOL_CALLS, ARGS, THINK, END_THINK, END = 9, 32, 34, 35, 2


def load_tokenizer(path: Path) -> tuple[Any, Tokenizer]:
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    assert model
    return model, Tokenizer(llama.llama_model_get_vocab(model))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    """Mistral's control tokens at their ids, a token for every byte, and one merge."""
    path = tmp_path_factory.mktemp("vocabulary") / "bytes.gguf"
    metadata = {**SMALL_4, **vocabulary(BYTE_TOKENS), "mistral4.vocab_size": BYTE_TOKENS}
    write_files(path, [Gguf(metadata=metadata, tensors=[])])
    model, made = load_tokenizer(path)
    yield made
    made.close()
    llama.llama_model_free(model)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer)


def allowed_tokens(constraint: Constraint, size: int = BYTE_TOKENS) -> set[int]:
    logits = np.zeros(size, np.float32)
    constraint.mask(logits)
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def takes(constraint: Constraint, tokens: list[int]) -> bool:
    """Whether the constraint allows `tokens` one after the other."""
    for token in tokens:
        if token not in allowed_tokens(constraint):
            return False
        constraint.accept(token)
    return True


def allows(compiler: ConstraintCompiler, tokenizer: Tokenizer, spec: Spec, text: str) -> bool:
    """Whether `text` is one complete answer."""
    return takes(compiler.compile(spec), [*tokenizer.encode(text), END])


def write_document(
    constraint: Constraint, tokenizer: Tokenizer, seed: int, limit: int = 400
) -> str | None:
    """A text of random allowed tokens, closing what can be closed ever more; None if unfinished."""
    chooser = random.Random(seed)
    closing = {tokenizer.encode(char)[0] for char in '"}]'}
    written: list[int] = []
    for step in range(limit):
        allowed = sorted(allowed_tokens(constraint))
        assert allowed
        if END in allowed and (len(allowed) == 1 or chooser.random() < 0.3):
            return b"".join(tokenizer.piece(token) for token in written).decode("utf-8")
        ends = [token for token in allowed if token in closing]
        pool = ends if ends and chooser.random() < step / 40 else allowed
        token = chooser.choice([token for token in pool if token != END])
        written.append(token)
        constraint.accept(token)
    return None


def validate(value: Any, schema: Any) -> None:
    """Raise if `value` does not satisfy `schema`, formats included."""
    kind = jsonschema.Draft202012Validator
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)


# What is refused.


def nest(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BAD_SCHEMAS: dict[str, tuple[Any, str]] = {
    "3,000 deep": (nest(3_000), "100 deep"),
    "100,000 deep": (nest(100_000), "100 deep"),
    "two references in a circle": (
        {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}},
        "never ends",
    ),
    "itself": ({"$ref": "#"}, "never ends"),
    "itself in allOf": ({"allOf": [{"type": "object"}, {"$ref": "#"}]}, "never ends"),
    "itself in anyOf": ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "never ends"),
    "a loop no root leads to": ({"$defs": {"A": {"$ref": "#/$defs/A"}}}, "never ends"),
    "a loop where no schema is expected": (
        {"$ref": "#/x/y", "x": {"y": {"$ref": "#/x/y"}}},
        "never ends",
    ),
    "a required property of its own kind": (
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        "no finite value",
    ),
    "at least one item of its own kind": (
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        "no finite value",
    ),
    "maxLength 1e9": ({"type": "string", "maxLength": 10**9}, "1000000000"),
    "minLength 1e9": ({"type": "string", "minLength": 10**9}, "1000000000"),
    "maxItems 1e9": ({"type": "array", "maxItems": 10**9}, "1000000000"),
    "minItems 1e9": ({"properties": {"a": {"minItems": 10**9}}}, "#/properties/a"),
    "maxItems 1e300": ({"type": "array", "maxItems": 1e300}, "beyond 10^18"),
    "a negative length": ({"minLength": -1}, "-1"),
    "a length that is true": ({"minLength": True}, "integer"),
    "minLength over maxLength": ({"minLength": 3, "maxLength": 2}, "3 over maxLength 2"),
    "a repeat of a million": ({"pattern": "a{1,1000000}"}, "1000000 times"),
    "repeats of repeats": ({"pattern": "((a{1,999}){1,999}){1,999}"}, "997002999"),
    "a repeat with 30 digits": ({"pattern": "a{" + "9" * 30 + "}"}, "times"),
    "a name pattern that repeats": ({"patternProperties": {"a{999999}": {}}}, "999999 times"),
    "a pattern that ends in a backslash": ({"pattern": "a\\"}, "backslash"),
    "an unknown type": ({"type": "strin"}, "'strin'"),
    "an unknown type in a list": ({"type": ["string", "nul"]}, "'nul'"),
    "no type at all": ({"type": []}, "no type"),
    "an array": ([], "an array"),
    "null": (None, "null"),
    "false": (False, "a boolean"),
    "NaN": ({"const": float("nan")}, "nan"),
    "infinity": ({"maximum": float("inf")}, "inf"),
    "a set": ({"enum": {1}}, "set"),
    "a key that is a number": ({"properties": {1: {}}}, "key"),
    "half a surrogate pair": ({"const": "\ud800"}, "surrogates"),
    "an integer of 5,000 digits": ({"const": 10**5000}, "digits"),
    "a remote reference": ({"$ref": "http://example.com/schema"}, "inside the schema"),
    "a file": ({"$ref": "file:///etc/passwd"}, "inside the schema"),
    "a reference to nothing": ({"$ref": "#/$defs/Missing"}, "not in the schema"),
    "a reference that is a number": ({"$ref": 5}, "5"),
    "an empty enum": ({"enum": []}, "empty enum"),
    "an enum that is a number": ({"enum": 5}, "a number"),
    "a huge enum": ({"enum": list(range(10_001))}, "10001"),
    "a required property that is false": (
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        "unsatisfiable",
    ),
    "minimum over maximum": ({"type": "integer", "minimum": 5, "maximum": 3}, "5"),
    "an integer that would be rounded": ({"const": 2**60 + 1}, "2^53"),
    "1,001 properties": ({"properties": {f"p{i}": {} for i in range(1_001)}}, "1001"),
    "30,000 values": ({"properties": {f"p{i}": {"enum": [1] * 50} for i in range(600)}}, "20000"),
    "a long text": ({"description": "x" * 300_000}, "bytes"),
    "many patterns at once": (
        {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(40)]},
        "patterns",
    ),
    "many patterns at once, inside": (
        {"allOf": [{"properties": {"a": {"pattern": f"a.{{{i}}}b"}}} for i in range(40)]},
        "patterns",
    ),
    "alternatives that multiply": (
        {"allOf": [{"anyOf": [{"minLength": i} for i in range(10)]} for _ in range(10)]},
        "cases",
    ),
    "a large divisor": ({"type": "integer", "multipleOf": 99_991}, "99991"),
    "a divisor of zero": ({"multipleOf": 0}, "above 0"),
    "2,000 references in a row": (
        {"$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(2_000)}}
        | {"$ref": "#/$defs/d0"},
        "refers to",
    ),
    "items that are a number": ({"items": 5}, "#/items"),
    "properties that are a list": ({"properties": []}, "an array"),
    "required that is a number": ({"required": 5}, "required"),
    "allOf that is an object": ({"allOf": {}}, "allOf"),
    "a pattern that is a number": ({"pattern": 5}, "pattern"),
    "a pattern that doesn't parse": ({"pattern": "["}, "unclosed"),
    "a keyword that can't be enforced": ({"uniqueItems": True}, "uniqueItems"),
    "an unknown format": ({"type": "string", "format": "bogus"}, "bogus"),
}


@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_a_bad_schema_is_refused_within_a_second_by_name(
    compiler: ConstraintCompiler, name: str
) -> None:
    schema, told = BAD_SCHEMAS[name]
    compiler.compile(JsonObject())  # the vocabulary is read once, and not what is measured here
    before = psutil.Process().memory_info().rss
    started = time.monotonic()
    with pytest.raises(BadRequestError) as caught:
        compiler.compile(JsonSchema(schema=schema), param="response_format.json_schema")
    assert time.monotonic() - started < 1
    assert psutil.Process().memory_info().rss - before < 100 * 2**20
    assert told in caught.value.message
    assert caught.value.param == "response_format.json_schema"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (Choice(options=()), "0"),
        (Choice(options=("a", "")), "Option 1"),
        (Choice(options=("\ud800",)), "surrogate"),
        (Choice(options=tuple(map(str, range(MAX_OPTIONS + 1)))), "10001"),
        (Regex(pattern=""), "empty"),
        (Regex(pattern="["), "unclosed"),
        (Regex(pattern="(?=a)b"), "look-around"),
        (Regex(pattern="(" * 500 + "a" + ")" * 500), "100 deep"),
        (Regex(pattern="a{1,1000000}"), "1000000 times"),
        (Regex(pattern="x" * 30_000), "30000"),
        (Lark(grammar=""), "start"),
        (Lark(grammar="start: missing"), "missing"),
        (Lark(grammar='start: x{1,100000000}\nx: "a"'), "100000000"),
        (Lark(grammar="start: " + "(" * 5_000 + '"a"' + ")" * 5_000), "brackets"),
        (Lark(grammar="start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(5_000))), "5001"),
        (Lark(grammar="start: A\nA: " + " & ".join(f"/.{{{i}}}a.*/" for i in range(40))), "39"),
        (Lark(grammar='start: %json {"$ref": "#"}'), "never ends"),
        (Lark(grammar="start: %json " + '{"items":' * 3_000 + "{}" + "}" * 3_000), "%json"),
        (Lark(grammar="start: /a{1000000}/"), "1000000 times"),
    ],
)
def test_a_bad_specification_is_refused_by_name(
    compiler: ConstraintCompiler, spec: Spec, told: str
) -> None:
    started = time.monotonic()
    with pytest.raises(BadRequestError) as caught:
        compiler.compile(spec, param="grammar")
    assert told in caught.value.message
    assert caught.value.param == "grammar"
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"child": {"$ref": "#/$defs/n"}}}}},
        {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}},
        {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
            "required": ["next"],
        },
        {"$id": "https://example.com/x", "$ref": "#/$defs/a~1b", "$defs": {"a/b": {}}},
        {"properties": {f"p{i}": {"type": "integer"} for i in range(1_000)}},
        {"properties": {"maxLength": {"type": "string"}, "$ref": {"type": "string"}}},
        {"const": {"$ref": "nowhere", "type": 5}},
        {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {}}},
        {},
    ],
)
def test_a_sound_schema_is_not_refused(compiler: ConstraintCompiler, schema: Any) -> None:
    assert allowed_tokens(compiler.compile(JsonSchema(schema=schema)))


def test_what_can_not_be_enforced_is_ignored_only_without_strict(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"enum": [1]}}
    with pytest.raises(BadRequestError, match="uniqueItems") as caught:
        compiler.compile(JsonSchema(schema=schema))
    assert "strict" in caught.value.hint
    assert allows(compiler, tokenizer, JsonSchema(schema=schema, strict=False), "[1,1]")


# What is allowed.


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (Choice(options=("a", "ab", "abc")), ("a", "ab", "abc"), ("abd", "b", "")),
        (
            Choice(options=("</s>", 'say "hi"', "é😀", "[TOOL_CALLS]", "a\nb", "\\", "/x/ #y")),
            ("</s>", 'say "hi"', "é😀", "[TOOL_CALLS]", "a\nb", "\\", "/x/ #y"),
            ("<s>", "say hi"),
        ),
        (Regex(pattern=r"^\d{2,3}$"), ("12", "123"), ("1", "1234", "ab")),
        (Regex(pattern="a/b|c"), ("a/b", "c"), ("a", "ac")),
        (Lark(grammar='start: "a" x*\nx: /[0-9]/ | "b"'), ("a", "a1b2"), ("b",)),
        (JsonObject(), ("{}", '{"a": [1, {"b": null}]}'), ("[]", "1", "{'a':1}")),
        (Gbnf(grammar='root ::= "a" [0-9]* | "é" . "z"'), ("a", "a12", "é😀z"), ("b", "éz")),
        (Gbnf(grammar='root ::= ("a"? ws)* "." # end\nws ::= [ ]*'), (".", "a  a."), ("b.",)),
        (Gbnf(grammar='root ::= "a"{2,3}\n'), ("aa", "aaa"), ("a", "aaaa")),
    ],
)
def test_exactly_what_was_asked_for_is_a_complete_answer(
    compiler: ConstraintCompiler,
    tokenizer: Tokenizer,
    spec: Spec,
    good: tuple[str, ...],
    bad: tuple[str, ...],
) -> None:
    for text in good:
        assert allows(compiler, tokenizer, spec, text), text
    for text in bad:
        assert not allows(compiler, tokenizer, spec, text), text


@pytest.mark.parametrize("spec", [Choice(options=("ab",)), Gbnf(grammar='root ::= "ab"')])
def test_the_end_is_allowed_exactly_when_the_answer_is_complete(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, spec: Spec
) -> None:
    constraint = compiler.compile(spec)
    for token in tokenizer.encode("ab"):
        assert END not in allowed_tokens(constraint)
        constraint.accept(token)
    for _ in range(3):  # a request that ignores the end goes on asking
        assert allowed_tokens(constraint) == {END}
        constraint.accept(END)


@pytest.mark.parametrize("spec", [Choice(options=("ab",)), Gbnf(grammar='root ::= "ab"')])
def test_a_token_that_is_not_allowed_is_an_error_and_nothing_worse(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, spec: Spec
) -> None:
    constraint = compiler.compile(spec)
    with pytest.raises(EngineError, match="not allowed"):
        constraint.accept(tokenizer.encode("x")[0])


def test_whitespace_in_json_is_one_space_or_one_indented_line(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    spec = JsonSchema(schema={"type": "object", "properties": {"a": {"enum": [1, 2]}}})
    for text in ('{"a":1}', '{"a": 1}', '{\n    "a": 1\n}', '{ "a" : 1 }'):
        assert allows(compiler, tokenizer, spec, text), text
        compact = JsonSchema(schema=spec.schema, whitespace="compact")
        assert allows(compiler, tokenizer, compact, text) is (text == '{"a":1}')
    for text in ('{"a":  1}', '{"a":\n\n1}', '{"a":\t1}', " {}", "{} ", "{\n" + " " * 40 + "}"):
        assert not allows(compiler, tokenizer, spec, text), text


def test_control_tokens_are_named_by_id_and_are_never_text(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    spec = Lark(grammar=f'start: <[9]> "get_weather" <[32]> %json {json.dumps(schema)}')
    name, arguments = tokenizer.encode("get_weather"), tokenizer.encode('{"city":"Oslo</s>"}')
    assert takes(compiler.compile(spec), [TOOL_CALLS, *name, ARGS, *arguments, END])
    constraint = compiler.compile(spec)
    assert allowed_tokens(constraint) == {TOOL_CALLS}
    spelled = compiler.compile(Choice(options=("[TOOL_CALLS]",)))
    assert allowed_tokens(spelled) == {tokenizer.encode("[")[0]}
    inside = compiler.compile(Regex(pattern="(?s:.*)"))
    assert all(token == END or token >= 1_000 for token in allowed_tokens(inside))


SMALL = JsonSchema(schema={"type": "object", "properties": {"a": {"type": "integer"}}})


@pytest.mark.parametrize("spec", [SMALL, Gbnf(grammar='root ::= "{" "}"')])
def test_thinking_between_control_tokens_is_free_and_may_be_left_out(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, spec: Spec
) -> None:
    thinking = Thinking(open="[THINK]", close="[/THINK]")
    answer = [*tokenizer.encode("{}"), END]
    thought = tokenizer.encode('so: {"b" é')
    assert takes(compiler.compile(spec, thinking=thinking), answer)
    assert takes(compiler.compile(spec, thinking=thinking), [THINK, *thought, END_THINK, *answer])
    constraint = compiler.compile(spec, thinking=thinking)
    assert allowed_tokens(constraint) == {THINK, tokenizer.encode("{")[0]}
    constraint.accept(THINK)
    text = {token for token in range(BYTE_TOKENS) if token >= 1_000}
    assert allowed_tokens(constraint) == text | {END_THINK}
    constraint.accept(END_THINK)
    assert allowed_tokens(constraint) == {tokenizer.encode("{")[0]}


def test_thinking_that_the_prompt_opened_has_to_be_closed_first(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    answer = [*tokenizer.encode("{}"), END]
    opened = Thinking(open="[THINK]", close="[/THINK]", opened=True)
    assert takes(compiler.compile(SMALL, thinking=opened), [END_THINK, *answer])
    assert not takes(compiler.compile(SMALL, thinking=opened), answer)
    tags = Thinking(open="<think>", close="</think>", opened=True)
    closed = tokenizer.encode('hm {"a" < </thin </think>\n\n')
    assert takes(compiler.compile(SMALL, thinking=tags), [*closed, *answer])
    assert not takes(compiler.compile(SMALL, thinking=tags), answer)


@pytest.mark.parametrize(
    "spec", [SMALL, Regex(pattern="[{}]+"), Choice(options=("{}",)), Lark(grammar='start: "{}"')]
)
def test_thinking_between_tags_is_free_and_may_be_left_out(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, spec: Spec
) -> None:
    tags = Thinking(open="<think>", close="</think>")
    answer = [*tokenizer.encode("{}"), END]
    assert takes(compiler.compile(spec, thinking=tags), answer)
    for text in ("<think>é {x}</think>", "<think></think>\n\n"):
        assert takes(compiler.compile(spec, thinking=tags), [*tokenizer.encode(text), *answer])
    endless = tokenizer.encode("<think></think>\n\n\n")
    assert not takes(compiler.compile(spec, thinking=tags), endless)


def test_a_grammar_in_gbnf_can_not_follow_tags(compiler: ConstraintCompiler) -> None:
    tags = Thinking(open="<think>", close="</think>")
    with pytest.raises(BadRequestError, match="GBNF"):
        compiler.compile(Gbnf(grammar='root ::= "a"'), thinking=tags)


def test_threads_share_one_vocabulary_and_nothing_else(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    fresh = ConstraintCompiler(tokenizer)
    documents: list[str | None] = []

    def work(seed: int) -> None:
        documents.append(write_document(fresh.compile(SMALL), tokenizer, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finished = [document for document in documents if document is not None]
    assert len(documents) == 8
    assert finished
    for document in finished:
        validate(json.loads(document), SMALL.schema)


def test_a_closed_engine_is_said_to_be_closed(tmp_path: Path) -> None:
    path = tmp_path / "bytes.gguf"
    metadata = {**SMALL_4, **vocabulary(BYTE_TOKENS), "mistral4.vocab_size": BYTE_TOKENS}
    write_files(path, [Gguf(metadata=metadata, tensors=[])])
    model, made = load_tokenizer(path)
    made.close()
    llama.llama_model_free(model)
    for spec in (SMALL, Gbnf(grammar='root ::= "a"')):
        with pytest.raises(EngineError, match="closed"):
            ConstraintCompiler(made).compile(spec)


# Documents validate.

SCHEMAS: list[dict[str, Any]] = [
    {"enum": ['it\'s "so"', "back\\slash", "\n", "ü😀", None, 1.5, True, {"a": [1]}, ""]},
    {"type": "string", "pattern": r"^\d+$", "maxLength": 8},
    {"type": "string", "pattern": "b", "maxLength": 6},
    {
        "type": "object",
        "properties": {'naïve "q" \\ /': {"const": "x"}, "日本": {"type": "boolean"}},
        "required": ['naïve "q" \\ /', "日本"],
        "additionalProperties": False,
    },
    {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9, "minimum": -9}},
    {"type": "object", "patternProperties": {"^x[a-c]$": {"type": "null"}}}
    | {"additionalProperties": False, "minProperties": 1},
    {"type": "array", "items": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}}
    | {"minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "null"}, {"const": 3}], "items": False},
    {"type": "integer", "minimum": -17, "exclusiveMaximum": 1203},
    {"type": "number", "minimum": 0.5, "maximum": 20, "multipleOf": 0.25},
    {"type": ["string", "null"], "maxLength": 3},
    {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer", "minimum": 7}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"t": {"const": t}, t: v}, "required": ["t", t]}
            | {"additionalProperties": False}
            for t, v in (("a", {"type": "null"}), ("b", {"type": "boolean"}))
        ]
    },
    {"allOf": [{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}]}
    | {"properties": {"b": {"type": "null"}}},
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer", "minimum": 0, "maximum": 9},
                    "c": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
                },
                "required": ["v"],
                "additionalProperties": False,
            }
        },
    },
    *({"type": "string", "format": name} for name in ("date", "time", "date-time", "uuid", "ipv4")),
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_documents_of_random_tokens_satisfy_their_schema(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, schema: dict[str, Any]
) -> None:
    finished = 0
    for seed in range(12):
        text = write_document(compiler.compile(JsonSchema(schema=schema)), tokenizer, seed)
        if text is not None:
            validate(json.loads(text), schema)
            finished += 1
    assert finished >= 6


def is_date(text: str) -> bool:
    """By the standard library's calendar, in the one notation of RFC 3339."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@pytest.mark.parametrize("year", [0, 1, 4, 100, 400, 1900, 2000, 2017, 2023, 2024, 2100, 9999])
def test_a_date_is_one_of_the_calendar(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, year: int
) -> None:
    date = JsonSchema(schema={"type": "string", "format": "date"})
    moment = JsonSchema(schema={"type": "string", "format": "date-time"})
    for month in range(14):
        for day in (0, 1, 28, 29, 30, 31, 32):
            text = f"{year:04}-{month:02}-{day:02}"
            assert allows(compiler, tokenizer, date, f'"{text}"') is is_date(text), text
    leap = f"{year:04}-02-29"
    assert allows(compiler, tokenizer, moment, f'"{leap}T23:59:59Z"') is is_date(leap)
    assert not allows(compiler, tokenizer, moment, f'"{year:04}-01-01T24:00:00Z"')


def test_a_format_keeps_its_pattern_and_only_a_schema_has_formats(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    both = JsonSchema(schema={"type": "string", "format": "date", "pattern": "^2023"})
    assert allows(compiler, tokenizer, both, '"2023-02-28"')
    assert not allows(compiler, tokenizer, both, '"2023-02-29"')
    assert not allows(compiler, tokenizer, both, '"2024-02-29"')
    data = JsonSchema(schema={"const": {"format": "date"}})
    assert allows(compiler, tokenizer, data, '{"format":"date"}')
    given_schema = {"type": "string", "format": "date"}
    compiler.compile(JsonSchema(schema=given_schema))
    assert given_schema == {"type": "string", "format": "date"}  # the caller's own is left alone


NAMES = st.sampled_from(["a", "b", 'q"', "é", "$ref"])
LEAVES = st.one_of(
    st.builds(lambda kind: {"type": kind}, st.sampled_from(["null", "boolean"])),
    st.builds(lambda a, b: {"type": "string", "minLength": min(a, b), "maxLength": max(a, b)},
              st.integers(0, 5), st.integers(0, 5)),
    st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": b},
              st.integers(-50, 50), st.integers(-50, 50)),
    st.builds(lambda values: {"enum": values},
              st.lists(st.one_of(st.none(), st.integers(-9, 9), st.text(max_size=4)), max_size=3)),
    st.builds(lambda pattern: {"type": "string", "pattern": pattern},
              st.text("ab()[]{}*+?|^$\\d1,.", max_size=8)),
    st.builds(lambda target: {"$ref": target},
              st.sampled_from(["#", "#/$defs/x", "#/properties/a", "#/items", "#/allOf/0"])),
    st.booleans(),
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda properties, required, rest: {
                "type": "object", "properties": properties, "required": required,
                "additionalProperties": rest,
            },
            st.dictionaries(NAMES, inner, max_size=3), st.lists(NAMES, max_size=2, unique=True),
            st.one_of(st.just(False), inner),
        ),
        st.builds(lambda items, least: {"type": "array", "items": items, "minItems": least,
                                        "maxItems": 3}, inner, st.integers(0, 2)),
        st.builds(lambda key, parts: {key: parts}, st.sampled_from(["anyOf", "oneOf", "allOf"]),
                  st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda one, other: {**one, "$defs": {"x": other}}
                  if isinstance(one, dict) else other, inner, inner),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(
    max_examples=300,
    deadline=5_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(schema=TREES, seed=st.integers(0, 1_000))
def test_any_schema_is_refused_or_obeyed(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, schema: Any, seed: int
) -> None:
    try:
        constraint = compiler.compile(JsonSchema(schema=schema))
    except BadRequestError:
        return
    text = write_document(constraint, tokenizer, seed, limit=150)
    if text is None:
        return
    try:
        validate(json.loads(text), schema)
    except re.error:
        event("Python can't read a pattern that Rust can, such as a**")


# GBNF: llama.cpp would end the process.

BAD_GBNF: dict[str, tuple[str, str]] = {
    "nothing": ("", "root"),
    "no root": ('start ::= "a"', "root"),
    "not a grammar": ("{}{}", "'{}{}'"),
    "an open string": ('root ::= "abc', "closing"),
    "an open class": ("root ::= [abc", "closing"),
    "an open group": ('root ::= ("a"', "')'"),
    "a rule that isn't there": ("root ::= missing", "'missing'"),
    "an unknown escape": ('root ::= "\\q"', "escape"),
    "half an escape": ('root ::= "\\u12"', "4 hexadecimal"),
    "a repetition of nothing": ("root ::= *", "before the repetition"),
    "left recursion": ('root ::= root "a" | "b"', "left recursion"),
    "left recursion over two rules": ('root ::= a "x"\na ::= root "y" | "z"', "left recursion"),
    "left recursion behind an empty rule": (
        'root ::= a root "x" | "y"\na ::= b\nb ::= "" | "q"',
        "left recursion",
    ),
    "a rule that is only itself": ("root ::= root", "never comes to an end"),
    "a rule that always goes on": ('root ::= "a" b\nb ::= "b" b', "never comes to an end"),
    "five to two": ('root ::= "a"{5,2}', "5 to 2"),
    "a million times": ('root ::= "a"{1000000}', "1000000 times"),
    "a count of 40 digits": ('root ::= "a"{' + "9" * 40 + "}", "times"),
    "repetitions of repetitions": (
        'root ::= (("a"{900} "b"){900}){900} "c"{900}{900}',
        "50000 elements",
    ),
    "20,000 parentheses": ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "100 deep"),
    "a long text": ("root ::= " + '"a" ' * 20_000, "bytes"),
    "rules that double": (
        "root ::= r0\n"
        + "\n".join(f'r{i} ::= r{i + 1} "a" | r{i + 1} "b"' for i in range(40))
        + '\nr40 ::= "z"',
        "ways to begin",
    ),
    "a long chain": (
        "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(2_000)) + '\nr2000 ::= "z"',
        "in a row",
    ),
    "readings that double": (
        'root ::= s\ns ::= "a" | "a" s x | "a" s y\nx ::= "b"\ny ::= "b"',
        "ambiguous",
    ),
    "a zero byte": ('root ::= "a"\0', "zero byte"),
    "half a surrogate pair": ('root ::= "\ud800"', "surrogate"),
    "a token": ("root ::= <[9]>", "Lark"),
    "any token but one": ("root ::= [^a] !<[9]>", "Lark"),
    "an empty class": ("root ::= []", "empty"),
}


@pytest.mark.parametrize("name", BAD_GBNF)
def test_bad_gbnf_is_refused_and_the_process_goes_on(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    grammar, told = BAD_GBNF[name]
    started = time.monotonic()
    with pytest.raises(BadRequestError) as caught:
        compiler.compile(Gbnf(grammar=grammar), param="grammar")
    assert time.monotonic() - started < 1
    assert told in caught.value.message
    assert caught.value.param == "grammar"
    assert capfd.readouterr().err == ""  # llama.cpp would print the grammar
    assert allows(compiler, tokenizer, Gbnf(grammar='root ::= "a"'), "a")


def test_a_character_in_gbnf_is_never_a_control_token(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    constraint = compiler.compile(Gbnf(grammar="root ::= .*"))
    assert all(token == END or token >= 1_000 for token in allowed_tokens(constraint))
    with pytest.raises(EngineError, match="not allowed"):
        constraint.accept(TOOL_CALLS)


FUZZ = r"""
import random, sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {scripts!r}]
import numpy as np
from test_constraints import load_tokenizer
from localmistral.engine.constraints import ConstraintCompiler, Gbnf
from localmistral.errors import BadRequestError, EngineError
_, tokenizer = load_tokenizer(Path({path!r}))
compiler = ConstraintCompiler(tokenizer)
chooser = random.Random({seed})
leaves = ['"a"', '"ab"', '"b"', '""', '[ab]', '[^a]', '.', '"é"', 'x', 'y', 'z', 'root', '" "']
repeats = ['', '', '', '*', '+', '?', '{{2}}', '{{1,3}}', '{{0,2}}', '{{3,}}', '+*']
def item(depth):
    grouped = depth and chooser.random() < 0.3
    core = '(' + choices(depth - 1) + ')' if grouped else chooser.choice(leaves)
    return core + chooser.choice(repeats)
def choices(depth):
    rows = [[item(depth) for _ in range(chooser.randint(0, 3))]
            for _ in range(chooser.randint(1, 3))]
    return ' | '.join(' '.join(row) for row in rows)
accepted = 0
until = time.monotonic() + {seconds}
while time.monotonic() < until:
    grammar = '\n'.join(name + ' ::= ' + choices(3) for name in ('root', 'x', 'y', 'z'))
    if chooser.random() < 0.2:
        at = chooser.randrange(len(grammar))
        grammar = grammar[:at] + chooser.choice('()[]{{}}|*"\\ \n') + grammar[at + 1:]
    print(repr(grammar), file=sys.stderr)
    try:
        constraint = compiler.compile(Gbnf(grammar=grammar))
        for _ in range(6):
            logits = np.zeros(tokenizer.size, np.float32)
            constraint.mask(logits)
            allowed = np.flatnonzero(np.isfinite(logits))
            if not allowed.size:
                break
            constraint.accept(int(chooser.choice(allowed)))
        accepted += 1
    except (BadRequestError, EngineError):
        continue
print(accepted)
"""


@pytest.mark.slow
def test_random_gbnf_neither_ends_nor_blocks_the_process(tmp_path: Path) -> None:
    path = tmp_path / "bytes.gguf"
    metadata = {**SMALL_4, **vocabulary(BYTE_TOKENS), "mistral4.vocab_size": BYTE_TOKENS}
    write_files(path, [Gguf(metadata=metadata, tensors=[])])
    here = Path(__file__).resolve().parent
    program = FUZZ.format(
        tests=str(here), scripts=str(here.parent / "scripts"), path=str(path), seed=0, seconds=8
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stderr[-2_000:]
    assert int(answer.stdout) > 20


# A real model.

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["cook", 'so-called "boss"', "été"]},
        "code": {"type": "string", "pattern": r"^[A-Z]{2}\d{2}$"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
        "boss": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/boss"}]},
    },
    "required": ["name", "age", "role", "code", "tags", "boss"],
    "additionalProperties": False,
    "$defs": {
        "boss": {
            "type": "object",
            "properties": {"since": {"type": "string", "format": "date"}},
            "required": ["since"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.slow
def test_fifty_seeds_of_a_real_model_make_fifty_valid_documents(smollm2_path: Path) -> None:
    load = EngineSettings(context=512, parallel=8)
    with Engine.load([smollm2_path], load) as engine:
        compiler = ConstraintCompiler(engine.tokenizer)
        prompt = tuple(engine.tokenize("A person as JSON:\n"))
        streams = [
            engine.submit(
                Request(
                    prompt=prompt,
                    max_tokens=400,
                    sampling=Sampling(temperature=1, seed=seed),
                    constraint=compiler.compile(JsonSchema(schema=PERSON)),
                )
            )
            for seed in range(50)
        ]
        texts = ["".join(getattr(event, "text", "") for event in stream) for stream in streams]
    for text in texts:
        validate(json.loads(text), PERSON)
    assert len(set(texts)) > 40
