"""What a request may set, whichever API it comes through: sampling, limits, output, effort.

Turns the fields of OpenAI's, llama.cpp's and vLLM's bodies into the keyword arguments of
`Chat.stream`. Knows nothing of routes or of responses.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from localmistral.engine.constraints import (
    Choice,
    Gbnf,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
    Spec,
)
from localmistral.errors import BadRequestError

Count = Annotated[int, Field(strict=True)]
Real = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]

_SAMPLING_FIELDS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc_probability",
    "xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
    "dry_sequence_breakers", "repeat_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip
RANDOM_SEED = -1
"""llama.cpp's way to say "draw one"."""
NO_LIMIT = -1
"""llama.cpp's way to say that nothing but the context limits the answer."""
_SEEDS = 2**32 - 1
"""How many llama.cpp knows; OpenAI takes any integer of 64 bits."""
MAX_CHOICES = 16
_MOST_TOKENS = 2**31 - 1


OUTPUT = "response_format"
"""What the layers below call the field that says what an answer looks like."""


class SamplingParameters(BaseModel):
    """How tokens are chosen, and when the answer ends. A null is as good as absent; unknown
    fields are ignored. Values out of range are refused by name."""

    model_config = ConfigDict(extra="ignore")

    temperature: Real | None = Field(None, description="0 takes the most likely token, always.")
    top_p: Real | None = Field(None, description="0 to 1.")
    top_k: Count | None = Field(None, description="0 or -1 for no limit.")
    min_p: Real | None = Field(None, description="0 to 1.")
    typical_p: Real | None = None
    top_n_sigma: Real | None = None
    xtc_probability: Real | None = None
    xtc_threshold: Real | None = None
    dry_multiplier: Real | None = None
    dry_base: Real | None = None
    dry_allowed_length: Count | None = None
    dry_penalty_last_n: Count | None = None
    dry_sequence_breakers: list[Text] | None = None
    repeat_penalty: Real | None = Field(None, description="As in llama.cpp; 1 has no effect.")
    repetition_penalty: Real | None = Field(None, description="vLLM's name of repeat_penalty.")
    repeat_last_n: Count | None = Field(None, description="Tokens the penalties look back at.")
    frequency_penalty: Real | None = None
    presence_penalty: Real | None = None
    logit_bias: dict[str, Real] | list[Any] | None = Field(
        None, description="Token id -> bias; or, as in llama.cpp, pairs of them, false for never."
    )
    seed: Count | None = Field(None, description="The same seed repeats the same choices.")
    random_seed: Count | None = Field(None, description="Mistral's name of seed.")
    stop: Text | list[Text] | None = Field(None, description="Texts the answer ends before.")
    n: Count | None = Field(None, description=f"How many answers, 1 to {MAX_CHOICES}.")
    stop_token_ids: list[Count] | None = Field(None, description="Tokens the answer ends before.")
    min_tokens: Count | None = Field(None, description="Nothing ends the answer before so many.")
    n_predict: Count | None = Field(None, description="llama.cpp's max_tokens; -1 for no limit.")
    ignore_eos: Flag | None = Field(None, description="Go on after the model's own end.")
    cache_prompt: Flag | None = Field(None, description="False computes the prompt cold.")

    def read_sampling(self) -> dict[str, Any]:
        """The fields of the engine's Sampling that were set."""
        values = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        values["repeat_penalty"] = _first(self.repeat_penalty, self.repetition_penalty)
        values["penalty_last_n"] = self.repeat_last_n
        values["seed"] = _read_seed(_first(self.seed, self.random_seed))
        values["top_k"] = 0 if self.top_k == -1 else self.top_k
        values["logit_bias"] = _read_bias(self.logit_bias)
        if values["dry_sequence_breakers"] is not None:
            values["dry_sequence_breakers"] = tuple(values["dry_sequence_breakers"])
        return {name: value for name, value in values.items() if value is not None}

    def read_limit(self) -> int | None:
        """llama.cpp's `n_predict`, None for no limit. Errors: BadRequestError."""
        return check_count("n_predict", None if self.n_predict == NO_LIMIT else self.n_predict)

    def read_endings(self) -> dict[str, Any]:
        """What ends an answer and what doesn't, as keyword arguments of the engine's Request."""
        return {
            "ignore_eos": bool(self.ignore_eos),
            "min_tokens": self.min_tokens or 0,
            "stop_tokens": tuple(self.stop_token_ids or ()),
        }

    def count_choices(self) -> int:
        """`n`, 1 unless set. Errors: BadRequestError."""
        count = 1 if self.n is None else self.n
        if not 1 <= count <= MAX_CHOICES:
            raise BadRequestError(
                f"n is {count}, it must be between 1 and {MAX_CHOICES}.", param="n"
            )
        return count

    def vary_sampling(self, count: int) -> list[dict[str, Any]]:
        """Sampling of each of `count` answers: a given seed counts up, so that they differ."""
        sampling = self.read_sampling()
        seed = sampling.get("seed")
        if seed is None or count == 1:
            return [sampling] * count
        return [{**sampling, "seed": (seed + number) % _SEEDS} for number in range(count)]


def check_count(name: str, value: int | None) -> int | None:
    """A number of tokens that has to be at least 1. Errors: BadRequestError."""
    if value is not None and not 1 <= value <= _MOST_TOKENS:
        raise BadRequestError(
            f"{name} is {str(value)[:40]}, it must be between 1 and {_MOST_TOKENS}.", param=name
        )
    return value


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _read_seed(seed: int | None) -> int | None:
    """One of llama.cpp's seeds. Errors: BadRequestError for more than 64 bits."""
    if seed is None or seed == RANDOM_SEED:
        return None
    if not -(2**63) <= seed < 2**63:
        raise BadRequestError(
            f"seed is {str(seed)[:40]}, it must be an integer of 64 bits.", param="seed"
        )
    return seed % _SEEDS


def _read_bias(raw: Mapping[str, float] | Sequence[Any] | None) -> dict[int, float] | None:
    if raw is None:
        return None
    pairs = raw.items() if isinstance(raw, Mapping) else _read_pairs(raw)
    return {_read_token(key): value for key, value in pairs}


def _read_pairs(raw: Sequence[Any]) -> Iterable[tuple[Any, float]]:
    """llama.cpp's pairs of a token and its bias; false takes the token out."""
    for i, pair in enumerate(raw):
        value = pair[1] if isinstance(pair, list) and len(pair) == 2 else None
        if value is False:
            value = -math.inf
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRequestError(
                f"logit_bias[{i}] must be a token id and its bias.", param=f"logit_bias[{i}]"
            )
        yield pair[0], value


def _read_token(key: Any) -> int:
    text = str(key) if isinstance(key, int) and not isinstance(key, bool) else key
    if isinstance(text, str) and text.isdecimal() and text.isascii() and len(text) <= 10:
        return int(text)
    raise BadRequestError(
        f"logit_bias names {str(key)[:40]!r}, which is no token id.",
        "POST /tokenize tells the ids of a text.",
        param="logit_bias",
    )


class JsonSchemaFormat(BaseModel):
    """OpenAI's wrapper of a schema."""

    model_config = ConfigDict(extra="ignore")
    name: Text | None = None
    description: Text | None = None
    strict: Flag | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(BaseModel):
    """What the answer has to look like."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | bool | None = Field(
        None, alias="schema", description="llama.cpp's place of the schema, with json_object."
    )

    def read_spec(self) -> Spec | None:
        """Errors: BadRequestError where a schema is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object" and self.schema_ is None:
            return JsonObject()
        schema = self.schema_ if self.json_schema is None else self.json_schema.schema_
        if schema is None:
            raise BadRequestError(
                "response_format.json_schema.schema is missing.",
                param="response_format.json_schema.schema",
            )
        # a schema is a promise to whoever reads the answer, so nothing in it is passed over
        # unless the client says that it may be
        is_loose = self.json_schema is not None and self.json_schema.strict is False
        return JsonSchema(schema=schema, strict=not is_loose)


class StructuredOutputs(BaseModel):
    """vLLM's ways to constrain an answer; one of them."""

    model_config = ConfigDict(extra="ignore")
    json_: Any = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = Field(None, description="GBNF or Lark.")
    json_object: Flag | None = None
    structural_tag: Any = Field(None, description="Refused: it can't be had here.")


class OutputParameters(BaseModel):
    """The fields that constrain an answer, in every spelling clients use; at most one of them."""

    model_config = ConfigDict(extra="ignore")

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, description="llama.cpp's spelling.")
    grammar: Text | None = Field(None, description="GBNF, as in llama.cpp.")
    guided_json: Any = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    guided_grammar: Text | None = None

    def read_output(self) -> tuple[str, Spec | None]:
        """The one constraint that was asked for, and the field it stands in.

        Errors: BadRequestError for two, or a bad one.
        """
        found: list[tuple[str, Spec]] = []
        if self.response_format is not None:
            spec = self.response_format.read_spec()
            found += [("response_format", spec)] if spec is not None else []
        if self.json_schema is not None:
            found.append(("json_schema", JsonSchema(schema=self.json_schema, strict=False)))
        if self.grammar is not None:
            found.append(("grammar", Gbnf(grammar=self.grammar)))
        guided = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        found += [(f"guided_{key}", spec) for key, spec in _read_guided(guided)]
        if self.structured_outputs is not None:
            given = self.structured_outputs.model_dump(by_alias=True)
            if given["structural_tag"] is not None:
                raise BadRequestError(
                    "structured_outputs.structural_tag can't be enforced here.",
                    "Send a json schema, a regex, a choice or a grammar.",
                    param="structured_outputs.structural_tag",
                )
            found += [(f"structured_outputs.{key}", spec) for key, spec in _read_guided(given)]
        if len(found) > 1:
            raise BadRequestError(
                f"{found[0][0]} and {found[1][0]} both say what the answer looks like.",
                "Send one of them.",
                param=found[1][0],
            )
        return found[0] if found else (OUTPUT, None)


@contextlib.contextmanager
def named_output(name: str) -> Iterator[None]:
    """What is wrong with an answer's form is wrong in the field `name` of the request."""
    try:
        yield
    except BadRequestError as error:
        if error.param != OUTPUT:
            raise
        raise type(error)(error.message, error.hint, param=name) from error


def _read_guided(given: Mapping[str, Any]) -> Sequence[tuple[str, Spec]]:
    found: list[tuple[str, Spec]] = []
    if given.get("json") is not None:
        found.append(("json", JsonSchema(schema=_parse_schema(given["json"]), strict=False)))
    if given.get("regex") is not None:
        found.append(("regex", Regex(pattern=given["regex"])))
    if given.get("choice") is not None:
        found.append(("choice", Choice(options=tuple(given["choice"]))))
    if given.get("grammar") is not None:
        text = given["grammar"]
        is_gbnf = "::=" in text
        found.append(("grammar", Gbnf(grammar=text) if is_gbnf else Lark(grammar=text)))
    if given.get("json_object"):
        found.append(("json_object", JsonObject()))
    return found


def _parse_schema(raw: Any) -> Any:
    """vLLM takes a schema as an object or as its text."""
    if not isinstance(raw, str):
        return raw
    import json

    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequestError("guided_json is no valid JSON.", param="guided_json") from error
