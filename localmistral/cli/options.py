"""The options that several commands share: their declarations, and what their values mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from localmistral.chatformat.effort import EFFORTS
from localmistral.errors import BadRequestError, UsageError
from localmistral.units import parse_tokens

ModelOption = Annotated[
    str | None,
    typer.Option("-m", "--model", metavar="NAME|PATH", help="A name, hf:org/repo:QUANT or a file."),
]
Effort = Annotated[
    str | None,
    typer.Option("--effort", metavar="LEVEL", help="Thinking: none, low, medium or high."),
]
System = Annotated[str | None, typer.Option("--system", help="The system prompt.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", help="End the answer after N tokens.")
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", help="0 takes the most likely token, always."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Repeat the same choices.")]
ShowThinking = Annotated[
    bool | None,
    typer.Option("--show-thinking/--hide-thinking", help="Thinking goes to stderr, or nowhere."),
]
Quant = Annotated[
    str | None, typer.Option("--quant", metavar="QUANT", help="Which quantisation of the model.")
]
Context = Annotated[
    str | None,
    typer.Option("--context", metavar="TOKENS", help="Context per stream, such as 8192 or 32k."),
]
KvType = Annotated[
    str | None, typer.Option("--kv-type", metavar="TYPE", help="Type of the KV cache: f16, q8_0...")
]
GpuLayers = Annotated[
    int | None, typer.Option("--gpu-layers", metavar="N", help="Layers on the GPU; -1 for all.")
]
TensorSplit = Annotated[
    str | None,
    typer.Option("--tensor-split", metavar="A,B", help="Share of the layers per GPU, such as 3,1."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", help="CPU threads; default: the cores.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show llama.cpp's log.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="FILE|FAMILY",
        help="A Jinja file, embedded, or v15, v13, v11, v7, v3-tekken...",
    ),
]
ThinkingBudget = Annotated[
    int | None,
    typer.Option("--thinking-budget", metavar="N", help="End the thinking after N tokens."),
]


def read_options(
    effort: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    thinking_budget: int | None,
) -> dict[str, Any]:
    """The keyword arguments of `Chat.stream`; what is wrong with them alone is a usage error."""
    from localmistral.engine.settings import Request, Sampling

    if effort is not None and effort not in EFFORTS:
        raise UsageError(
            f"The effort {effort[:40]!r} is not known.", "Use none, low, medium or high."
        )
    given = {"temperature": temperature, "seed": seed}
    sampling = {name: value for name, value in given.items() if value is not None}
    with _as_usage_error():
        Request(prompt=(0,), max_tokens=max_tokens, sampling=Sampling(**sampling))  # type: ignore[arg-type]
    if thinking_budget is not None and thinking_budget < 1:
        raise UsageError(
            f"--thinking-budget is {thinking_budget}, it must be at least 1.",
            "--effort none leaves thinking out.",
        )
    return {"max_tokens": max_tokens, "sampling": sampling, "thinking_budget": thinking_budget}


def read_knobs(
    context: str | None,
    kv_type: str | None,
    gpu_layers: int | None,
    tensor_split: str | None,
    threads: int | None,
) -> dict[str, Any]:
    """The fields of EngineSettings that were set; `context` among them."""
    from localmistral.engine.settings import EngineSettings

    given = {
        "context": None if context is None else parse_tokens(context),
        "kv_type": kv_type,
        "gpu_layers": gpu_layers,
        "tensor_split": None if tensor_split is None else _parse_shares(tensor_split),
        "threads": threads,
    }
    knobs = {name: value for name, value in given.items() if value is not None}
    with _as_usage_error():
        EngineSettings(**knobs)  # type: ignore[arg-type]
    return knobs


def _parse_shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(share) for share in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 <= share < 1e6 for share in shares) or not sum(shares):
        raise UsageError(
            f"--tensor-split {text[:60]!r} is not a list of shares.", "Write it as 3,1 or 20,17."
        )
    return shares


@contextmanager
def _as_usage_error() -> Iterator[None]:
    try:
        yield
    except BadRequestError as error:
        option = f"--{error.param.replace('_', '-')}"
        message = error.message.replace(error.param, option, 1) if error.param else error.message
        raise UsageError(message, error.hint) from error


def name_model(option: str | None, positional: str | None, quant: str | None) -> str:
    """The model that the command line asks for, or the only one on this disk."""
    if option is not None and positional is not None:
        raise UsageError(
            f"Two models are named, {positional!r} and -m {option!r}.", "Name one of them."
        )
    name = option if option is not None else positional
    if name is None:
        name = _choose_only_model()
    if quant is None:
        return name
    if not name or ":" in name.removeprefix("hf:") or name == "demo" or Path(name).exists():
        raise UsageError(
            f"--quant {quant} chooses among the files of a model that is known by name, and "
            f"{name!r} says already which one it is.",
            "Leave --quant out.",
        )
    return f"{name}:{quant}"


def _choose_only_model() -> str:
    """The only model on this disk; the demo model if there is none."""
    from localmistral.models.cache import list_local
    from localmistral.models.names import DEMO
    from localmistral.terminal.render import print_note

    complete = [model for model in list_local() if model.complete]
    if len(complete) == 1:
        return complete[0].name
    if not complete:
        print_note(
            "No model is on this disk: the demo model answers, a toy. See localmistral models."
        )
        return DEMO
    names = ", ".join(model.name for model in complete[:5])
    raise UsageError(
        f"No model is named, and {len(complete)} are on this disk: {names}.",
        f'Name one: localmistral run -m {complete[0].name} "PROMPT"',
    )
