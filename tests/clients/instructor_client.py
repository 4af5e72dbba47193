"""Run with the server's /v1 as the only argument: instructor, unchanged, in its several modes."""

from __future__ import annotations

import sys
from typing import Any

import instructor
import openai
from pydantic import BaseModel, ConfigDict

SUM: Any = [{"role": "user", "content": "What is 31 + 46?"}]


class Parity(BaseModel):
    """A form for an answer."""

    model_config = ConfigDict(extra="forbid")
    is_even: bool


def make_client(mode: str) -> Any:
    client = openai.OpenAI(base_url=sys.argv[1], api_key="any", max_retries=0)
    return instructor.from_openai(client, mode=getattr(instructor.Mode, mode))


def check_mode(mode: str) -> None:
    made = make_client(mode).chat.completions.create(
        model="demo", messages=SUM, response_model=Parity, max_retries=0
    )
    assert isinstance(made, Parity)


def check_partial(mode: str) -> None:
    made = make_client(mode).chat.completions.create_partial(
        model="demo", messages=SUM, response_model=Parity
    )
    assert isinstance(list(made)[-1].is_even, bool)


for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS"):
    check_mode(mode)
    print("PASS", mode)
for mode in ("TOOLS", "JSON_SCHEMA"):
    check_partial(mode)
    print("PASS partial", mode)
