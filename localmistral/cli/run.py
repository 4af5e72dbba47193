"""`localmistral run`."""

from pathlib import Path
from typing import Annotated

import typer

from localmistral.cli.loading import load_chat, warn_of_effort
from localmistral.cli.options import (
    AsJson,
    ChatTemplate,
    Context,
    Debug,
    Effort,
    GpuLayers,
    KvType,
    MaxTokens,
    ModelOption,
    Quant,
    Seed,
    ShowThinking,
    System,
    Temperature,
    TensorSplit,
    ThinkingBudget,
    Threads,
    Verbose,
    name_model,
    read_knobs,
    read_options,
)


def run(
    prompt: Annotated[
        str | None, typer.Argument(help="The question; standard input is appended.")
    ] = None,
    model: ModelOption = None,
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
    quant: Quant = None,
    context: Context = None,
    kv_type: KvType = None,
    gpu_layers: GpuLayers = None,
    tensor_split: TensorSplit = None,
    threads: Threads = None,
    chat_template: ChatTemplate = None,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001  (read by `main`)
) -> None:
    """Answer one PROMPT and exit."""
    from localmistral.terminal import oneshot

    options = read_options(effort, max_tokens, temperature, seed, thinking_budget)
    knobs = read_knobs(context, kv_type, gpu_layers, tensor_split, threads)
    tools = oneshot.read_tools(tool or [])
    shape = oneshot.read_output(json_schema, choice or [])
    text = oneshot.build_prompt(prompt, file or [])
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    output = oneshot.Output(show_thinking=show_thinking, stats=stats, as_json=as_json)
    with load_chat(name_model(model, None, quant), knobs, chat_template, verbose) as chat:
        warn_of_effort(chat, effort)
        stream = chat.stream(messages, tools=tools, effort=effort, output=shape, **options)
        oneshot.answer(chat, stream, output)
