"""`localmistral run`."""

from pathlib import Path
from typing import Annotated

import typer

from localmistral.cli.knobs import LoadReader, loads_model
from localmistral.cli.loading import load_chat, warn_of_effort
from localmistral.cli.options import (
    AsJson,
    Effort,
    MaxTokens,
    Seed,
    ShowThinking,
    System,
    Temperature,
    ThinkingBudget,
    read_options,
)

NoServer = Annotated[
    bool,
    typer.Option(
        "--no-server",
        envvar="LOCALMISTRAL_NO_SERVER",
        help="Load the model here, even if a server that runs has it.",
    ),
]


@loads_model
def run(
    load: LoadReader,
    prompt: Annotated[
        str | None, typer.Argument(help="The question; standard input is appended.")
    ] = None,
    effort: Effort = None,
    system: System = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", metavar="PATH", help="A text file to append; repeatable."),
    ] = None,
    tool: Annotated[
        list[Path] | None,
        typer.Option("--tool", metavar="FILE", help="JSON of tools to declare; repeatable."),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option("--json-schema", metavar="FILE", help="The answer is JSON of this schema."),
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option("--choice", metavar="TEXT", help="The answer is one of these; repeatable."),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    thinking_budget: ThinkingBudget = None,
    show_thinking: ShowThinking = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show speeds on stderr.")] = False,
    as_json: AsJson = False,
    no_server: NoServer = False,
) -> None:
    """Answer one PROMPT and exit; a server of yours that has the model is used."""
    from localmistral.server.client import RemoteChat, find_server
    from localmistral.terminal import oneshot

    options = read_options(effort, max_tokens, temperature, seed, thinking_budget)
    tools = oneshot.read_tools(tool or [])
    shape = oneshot.read_output(json_schema, choice or [])
    text = oneshot.build_prompt(prompt, file or [])
    server = None if no_server or load.is_particular else find_server(load.model)
    chosen = load_chat(load()) if server is None else server
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    output = oneshot.Output(show_thinking=show_thinking, stats=stats, as_json=as_json)
    with chosen as chat:
        warn_of_effort(chat, effort)
        stream = chat.stream(messages, tools=tools, effort=effort, output=shape, **options)
        context = chat.context if isinstance(chat, RemoteChat) else chat.engine.settings.context
        oneshot.answer(stream, output, model=chat.name, context=context)
