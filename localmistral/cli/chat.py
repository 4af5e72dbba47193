"""`localmistral chat`."""

import sys

from localmistral.cli.knobs import LoadReader, loads_model
from localmistral.cli.loading import load_chat, warn_of_effort
from localmistral.cli.options import (
    Effort,
    MaxTokens,
    Positional,
    Seed,
    ShowThinking,
    System,
    Temperature,
    ThinkingBudget,
    read_options,
)
from localmistral.units import format_tokens


@loads_model
def chat(
    load: LoadReader,
    positional: Positional = None,  # noqa: ARG001  (read by `load`)
    effort: Effort = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    thinking_budget: ThinkingBudget = None,
    show_thinking: ShowThinking = None,
) -> None:
    """Talk with a model; /help lists what can be typed."""
    from localmistral.terminal.chat import Conversation, make_line_reader
    from localmistral.terminal.render import print_note

    options = read_options(effort, max_tokens, temperature, seed, thinking_budget)
    with load_chat(load()) as loaded:
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
