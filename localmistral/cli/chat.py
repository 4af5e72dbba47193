"""`localmistral chat`."""

import sys
from typing import Annotated

import typer

from localmistral.cli.loading import load_chat, warn_of_effort
from localmistral.cli.options import (
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
from localmistral.units import format_tokens


def chat(
    positional: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As -m.")] = None,
    model: ModelOption = None,
    effort: Effort = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    thinking_budget: ThinkingBudget = None,
    show_thinking: ShowThinking = None,
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
    """Talk with a model; /help lists what can be typed."""
    from localmistral.terminal.chat import Conversation, make_line_reader
    from localmistral.terminal.render import print_note

    options = read_options(effort, max_tokens, temperature, seed, thinking_budget)
    knobs = read_knobs(context, kv_type, gpu_layers, tensor_split, threads)
    name = name_model(model, positional, quant)
    with load_chat(name, knobs, chat_template, verbose) as loaded:
        warn_of_effort(loaded, effort)
        if sys.stdin.isatty():
            tokens = format_tokens(loaded.engine.settings.context)
            print_note(f"{loaded.title}, context {tokens}. /help for commands, Ctrl-D leaves.")
        conversation = Conversation(
            loaded,
            system=system or "",
            effort=effort,
            show_thinking=show_thinking,
            options=options,
        )
        conversation.run(make_line_reader())
