"""The options that several commands share: their declarations, and what their values mean."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from localmistral.chatformat.effort import EFFORTS
from localmistral.errors import BadRequestError, UsageError
from localmistral.fit.plan import KV_TYPES, PREFERENCES, SPLIT_MODES, PlanRequest
from localmistral.units import parse_speed, parse_tokens

MAX_CONTEXT = 2**24
"""Tokens beyond which a context is a mistyped number: no model has positions for a tenth of it."""
GPU_LAYERS_RANGE = (-1, 2**16)
"""llama.cpp's users type 99 or 999 for all of them."""
LOAD_RANGES = {
    "threads": (0, 512),
    "batch": (1, 65_536),
    "ubatch": (1, 65_536),
    "parallel": (1, 256),
}
"""The engine's own limits, said before it is loaded."""
_LAYERS = re.compile(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", re.ASCII)

ModelOption = Annotated[
    str | None,
    typer.Option("-m", "--model", metavar="NAME|PATH", help="A name, hf:org/repo:QUANT or a file."),
]
Positional = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As -m.")]
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
CpuExperts = Annotated[
    str | None,
    typer.Option(
        "--cpu-experts",
        metavar="LAYERS",
        help="Layers whose routed experts stay in RAM, such as 0-3,8; none for none.",
    ),
]
SplitMode = Annotated[
    str | None,
    typer.Option("--split-mode", metavar="MODE", help="Across GPUs: none, layer or tensor."),
]
Batch = Annotated[
    int | None, typer.Option("--batch", metavar="N", help="Most tokens of one decode call.")
]
Ubatch = Annotated[
    int | None, typer.Option("--ubatch", metavar="N", help="Most tokens of one graph.")
]
Parallel = Annotated[
    int | None, typer.Option("--parallel", metavar="N", help="Streams that generate at once.")
]
Depth = Annotated[
    str | None,
    typer.Option(
        "--depth", metavar="TOKENS", help="Predict speeds with so much context filled (4k)."
    ),
]
GpuSpecs = Annotated[
    list[str] | None,
    typer.Option(
        "--gpu",
        metavar="CARD",
        help="A card instead of this machine's: 24GiB, rtx-4090, 16GiB@448GB/s, 2x3090; "
        "repeatable.",
    ),
]
RamSpec = Annotated[
    str | None,
    typer.Option("--ram", metavar="SIZE", help="Instead of this machine's: 64GiB or 64GiB@90GB/s."),
]
CpuOnly = Annotated[bool, typer.Option("--cpu-only", help="Leave the cards out.")]
Prefer = Annotated[
    str | None,
    typer.Option("--prefer", metavar="WHAT", help="balanced, quality, speed or context."),
]
MinSpeed = Annotated[
    str | None,
    typer.Option("--min-speed", metavar="N", help="Tokens per second to reach at least (20)."),
]
MinContext = Annotated[
    str | None,
    typer.Option("--min-context", metavar="TOKENS", help="Context to reach at least (16k)."),
]
NoVision = Annotated[
    bool, typer.Option("--no-vision", help="Leave the image encoder out, which saves memory.")
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="A plan that `plan --json` wrote, as it is."),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Go by this disk and the catalogue, not by the Hub.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Answer every question with yes.")]
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


def read_request(
    *,
    context: str | None = None,
    kv_type: str | None = None,
    gpu_layers: int | None = None,
    tensor_split: str | None = None,
    cpu_experts: str | None = None,
    split_mode: str | None = None,
    threads: int | None = None,
    batch: int | None = None,
    ubatch: int | None = None,
    parallel: int | None = None,
    depth: str | None = None,
    prefer: str | None = None,
    min_speed: str | None = None,
    min_context: str | None = None,
    no_vision: bool = False,
) -> PlanRequest:
    """What the knobs on the command line ask of the planner; UsageError for a wrong one.

    The quant is part of the model's name: see `name_model`.
    """
    _check_range("--gpu-layers", gpu_layers, GPU_LAYERS_RANGE)
    for name, value in zip(LOAD_RANGES, (threads, batch, ubatch, parallel), strict=True):
        _check_range(f"--{name}", value, LOAD_RANGES[name])
    given = {
        "context": None if context is None else _parse_length(context, "--context"),
        "kv_type": _check_choice("--kv-type", kv_type, KV_TYPES),
        "gpu_layers": gpu_layers,
        "tensor_split": None if tensor_split is None else _parse_shares(tensor_split),
        "cpu_expert_layers": None if cpu_experts is None else parse_layers(cpu_experts),
        "split_mode": _check_choice("--split-mode", split_mode, SPLIT_MODES),
        "threads": threads or None,  # 0 is the default, as for llama.cpp
        "batch": batch,
        "ubatch": ubatch,
        "parallel": parallel,
        "depth": None if depth is None else _parse_depth(depth),
        "prefer": _check_choice("--prefer", prefer, PREFERENCES),
        "min_speed": None if min_speed is None else parse_speed(min_speed),
        "min_context": None if min_context is None else _parse_length(min_context, "--min-context"),
    }
    wishes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return PlanRequest(
        **wishes,
        has_min_speed=min_speed is not None,
        has_min_context=min_context is not None,
        vision=not no_vision,
    )


def parse_layers(text: str) -> tuple[int, ...]:
    """Ascending layer numbers of `0-3,8`; none of `none`. UsageError for anything else."""
    if text.strip().casefold() == "none":
        return ()
    layers: set[int] = set()
    for part in text.split(","):
        match = _LAYERS.fullmatch(part)
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if first > last:
            raise UsageError(
                f"--cpu-experts {text[:60]!r} is not a list of layers.", "Write it as 0-3,8."
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def _parse_length(text: str, option: str) -> int:
    tokens = parse_tokens(text)
    if tokens > MAX_CONTEXT:
        raise UsageError(f"{option} is {tokens}, it must be at most {MAX_CONTEXT}.")
    return tokens


def _parse_depth(text: str) -> int:
    return 0 if text.strip() == "0" else _parse_length(text, "--depth")


def _check_range(option: str, value: int | None, limits: tuple[int, int]) -> None:
    low, high = limits
    if value is not None and not low <= value <= high:
        raise UsageError(f"{option} is {value}, it must be from {low} to {high}.")


def _check_choice(option: str, value: str | None, known: Sequence[str]) -> str | None:
    if value is not None and value not in known:
        raise UsageError(f"{option} {value[:40]!r} is not known.", f"Use {', '.join(known)}.")
    return value


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


def name_load(
    option: str | None, positional: str | None, quant: str | None, plan_file: Path | None
) -> str | None:
    """As `name_model`; None where a plan says which model it is and none is named."""
    if plan_file is not None and option is None and positional is None and quant is None:
        return None
    return name_model(option, positional, quant)


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
