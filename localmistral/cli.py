"""The commands: parse, call, render. `main` turns errors into one sentence and an exit code.

Heavy imports stand inside the commands that need them, so that `--help` answers at once.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmistral import __version__
from localmistral.chatformat.effort import EFFORTS
from localmistral.errors import BadRequestError, LocalMistralError, UsageError
from localmistral.units import format_tokens, parse_tokens

if TYPE_CHECKING:
    from localmistral.session import Chat

# The parser's own base class: typer names only some of the classes below it.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="localmistral",
    help="Run Mistral models, and any other GGUF chat model, on your own machine.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Debug = False,  # noqa: ARG001  (read by `main`)
) -> None:
    if version:
        sys.stdout.write(f"localmistral {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        from localmistral.terminal.welcome import welcome

        welcome()


@app.command()
def run(
    prompt: Annotated[
        str | None, typer.Argument(help="The question; standard input is appended.")
    ] = None,
    model: ModelOption = None,
    effort: Effort = None,
    system: System = None,
    file: Annotated[
        list[Path] | None, typer.Option("--file", help="A text file to append; repeatable.")
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    show_thinking: ShowThinking = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show speeds on stderr.")] = False,
    as_json: AsJson = False,
    quant: Quant = None,
    context: Context = None,
    kv_type: KvType = None,
    gpu_layers: GpuLayers = None,
    tensor_split: TensorSplit = None,
    threads: Threads = None,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Answer one PROMPT and exit."""
    from localmistral.terminal import oneshot

    options = _read_options(effort, max_tokens, temperature, seed)
    knobs = _read_knobs(context, kv_type, gpu_layers, tensor_split, threads)
    text = oneshot.build_prompt(prompt, file or [])
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    output = oneshot.Output(show_thinking=show_thinking, stats=stats, as_json=as_json)
    with _load(_name_model(model, None, quant), knobs, verbose) as chat:
        _warn_of_effort(chat, effort)
        oneshot.answer(chat, chat.stream(messages, effort=effort, **options), output)


@app.command()
def chat(
    positional: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As -m.")] = None,
    model: ModelOption = None,
    effort: Effort = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    show_thinking: ShowThinking = None,
    quant: Quant = None,
    context: Context = None,
    kv_type: KvType = None,
    gpu_layers: GpuLayers = None,
    tensor_split: TensorSplit = None,
    threads: Threads = None,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Talk with a model; /help lists what can be typed."""
    from localmistral.terminal.chat import Conversation, make_line_reader
    from localmistral.terminal.render import print_note

    options = _read_options(effort, max_tokens, temperature, seed)
    knobs = _read_knobs(context, kv_type, gpu_layers, tensor_split, threads)
    with _load(_name_model(model, positional, quant), knobs, verbose) as loaded:
        _warn_of_effort(loaded, effort)
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


@app.command()
def models(as_json: AsJson = False, debug: Debug = False) -> None:  # noqa: ARG001
    """The models known by name, with their quantisations."""
    from localmistral.models.catalog import load_catalog
    from localmistral.terminal import tables

    known = load_catalog().models
    if as_json:
        _print_json([model.to_json() for model in known])
    else:
        tables.print_models(known)


@app.command(name="list")
def list_models(as_json: AsJson = False, debug: Debug = False) -> None:  # noqa: ARG001
    """The models on this disk."""
    from localmistral.models.cache import scan_local
    from localmistral.terminal import tables
    from localmistral.terminal.render import print_note

    scan = scan_local()
    for warning in scan.warnings:
        print_note(warning)
    if as_json:
        _print_json([model.to_json() for model in scan.models])
    else:
        tables.print_local(scan.models)


def _print_json(document: Any) -> None:
    json.dump(document, sys.stdout, ensure_ascii=False, indent=2)
    sys.stdout.write("\n")


def _read_options(
    effort: str | None, max_tokens: int | None, temperature: float | None, seed: int | None
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
    return {"max_tokens": max_tokens, "sampling": sampling}


def _read_knobs(
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
        raise UsageError(error.message, error.hint) from error


def _name_model(option: str | None, positional: str | None, quant: str | None) -> str:
    """The model that the command line asks for, or the only one on this disk."""
    if option is not None and positional is not None:
        raise UsageError(
            f"Two models are named, {positional!r} and -m {option!r}.", "Name one of them."
        )
    name = option if option is not None else positional
    if name is None:
        name = _choose_only_model()
    return name if quant is None else f"{name}:{quant}"


def _choose_only_model() -> str:
    from localmistral.models.cache import list_local

    complete = [model for model in list_local() if model.complete]
    if len(complete) == 1:
        return complete[0].name
    if not complete:
        raise UsageError(
            "No model is named, and none is on this disk.",
            'Name a GGUF file: localmistral run -m FILE.gguf "PROMPT"',
        )
    names = ", ".join(model.name for model in complete[:5])
    raise UsageError(
        f"No model is named, and {len(complete)} are on this disk: {names}.",
        f'Name one: localmistral run -m {complete[0].name} "PROMPT"',
    )


@contextmanager
def _load(name: str, knobs: dict[str, Any], verbose: bool) -> "Iterator[Chat]":
    from localmistral.engine import EngineSettings
    from localmistral.session import Chat
    from localmistral.terminal.render import show_loading

    if verbose:
        _show_log()
    context = knobs.pop("context", None)
    with show_loading(name) as on_progress:
        chat = Chat.load(name, EngineSettings(**knobs), context=context, on_progress=on_progress)
    with chat:
        yield chat


def _show_log() -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("localmistral")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def _warn_of_effort(chat: "Chat", effort: str | None) -> None:
    if effort is not None and not chat.has_effort_switch:
        from localmistral.terminal.render import print_note

        print_note(f"{chat.title} has no reasoning switch: --effort {effort} has no effect.")


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0 ok, 1 a known error, 2 usage, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    _use_utf8()
    try:
        code = app(arguments, prog_name="localmistral", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except _CommandLineError as error:
        return _report(_translate(error), arguments)
    except BrokenPipeError:
        _abandon_stdout()
        return 0
    except LocalMistralError as error:
        return _report(error, arguments)
    except Exception as error:  # noqa: BLE001  (a person gets a sentence even for our own mistakes)
        return _report(_admit(error), arguments)
    return code if isinstance(code, int) else 0


def _translate(error: Exception) -> UsageError:
    """What the parser of the command line objects to, in our own form."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "localmistral"
    message = str(getattr(error, "format_message", error.__str__)())
    return UsageError(message, f"See {command} --help")


def _admit(error: Exception) -> LocalMistralError:
    admitted = LocalMistralError(
        f"localmistral met an unexpected {type(error).__name__}: {error}.",
        "This is a defect of the program; run the same again with --debug for the details.",
    )
    admitted.__cause__ = error
    return admitted


def _report(error: LocalMistralError, arguments: list[str]) -> int:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--debug" in options:
        import traceback

        traceback.print_exception(error)
    else:
        from localmistral.terminal.render import print_error

        print_error(error)
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR


def _use_utf8() -> None:
    """Text is UTF-8 and lines end in one byte, whatever the system's habit."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace", newline="\n")


def _abandon_stdout() -> None:
    """Nobody reads any more: keep the interpreter's last flush from complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
